//! A whole process, stopped.

use std::{
    collections::{HashSet, VecDeque},
    time::{Duration, Instant},
};

use super::{
    Ledger,
    thread::{LOOK, StopKind, StoppedThread},
};
use crate::{
    error::{Error, Kind, Result},
    kernel::Kernel,
    procfs::{ProcDir, stat, status::Status},
    pstree::RealPid,
    sys::{
        ptrace::{self, O_SUSPEND_SECCOMP, O_TRACESYSGOOD},
        wait,
    },
};

/// How long threads that were attached but did not stop get on the way out.
const LAST_CHANCE: Duration = Duration::from_secs(1);
/// How long one of several threads that end is waited for before the next.
const TURN: Duration = Duration::from_millis(5);

/// All threads of a process, stopped by us. Dropping it lets them go as they were found.
#[derive(Debug)]
pub struct StoppedTask {
    pid: RealPid,
    dir: ProcDir,
    threads: Vec<StoppedThread>,
    /// Attached, but not (yet) known to be stopped.
    attached: Vec<RealPid>,
    /// Attached, then found to have ended; their ends are still to be taken from the kernel.
    ended: Vec<RealPid>,
    leader_gone: bool,
    /// What was read of it when it had stopped, of a process with a single thread.
    status: Option<Status>,
    ledger: Option<Ledger>,
}

impl StoppedTask {
    /// Stops all threads of process `pid`, in rounds until no new one appears.
    ///
    /// The calling operating system thread becomes the tracer and has to make all further calls.
    ///
    /// # Errors
    /// [`Kind::TaskDied`] if it has ended, or is a zombie. Refusals that name the thread: traced by
    /// somebody else, under seccomp where we may not suspend it, 32-bit code, or not stopping within
    /// `timeout` (a vfork parent, a call into a dead server). A thread that could not be stopped at all
    /// is let go only when the calling thread ends: the kernel has no other way.
    pub fn seize(pid: RealPid, kernel: &Kernel, timeout: Duration) -> Result<StoppedTask> {
        Self::seize_held(pid, kernel, timeout, &mut HashSet::new())
    }

    /// As [`StoppedTask::seize`], with threads in `held` that were attached and asked to stop already (those
    /// of a control group that was frozen for it). The threads of this process are taken out of it.
    pub fn seize_held(
        pid: RealPid,
        kernel: &Kernel,
        timeout: Duration,
        held: &mut HashSet<RealPid>,
    ) -> Result<StoppedTask> {
        let deadline = Instant::now() + timeout;
        let mut task = StoppedTask {
            pid,
            dir: ProcDir::open(pid)?,
            threads: Vec::new(),
            attached: Vec::new(),
            ended: Vec::new(),
            leader_gone: false,
            status: None,
            ledger: None,
        };
        let mut known = HashSet::new();
        loop {
            let new: Vec<_> = task.dir.threads()?.into_iter().filter(|tid| known.insert(*tid)).collect();
            if new.is_empty() {
                break;
            }
            let single = new.len() == 1 && task.threads.is_empty();
            // All of them first: they come to their stops while we wait for the first.
            for tid in new {
                let kernels = tid != pid && stat::is_io_worker(&task.dir, tid);
                if held.remove(&tid) || !kernels && task.attach(tid)? {
                    task.attached.push(tid);
                }
            }
            while let Some(tid) = task.attached.last().copied() {
                let stop = task.wait_for_stop(tid, deadline)?;
                task.attached.pop();
                let Some(kind) = stop else {
                    task.ended.push(tid);
                    continue;
                };
                match StoppedThread::capture(tid, kind, kernel) {
                    Ok(thread) => task.threads.push(thread),
                    Err(e) => {
                        // Attached and stopped: it must be let go.
                        task.detach(tid);
                        return Err(e.during(format!("thread {tid}")));
                    }
                }
            }
            // It has stopped, so that it makes no others any more; whether it has made any meanwhile is a number.
            if single && task.threads.len() == 1 {
                let status = Status::read(&task.dir)?;
                if status.threads == 1 {
                    task.status = Some(status);
                    break;
                }
            }
        }
        // The last attached came first; make it leader first, then as the kernel lists them.
        task.threads.sort_by_key(|t| (t.tid != pid, t.tid));
        task.leader_gone = task.threads.first().is_none_or(|t| t.tid != pid);
        if task.threads.is_empty() {
            return Err(Error::new(Kind::TaskDied(pid.0)));
        }
        Ok(task)
    }

