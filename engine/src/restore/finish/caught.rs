//! A thread at the exit of its `rt_sigreturn`, made to do system calls before it goes on.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use restorer::TaskSlot;

use crate::arch::Regs;
use crate::error::{Error, Kind, Result, SysContext};
use crate::interrupt;
use crate::pstree::RealPid;
use crate::sys::ptrace;
use crate::sys::vm::MemFile;
use crate::sys::wait::{self, Status};

/// Signal mask with everything blocked.
pub(super) const ALL_BLOCKED: u64 = u64::MAX;

/// A thread with its own registers and mask saved; [`Caught::done`] puts them back.
#[derive(Debug)]
pub struct Caught {
    tid: RealPid,
    regs: Regs,
    mask: u64,
    /// SIGSTOP came and was swallowed.
    stop: bool,
    gadget: u64,
    hole: u64,
    hole_len: u64,
}

impl Caught {
    /// Of a thread whose task has the restorer where `slot` says.
    pub fn new(tid: RealPid, slot: &TaskSlot) -> Result<Caught> {
        let load = |word: &std::sync::atomic::AtomicU64| word.load(Ordering::Acquire);
        let (hole, hole_len, gadget) = (load(&slot.hole), load(&slot.hole_len), load(&slot.gadget));
        if hole_len == 0 {
            return Err(Error::bug("the restorer did not tell where it is"));
        }
        let caught = Caught {
            tid,
            regs: regs(tid)?,
            mask: ptrace::get_sigmask(tid)?,
            stop: false,
            gadget,
            hole,
            hole_len,
        };
        // A signal on the way would find the wrong registers.
        ptrace::set_sigmask(tid, ALL_BLOCKED)?;
        Ok(caught)
    }

    /// Makes system call `nr`; its negative results are errors of `name`.
    pub fn call(&mut self, name: &'static str, nr: i64, args: [u64; 6]) -> Result<u64> {
        self.set_out(nr, args)?;
        self.enter()?;
        self.come_back(name)
    }

    /// Sends it to system call `nr`.
    fn set_out(&self, nr: i64, args: [u64; 6]) -> Result<()> {
        let call = self.regs.for_syscall(self.gadget, nr as u64, args);
        ptrace::set_regset(self.tid, ptrace::NT_PRSTATUS, &call.to_bytes())?;
        ptrace::syscall(self.tid, 0)
    }

    /// Waits until it is there, and has it go in.
    pub fn enter(&mut self) -> Result<()> {
        self.next_call_stop()?;
        ptrace::syscall(self.tid, 0)
    }

    /// Waits for the result.
    fn come_back(&mut self, name: &'static str) -> Result<u64> {
        self.next_call_stop()?;
        match regs(self.tid)?.rax as i64 {
            e @ -4095..=-1 => Err(Error::sys(name, -e as i32)),
            result => Ok(result as u64),
        }
    }

    fn next_call_stop(&mut self) -> Result<()> {
        loop {
            match next_stop(self.tid)? {
                Status::Syscall => return Ok(()),
                Status::EventStop(_) => {}
                // The one that cannot be blocked: whoever sent it gets his stop once the task runs.
                Status::Signal(libc::SIGSTOP) => self.stop = true,
                other => return Err(strange(other)),
            }
            ptrace::syscall(self.tid, 0)?;
        }
    }

    /// Puts `data` where system calls can read it; gives the address. Overwrites what was put before.
    ///
    /// Precondition: the hole is still there. Its beginning is code that has been run for the last time.
    pub fn put(&self, data: &[u8]) -> Result<u64> {
        let end = self.hole + data.len() as u64;
        let at = if end <= self.gadget { self.hole } else { self.gadget + 16 };
        MemFile::open(self.tid)?.write(at, data)?;
        Ok(at)
    }

    /// Takes the restorer's memory away.
    pub fn unmap(&mut self) -> Result<()> {
        self.begin_unmap()?;
        self.enter()?;
        self.end_unmap()
    }

    /// The same in steps, so that many tasks can be at it at once: [`Caught::enter`] and [`Caught::end_unmap`] follow.
    pub fn begin_unmap(&self) -> Result<()> {
        self.set_out(libc::SYS_munmap, [self.hole, self.hole_len, 0, 0, 0, 0])
    }

    /// The last step.
    pub fn end_unmap(&mut self) -> Result<()> {
        self.come_back("munmap").map(drop).map_err(|e| e.during("the restorer's memory"))
    }

    /// Gives the thread its registers and mask back.
    pub fn done(self) -> Result<()> {
        ptrace::set_regset(self.tid, ptrace::NT_PRSTATUS, &self.regs.to_bytes())?;
        ptrace::set_sigmask(self.tid, self.mask)?;
        if self.stop {
            kill(Pid::from_raw(self.tid.0), Signal::SIGSTOP).call("kill")?;
        }
        Ok(())
    }
}

/// General registers of a stopped thread.
pub fn regs(tid: RealPid) -> Result<Regs> {
    let mut bytes = [0; Regs::LEN];
    let len = ptrace::get_regset(tid, ptrace::NT_PRSTATUS, &mut bytes)?;
    Regs::from_bytes(bytes.get(..len).unwrap_or(&[]))
}

/// The error for a stop nobody expects.
pub fn strange(status: Status) -> Error {
    Error::host(format!("it stopped unexpectedly: {status:?}"))
}

fn next_stop(tid: RealPid) -> Result<Status> {
    loop {
        let soon = Instant::now() + Duration::from_millis(200);
        if let Some(status) = wait::until(tid, soon)? {
            return if status.is_end() { Err(Error::new(Kind::TaskDied(tid.0))) } else { Ok(status) };
        }
        interrupt::check()?;
    }
}
