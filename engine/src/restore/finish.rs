//! The end of a restore: every thread is caught on the last step of its restorer, the restorer's memory goes
//! away, and all are let go.
//!
//! A thread's last step is `rt_sigreturn`. At the exit stop of that call it has its own registers, mask and
//! memory and has not run an instruction of its program yet: whatever still has to be done with the restorer's
//! memory is done from outside, in one thread of each task.

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nix::sys::signal::kill;
use nix::unistd::Pid;
use rcriu_images::pb;
use restorer::TaskSlot;

use crate::arch::Regs;
use crate::error::{Context, Error, Kind, Result, SysContext};
use crate::interrupt;
use crate::pstree::{RealPid, TaskState};
use crate::restore::read::{Snapshot, TaskImage, TaskIx};
use crate::restore::stages::Area;
use crate::sys::ptrace;
use crate::sys::vm::MemFile;
use crate::sys::wait::{self, Status};
use crate::task::sigqueue;

/// Signal mask with everything blocked.
const ALL_BLOCKED: u64 = u64::MAX;
/// Offset of `rseq_cs` in `struct rseq`.
const RSEQ_CS: u64 = 8;

/// A thread we trace.
#[derive(Clone, Copy, Debug)]
struct Thread {
    tid: RealPid,
    task: TaskIx,
    /// Number among the task's threads.
    at: usize,
}

/// All threads of the restored tree, attached. Dropping it detaches nobody: the guard kills them.
#[derive(Debug)]
pub struct Attached<'a> {
    snapshot: &'a Snapshot,
    area: &'a Area,
    threads: Vec<Thread>,
}

/// What becomes of the tasks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Final {
    /// They are as they were: running, or stopped.
    AsTheyWere,
    /// All are stopped (`--leave-stopped`).
    Stopped,
}

impl<'a> Attached<'a> {
    /// Attaches to every thread while they wait; seccomp sleeps from here on.
    ///
    /// Precondition: all threads exist, and none has got its filters yet.
    pub fn attach(snapshot: &'a Snapshot, area: &'a Area) -> Result<Self> {
        let mut threads = Vec::new();
        for (task, image) in snapshot.alive() {
            let mut options = ptrace::O_TRACESYSGOOD;
            if uses_seccomp(image) {
                options |= ptrace::O_SUSPEND_SECCOMP;
            }
            for (at, tid) in image.threads.iter().enumerate() {
                let tid = RealPid(tid.0);
                ptrace::seize(tid, options).during(|| format!("thread {tid}")).during(|| image.name())?;
                threads.push(Thread { tid, task, at });
            }
        }
        Ok(Attached { snapshot, area, threads })
    }

    /// Stops every thread where it waits and lets it go on to its next system call.
    ///
    /// Precondition: all wait for the last stage to open. Afterwards they stop at each call.
    pub fn step_by_calls(&self) -> Result<()> {
        for thread in &self.threads {
            ptrace::interrupt(thread.tid)?;
        }
        self.each_stop(|thread, status| match status {
            Status::EventStop(_) => ptrace::syscall(thread.tid, 0).map(|()| true),
            other => Err(strange(other)),
        })
    }

    /// Waits until every thread stands at the exit of its `rt_sigreturn`.
    ///
    /// Precondition: the last stage is open.
    pub fn catch(&self) -> Result<()> {
        let mut entered: HashSet<RealPid> = HashSet::new();
        self.each_stop(|thread, status| {
            match status {
                Status::Syscall if entered.contains(&thread.tid) => return Ok(true),
                Status::Syscall => {
                    if regs(thread.tid)?.orig_rax == libc::SYS_rt_sigreturn as u64 {
                        entered.insert(thread.tid);
                    }
                }
                Status::EventStop(_) => {}
                other => return Err(strange(other)),
            }
            ptrace::syscall(thread.tid, 0).map(|()| false)
        })
    }

    /// Calls `f` for each stop of each thread until it says that it is done with the thread.
    ///
    /// Threads may wait for each other, so none is waited for alone. Cost: as many polls as threads for each
    /// round in which at least one moved.
    fn each_stop(&self, mut f: impl FnMut(Thread, Status) -> Result<bool>) -> Result<()> {
        let mut open: Vec<Thread> = self.threads.clone();
        let mut nap = Duration::ZERO;
        while !open.is_empty() {
            let mut moved = false;
            let mut rest = Vec::with_capacity(open.len());
            for thread in open {
                let done = match wait::poll(thread.tid).and_then(|s| self.alive(thread, s))? {
                    None => false,
                    Some(status) => {
                        moved = true;
                        f(thread, status).during(|| self.name(thread))?
                    }
                };
                if !done {
                    rest.push(thread);
                }
            }
            open = rest;
            if moved || open.is_empty() {
                nap = Duration::ZERO;
                continue;
            }
            interrupt::check()?;
            if self.area.failed() {
                return Err(self.area.failure());
            }
            std::thread::sleep(nap);
            nap = (nap * 2).clamp(Duration::from_micros(20), Duration::from_millis(2));
        }
        Ok(())
    }

    /// A thread that has ended is an error of its own, and why may stand in the shared area.
    fn alive(&self, thread: Thread, status: Option<Status>) -> Result<Option<Status>> {
        match status {
            Some(status) if status.is_end() => {
                if self.area.failed() {
                    return Err(self.area.failure());
                }
                Err(Error::host(format!("it ended unexpectedly: {status:?}")).during(self.name(thread)))
            }
            other => Ok(other),
        }
    }

    fn name(&self, thread: Thread) -> String {
        let task = self.snapshot.get(thread.task).map_or_else(String::new, TaskImage::name);
        format!("{task}, thread {}", thread.tid)
    }