    /// Attaches to a thread and asks it to stop; false if it has ended.
    fn attach(&self, tid: RealPid) -> Result<bool> {
        let attached = match ptrace::seize(tid, O_TRACESYSGOOD | O_SUSPEND_SECCOMP) {
            Err(e) if matches!(e.errno(), Some(libc::EPERM | libc::EINVAL)) => self.attach_plainly(tid, e),
            other => other.map(|()| true),
        };
        match attached {
            Ok(true) => {}
            Ok(false) => return Ok(false),
            Err(e) if matches!(e.kind(), Kind::TaskDied(_)) => return Ok(false),
            Err(e) => return Err(e.during(format!("thread {tid} of task {}", self.pid))),
        }
        match ptrace::interrupt(tid) {
            // It died right after; the wait will tell.
            Err(e) if !matches!(e.kind(), Kind::TaskDied(_)) => Err(e),
            _ => Ok(true),
        }
    }

    /// Without suspending seccomp, which needs CAP_SYS_ADMIN and that we have no filter ourselves.
    /// `refusal` is what the kernel said to the first try; several reasons look alike.
    fn attach_plainly(&self, tid: RealPid, refusal: Error) -> Result<bool> {
        let status = self.dir.thread(tid).and_then(|dir| Status::read(&dir))?;
        if status.is_zombie() {
            return Ok(false);
        }
        if status.tracer != 0 {
            return Err(Error::unsupported(format!("it is traced by {}", name_of(status.tracer)))
                .remedy("end the debugger or strace that is attached to it"));
        }
        if status.seccomp != 0 {
            return Err(refusal.remedy(
                "it is under seccomp, which only a tracer with CAP_SYS_ADMIN and without seccomp can suspend",
            ));
        }
        ptrace::seize(tid, O_TRACESYSGOOD).map(|()| true)
    }

    /// Waits until an attached thread is in an event stop; `None` if it ended instead.
    fn wait_for_stop(&self, tid: RealPid, deadline: Instant) -> Result<Option<StopKind>> {
        loop {
            let soon = deadline.min(Instant::now() + LOOK);
            match wait::until(tid, soon) {
                Ok(Some(wait::Status::EventStop(libc::SIGTRAP))) => return Ok(Some(StopKind::Running)),
                Ok(Some(wait::Status::EventStop(signal))) => return Ok(Some(StopKind::JobControl(signal))),
                // A leader that exited before its threads is never reported while they live.
                Ok(Some(s)) if s.is_end() => return Ok(None),
                // It was on its way before we came.
                Ok(Some(wait::Status::Signal(signal))) => ask_again(tid, signal)?,
                Ok(Some(_)) => ask_again(tid, 0)?,
                Ok(None) => {
                    let Ok(dir) = self.dir.thread(tid) else { return Ok(None) };
                    match Status::read(&dir) {
                        Ok(status) if status.is_zombie() => return Ok(None),
                        Ok(status) if Instant::now() >= deadline => return Err(unstoppable(&dir, &status)),
                        _ => {}
                    }
                }
                Err(e) if matches!(e.kind(), Kind::TaskDied(_)) => return Ok(None),
                Err(e) => return Err(e),
            }
        }
    }

    /// What was read of the process when all of it had stopped, if it was; to be used once, as signals may come.
    pub fn take_status(&mut self) -> Option<Status> {
        self.status.take()
    }

    /// Infections of this process will be entered in `ledger`.
    pub fn watched_by(&mut self, ledger: &Ledger) {
        self.ledger = Some(ledger.clone());
    }

    pub(super) fn ledger(&self) -> Option<&Ledger> {
        self.ledger.as_ref()
    }

    /// Its pid in our pid namespace.
    pub fn pid(&self) -> RealPid {
        self.pid
    }

    /// Its folder in /proc. With a leader that is gone most files there are empty; see
    /// [`StoppedTask::live_dir`].
    pub fn dir(&self) -> &ProcDir {
        &self.dir
    }

    /// The threads, leader first (unless it is gone), then by id. Never empty.
    pub fn threads(&self) -> &[StoppedThread] {
        &self.threads
    }

    /// The thread with this id.
    pub fn thread(&self, tid: RealPid) -> Option<&StoppedThread> {
        match self.threads.first() {
            Some(first) if first.tid == tid => Some(first),
            // Sorted by id behind the leader.
            _ => {
                let rest = self.threads.get(1..)?;
                rest.binary_search_by_key(&tid, |t| t.tid).ok().map(|i| &rest[i])
            }
        }
    }

    /// A thread whose id stands for the process's memory and descriptors: the leader unless it is gone.
    pub fn live(&self) -> RealPid {
        self.threads.first().map_or(self.pid, |t| t.tid)
    }

    /// The folder in /proc of [`StoppedTask::live`].
    pub fn live_dir(&self) -> Result<ProcDir> {
        self.dir.thread(self.live())
    }

    /// Whether the first thread has ended while others live.
    pub fn leader_gone(&self) -> bool {
        self.leader_gone
    }

    /// The signal with which job control had stopped the process, if it had.
    pub fn job_stop(&self) -> Option<i32> {
        self.threads.iter().find_map(|t| match t.kind() {
            StopKind::JobControl(signal) => Some(signal),
            StopKind::Running => None,
        })
    }

    /// Lets all threads go as they were found.
    ///
    /// # Errors
    /// The first one; the rest is let go all the same. A thread that died meanwhile is none.
    pub fn release(mut self) -> Result<()> {
        self.let_go()
    }