    /// Takes the restorer's memory out of every task, and gives critical sections of restartable sequences
    /// back to the kernel.
    ///
    /// Precondition: all threads are caught.
    pub fn clean(&self) -> Result<()> {
        for thread in &self.threads {
            let clean = || -> Result<()> {
                if thread.at == 0 {
                    let slot = self.area.slot(thread.task)?;
                    unmap(thread.tid, slot)?;
                }
                self.give_back_rseq(*thread)
            };
            clean().during(|| self.name(*thread))?;
        }
        Ok(())
    }

    fn give_back_rseq(&self, thread: Thread) -> Result<()> {
        let core = self.snapshot.get(thread.task).and_then(|t| t.thread_core(thread.at));
        let rseq = core.and_then(|c| c.thread_core.as_ref()).and_then(|t| t.rseq_entry.as_ref());
        let Some(pb::RseqEntry { rseq_abi_pointer: abi, rseq_cs_pointer: Some(cs), .. }) = rseq else {
            return Ok(());
        };
        if *abi == 0 || *cs == 0 {
            return Ok(());
        }
        let at = abi.checked_add(RSEQ_CS).ok_or_else(|| Error::image("rseq area beyond all addresses"))?;
        MemFile::open(thread.tid)?.write(at, &cs.to_ne_bytes())
    }

    /// Lets all go.
    ///
    /// # Errors
    /// A thread that died meanwhile is none of ours any more and no error.
    pub fn detach(self, last: Final) -> Result<()> {
        // A stop signal sent before detaching takes effect before the first instruction.
        for (ix, image) in self.snapshot.alive() {
            let pid = Pid::from_raw(self.area.slot(ix)?.pid.load(Ordering::Acquire));
            let signal = match (last, image.state) {
                (Final::Stopped, _) => libc::SIGSTOP,
                (_, TaskState::Stopped) => image.tc.stop_signo.map_or(libc::SIGSTOP, |s| s as i32),
                _ if cores(image).any(sigqueue::stops) => libc::SIGSTOP,
                _ => continue,
            };
            let signal = nix::sys::signal::Signal::try_from(signal)
                .map_err(|_| Error::image(format!("core-{}.img: no signal {signal} stops", image.pid)))?;
            kill(pid, signal).call("kill").during(|| image.name())?;
        }
        let mut first = Ok(());
        for thread in &self.threads {
            match ptrace::detach(thread.tid, 0) {
                Err(e) if !matches!(e.kind(), Kind::TaskDied(_)) => {
                    first = first.and(Err(e.during(self.name(*thread))));
                }
                _ => {}
            }
        }
        first
    }
}

fn cores(image: &TaskImage) -> impl Iterator<Item = &pb::CoreEntry> {
    (0..image.threads.len()).filter_map(|i| image.thread_core(i))
}

fn uses_seccomp(image: &TaskImage) -> bool {
    (0..image.threads.len())
        .filter_map(|i| image.thread_core(i)?.thread_core.as_ref())
        .any(|t| t.seccomp_mode.unwrap_or(0) != 0)
        || image.tc.old_seccomp_mode.unwrap_or(0) != 0
}

fn strange(status: Status) -> Error {
    Error::host(format!("it stopped unexpectedly: {status:?}"))
}

fn regs(tid: RealPid) -> Result<Regs> {
    let mut bytes = [0; Regs::LEN];
    let len = ptrace::get_regset(tid, ptrace::NT_PRSTATUS, &mut bytes)?;
    Regs::from_bytes(bytes.get(..len).unwrap_or(&[]))
}

/// Makes the thread, caught at the exit of a call, unmap the hole of its task.
fn unmap(tid: RealPid, slot: &TaskSlot) -> Result<()> {
    let load = |word: &std::sync::atomic::AtomicU64| word.load(Ordering::Acquire);
    let (hole, len, gadget) = (load(&slot.hole), load(&slot.hole_len), load(&slot.gadget));
    if len == 0 {
        return Err(Error::bug("the restorer did not tell where it is"));
    }
    // A signal on the way would find the wrong registers.
    let mask = ptrace::get_sigmask(tid)?;
    let saved = regs(tid)?;
    ptrace::set_sigmask(tid, ALL_BLOCKED)?;
    let call = saved.for_syscall(gadget, libc::SYS_munmap as u64, [hole, len, 0, 0, 0, 0]);
    ptrace::set_regset(tid, ptrace::NT_PRSTATUS, &call.to_bytes())?;
    let mut stops = 0;
    let mut resend = false;
    while stops < 2 {
        ptrace::syscall(tid, 0)?;
        match next_stop(tid)? {
            Status::Syscall => stops += 1,
            Status::EventStop(_) => {}
            // The one that cannot be blocked: whoever sent it gets his stop once the task runs.
            Status::Signal(libc::SIGSTOP) => resend = true,
            other => return Err(strange(other)),
        }
    }
    let result = regs(tid)?.rax as i64;
    ptrace::set_regset(tid, ptrace::NT_PRSTATUS, &saved.to_bytes())?;
    ptrace::set_sigmask(tid, mask)?;
    if resend {
        kill(Pid::from_raw(tid.0), nix::sys::signal::Signal::SIGSTOP).call("kill")?;
    }
    match result {
        0 => Ok(()),
        e => Err(Error::sys("munmap", -e as i32).during("the restorer's memory")),
    }
}

fn next_stop(tid: RealPid) -> Result<Status> {
    loop {
        let soon = std::time::Instant::now() + Duration::from_millis(200);
        if let Some(status) = wait::until(tid, soon)? {
            return if status.is_end() { Err(Error::new(Kind::TaskDied(tid.0))) } else { Ok(status) };
        }
        interrupt::check()?;
    }
}