    /// Ends the process and waits until all its threads are gone; its parent finds it killed (if that is
    /// us, it is reaped here).
    ///
    /// # Errors
    /// If it does not end in `timeout` (a thread in an uninterruptible call).
    pub fn kill(mut self, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        let pid = nix::unistd::Pid::from_raw(self.pid.0);
        match nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL) {
            Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
            Err(e) => return Err(Error::sys("kill", e as i32).during(format!("task {}", self.pid))),
        }
        self.ended.extend(std::mem::take(&mut self.threads).iter().map(|t| t.tid));
        self.reap(deadline)
    }

    /// Leaves the threads, still stopped, to the caller: each may be continued, and is to be let go by
    /// [`super::let_go`] or detached.
    ///
    /// # Errors
    /// A thread that cannot be brought to such a stop; all are let go.
    pub fn hand_over(mut self) -> Result<Vec<RealPid>> {
        for thread in &self.threads {
            match thread.to_event_stop() {
                // Whoever waits for it is told.
                Err(e) if !matches!(e.kind(), Kind::TaskDied(_)) => return Err(e),
                _ => {}
            }
        }
        Ok(std::mem::take(&mut self.threads).iter().map(|t| t.tid).collect())
    }

    fn let_go(&mut self) -> Result<()> {
        let mut first = Ok(());
        for thread in std::mem::take(&mut self.threads) {
            match ptrace::detach(thread.tid, 0) {
                Err(e) if matches!(e.kind(), Kind::TaskDied(_)) => self.ended.push(thread.tid),
                Err(e) if first.is_ok() => {
                    first = Err(e.during(format!("thread {} of task {}", thread.tid, self.pid)));
                }
                _ => {}
            }
        }
        for tid in std::mem::take(&mut self.attached) {
            // It can only be let go once it has stopped.
            match self.wait_for_stop(tid, Instant::now() + LAST_CHANCE) {
                Ok(Some(_)) => self.detach(tid),
                Ok(None) => self.ended.push(tid),
                Err(e) => log::error!("{e}; it stays attached until we end"),
            }
        }
        if let Err(e) = self.reap(Instant::now() + LAST_CHANCE) {
            log::error!("{e}");
        }
        first
    }

    /// Lets one thread go; for error paths.
    fn detach(&mut self, tid: RealPid) {
        match ptrace::detach(tid, 0) {
            Ok(()) => {}
            Err(e) if matches!(e.kind(), Kind::TaskDied(_)) => self.ended.push(tid),
            Err(e) => log::error!("thread {tid}: {e}"),
        }
    }

    /// Takes the ends of threads from the kernel. Until its tracer has done so a dead thread stays, and
    /// the process's parent is not told of the end of the last.
    fn reap(&mut self, deadline: Instant) -> Result<()> {
        let mut ended = std::mem::take(&mut self.ended);
        // The leader's end is only reported after those of all others.
        ended.sort_by_key(|tid| *tid == self.pid);
        let mut left = VecDeque::from(ended);
        while let Some(tid) = left.pop_front() {
            let now = Instant::now();
            // The last thread of the first process of a pid namespace ends when all others are taken, and nobody knows
            // which that will be.
            let soon = if left.is_empty() { deadline } else { deadline.min(now + TURN) };
            match wait::until(tid, soon) {
                Ok(Some(s)) if s.is_end() => {}
                Ok(Some(_)) => left.push_front(tid),
                Ok(None) if now < deadline => left.push_back(tid),
                // The first thread is gone, but the process lives on.
                Ok(None) if tid == self.pid && self.dir.threads().is_ok_and(|t| t.len() > 1) => {}
                Ok(None) => return Err(Error::host(format!("thread {tid} is killed but does not end"))),
                Err(e) if matches!(e.kind(), Kind::TaskDied(_)) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

impl Drop for StoppedTask {
    fn drop(&mut self) {
        if let Err(e) = self.let_go() {
            log::error!("{e}");
        }
    }
}

/// The process of tracer `tid`, for messages.
fn name_of(tid: i32) -> String {
    let look = || -> Result<String> {
        let dir = ProcDir::open(RealPid(tid))?;
        let pid = Status::read(&dir)?.tgid;
        let comm = String::from_utf8_lossy(dir.read("comm")?.trim_ascii_end()).into_owned();
        Ok(format!("process {pid} ({comm})"))
    };
    look().unwrap_or_else(|_| format!("thread {tid}"))
}

/// Lets a thread go on from another stop than the one we have asked for, which may have made the kernel forget what we
/// asked (ptrace_stop() clears `JOBCTL_TRAP_STOP`). If the thread dies, the next wait tells.
fn ask_again(tid: RealPid, signal: i32) -> Result<()> {
    match ptrace::interrupt(tid).and_then(|()| ptrace::cont(tid, signal)) {
        Err(e) if !matches!(e.kind(), Kind::TaskDied(_)) => Err(e),
        _ => Ok(()),
    }
}

/// The refusal for a thread that does not come to a stop.
fn unstoppable(dir: &ProcDir, status: &Status) -> Error {
    // First word of this file: number of the system call the thread is in.
    let call = dir.read("syscall").unwrap_or_default();
    let number = call.split(|b| *b == b' ').next().unwrap_or_default();
    let (why, remedy) = match (status.state, number) {
        (b'D', b"58" | b"56" | b"435") => {
            ("it waits for a child it made with vfork", "wait until the child runs its program")
        }
        (b'D', _) => {
            ("it is in an uninterruptible system call", "look at /proc/TID/stack for what it waits for")
        }
        _ => ("it does not react", "thaw its cgroup if that is frozen"),
    };
    Error::unsupported(format!("thread {} can't be stopped: {why}", dir.pid())).remedy(remedy)
}
