//! One stopped thread and everything a visit could change of it.

use std::{
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use super::{restart, visit::LIMIT};
use crate::{
    arch::{Interrupted, Layout, Regs, Xsave},
    error::{Context, Error, Kind, Result},
    kernel::Kernel,
    procfs::{ProcDir, stat::Stat},
    pstree::RealPid,
    sys::{
        ptrace::{self, NT_PRSTATUS, NT_X86_XSTATE, RseqConfig, SigInfo, SudConfig},
        rseq::{CriticalSection, RSEQ_CS_OFFSET, RSEQ_FLAGS_OFFSET},
        vm, wait,
    },
};

/// How a thread was when it was stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StopKind {
    /// It ran or slept.
    Running,
    /// Its process was stopped by job control, with this signal.
    JobControl(i32),
}

/// A registration for restartable sequences and what was going on in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rseq {
    /// What was registered.
    pub config: RseqConfig,
    /// Address of the critical section's description, 0 for none.
    pub cs: u64,
}

/// A thread that is stopped by us, with its state as it was then.
#[derive(Debug)]
pub struct StoppedThread {
    pub(super) tid: RealPid,
    kind: StopKind,
    regs: Regs,
    xsave: Xsave,
    sigmask: u64,
    /// Unset where the kernel does not tell; then an infection finds out.
    rseq: OnceLock<Option<Rseq>>,
    sud: SudConfig,
    /// It stands at the exit from a system call of ours. Detached from there it has a call of its own restarted, as
    /// from any other stop; a plain PTRACE_CONT need not do that.
    at_exit: AtomicBool,
}

/// Signals of faults: the kernel forces them on a thread that blocks or ignores them, and resets their
/// action for good when it does.
pub(super) const FAULTS: u64 = bit(libc::SIGSEGV)
    | bit(libc::SIGBUS)
    | bit(libc::SIGILL)
    | bit(libc::SIGFPE)
    | bit(libc::SIGSYS)
    | bit(libc::SIGTRAP);

/// The bit of a signal in a mask.
pub(super) const fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

impl StoppedThread {
    /// Reads the state of a thread that has just stopped.
    pub(super) fn capture(tid: RealPid, kind: StopKind, kernel: &Kernel) -> Result<Self> {
        let mut bytes = [0; 16 << 10];
        let n = ptrace::get_regset(tid, NT_PRSTATUS, &mut bytes)?;
        let mut regs = Regs::from_bytes(&bytes[..n])?;
        restart::mend(tid, kind, &mut regs)?;
        Ok(StoppedThread {
            tid,
            kind,
            regs,
            xsave: read_xsave(tid, &mut bytes)?,
            sigmask: ptrace::get_sigmask(tid)?,
            rseq: if kernel.get_rseq_conf { OnceLock::from(read_rseq(tid)?) } else { OnceLock::new() },
            sud: match ptrace::get_syscall_user_dispatch(tid) {
                Ok(sud) => sud,
                // Before Linux 6.4.
                Err(e) if matches!(e.errno(), Some(libc::EIO | libc::EINVAL)) => SudConfig::default(),
                Err(e) => return Err(e),
            },
            at_exit: AtomicBool::new(false),
        })
    }

    /// Takes over a thread that the caller has attached with `PTRACE_O_TRACESYSGOOD` and holds in a
    /// stop. Letting it go stays with the caller.
    pub fn adopt(tid: RealPid, kernel: &Kernel) -> Result<Self> {
        Self::capture(tid, StopKind::Running, kernel)
    }

    /// Its id in our pid namespace.
    pub fn tid(&self) -> RealPid {
        self.tid
    }

    /// How it was found.
    pub fn kind(&self) -> StopKind {
        self.kind
    }

    /// Registers as they were, an interrupted system call still to be restarted by the kernel.
    pub fn regs(&self) -> &Regs {
        &self.regs
    }

    /// Registers for an image: an interrupted call set up to be made again (or to return EINTR), a
    /// restartable sequence aborted. Says what became of the call.
    ///
    /// # Errors
    /// A critical section whose description cannot be read.
    pub fn image_regs(&self) -> Result<(Regs, Interrupted)> {
        let mut regs = self.regs;
        let what = regs.settle();
        if let Some(section) = self.critical_section()?
            && section.contains(regs.rip)
            && !section.survives_signals()
        {
            regs.rip = section.abort;
        }
        Ok((regs, what))
    }

    /// The restartable sequence the thread has announced, whether or not it is inside.
    fn critical_section(&self) -> Result<Option<CriticalSection>> {
        match self.rseq() {
            Some(Rseq { config, cs }) if cs != 0 => {
                let mut bytes = [0; CriticalSection::SIZE];
                let what = || format!("restartable sequence of thread {}", self.tid);
                vm::read(self.tid, cs, &mut bytes).during(what)?;
                let mut section = CriticalSection::from_bytes(&bytes);
                // The area has flags of its own for all sections.
                let mut flags = [0; 4];
                vm::read(self.tid, config.pointer + RSEQ_FLAGS_OFFSET, &mut flags).during(what)?;
                section.flags |= u32::from_ne_bytes(flags);
                Ok(Some(section))
            }
            _ => Ok(None),
        }
    }

    /// x87, SSE and everything newer.
    pub fn xsave(&self) -> &Xsave {
        &self.xsave
    }

    /// Blocked signals.
    pub fn sigmask(&self) -> u64 {
        self.sigmask
    }

    /// Restartable sequences, `None` if not registered. Before Linux 5.13 only an infection can find out:
    /// until then it is `None` too.
    pub fn rseq(&self) -> Option<Rseq> {
        self.rseq.get().copied().flatten()
    }

    /// Fills in what an infection found out, and puts the word back that its finding out has cleared.
    pub(super) fn found_rseq(&self, rseq: Option<Rseq>) -> Result<()> {
        let _ = self.rseq.set(rseq);
        match self.rseq_word() {
            Some((at, cs)) => vm::write(self.tid, at, &cs.to_ne_bytes()),
            None => Ok(()),
        }
    }

    /// Syscall user dispatch; mode 0 is off.
    pub fn syscall_user_dispatch(&self) -> SudConfig {
        self.sud
    }

    /// Pending signals, oldest first: the thread's own, or with `shared` those of its process.
    pub fn pending(&self, shared: bool) -> Result<Vec<SigInfo>> {
        ptrace::peek_siginfo(self.tid, shared)
    }

    /// Address and present value of the rseq word that visits spoil, if there is something in it.
    pub(super) fn rseq_word(&self) -> Option<(u64, u64)> {
        self.rseq().filter(|r| r.cs != 0).map(|r| (r.config.pointer + RSEQ_CS_OFFSET, r.cs))
    }

    /// The general registers as they are now.
    pub(super) fn current_regs(&self) -> Result<Regs> {
        let mut bytes = [0; 512];
        let n = ptrace::get_regset(self.tid, NT_PRSTATUS, &mut bytes)?;
        Regs::from_bytes(&bytes[..n])
    }

    /// Sets the general registers.
    pub(super) fn set_regs(&self, regs: &Regs) -> Result<()> {
        ptrace::set_regset(self.tid, NT_PRSTATUS, &regs.to_bytes())
    }

    /// Puts everything back that a visit changed, in an order that is safe against our own death at any
    /// point: as long as the registers are the blob's, it would still undo the rest itself.
    pub(super) fn put_back(&self, xsave: bool) -> Result<()> {
        let vector =
            if xsave { ptrace::set_regset(self.tid, NT_X86_XSTATE, &self.xsave.regset()) } else { Ok(()) };
        let section = match self.rseq_word() {
            Some((at, cs)) => vm::write(self.tid, at, &cs.to_ne_bytes()),
            None => Ok(()),
        };
        let dispatch = match self.sud.mode {
            0 => Ok(()),
            _ => ptrace::set_syscall_user_dispatch(self.tid, &self.sud),
        };
        // Whatever failed before, these must not stay the blob's.
        self.set_regs(&self.regs)?;
        vector.and(section).and(dispatch)
    }

    /// Changes the registers that the thread will go on with.
    pub fn replace_regs(&mut self, regs: Regs) -> Result<()> {
        self.set_regs(&regs)?;
        self.regs = regs;
        Ok(())
    }

    /// Notes whether it stands at the exit from a system call.
    pub(super) fn stands_at_exit(&self, yes: bool) {
        self.at_exit.store(yes, Ordering::Relaxed);
    }

    /// Brings it to a stop from which it may also be continued.
    pub(super) fn to_event_stop(&self) -> Result<()> {
        if !self.at_exit.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.park(0, Instant::now() + LIMIT)?;
        self.stands_at_exit(false);
        Ok(())
    }

    /// Brings a stopped thread to an event stop without running any of its code. `signal` is what the
    /// present stop would deliver; it goes back into the queue, as does any other that turns up.
    pub(super) fn park(&self, signal: i32, deadline: Instant) -> Result<()> {
        park(self.tid, self.sigmask, signal, deadline)
    }
}

/// As [`StoppedThread::park`], for thread `tid` with signal mask `sigmask`.
pub(super) fn park(tid: RealPid, sigmask: u64, mut signal: i32, deadline: Instant) -> Result<()> {
    let mut masked = false;
    loop {
        // Each time: any other stop makes the kernel forget it.
        ptrace::interrupt(tid)?;
        // A signal that is blocked when the stop ends is queued again, with all that belongs to it.
        if signal != 0 && signal != libc::SIGSTOP && !masked {
            ptrace::set_sigmask(tid, u64::MAX)?;
            masked = true;
        }
        ptrace::cont(tid, signal)?;
        signal = 0;
        match next_stop(tid, deadline)? {
            Some(wait::Status::EventStop(_)) if masked => return ptrace::set_sigmask(tid, sigmask),
            Some(wait::Status::EventStop(_)) => return Ok(()),
            Some(s) if s.is_end() => return Err(Error::new(Kind::TaskDied(tid.0))),
            Some(wait::Status::Signal(s)) => signal = s,
            Some(_) => {}
            None => return Err(stuck(tid, "did not stop again")),
        }
    }
}

/// How often a thread that does not stop is looked at, in case it is ending.
pub(super) const LOOK: Duration = Duration::from_millis(50);

/// The next change of state of an attached thread, `None` at the deadline. The kernel does not report
/// the end of a process's first thread before that of all others, so we look ourselves.
pub(super) fn next_stop(tid: RealPid, deadline: Instant) -> Result<Option<wait::Status>> {
    loop {
        if let Some(status) = wait::until(tid, deadline.min(Instant::now() + LOOK))? {
            return Ok(Some(status));
        }
        // Below task/ the file is about one thread; the process's own sums up over all.
        if matches!(Stat::read(&ProcDir::open(tid)?.thread(tid)?)?.state, b'Z' | b'X') {
            return Err(Error::new(Kind::TaskDied(tid.0)));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
    }
}

/// The error for a thread that does not do what a stopped thread always does.
pub(super) fn stuck(tid: RealPid, what: &str) -> Error {
    Error::host(format!("thread {tid} {what} in time")).remedy("is it frozen by a cgroup?")
}

fn read_xsave(tid: RealPid, buf: &mut [u8]) -> Result<Xsave> {
    let n = ptrace::get_regset(tid, NT_X86_XSTATE, buf)
        .map_err(|e| if e.errno() == Some(libc::ENODEV) { e.remedy("XSAVE is needed") } else { e })?;
    let mut xsave = Xsave::from_bytes(&buf[..n], Layout::host())?;
    if xsave.in_use() & 3 != 3 {
        let mut legacy = [0; 512];
        ptrace::get_regset(tid, ptrace::NT_PRFPREG, &mut legacy)?;
        xsave.fill_legacy(&legacy);
    }
    Ok(xsave)
}

fn read_rseq(tid: RealPid) -> Result<Option<Rseq>> {
    match ptrace::get_rseq_config(tid)? {
        config if config.pointer == 0 => Ok(None),
        config => rseq_at(tid, config).map(Some),
    }
}

/// The area of a thread and what is going on in it now.
pub(super) fn rseq_at(tid: RealPid, config: RseqConfig) -> Result<Rseq> {
    let mut cs = [0; 8];
    match vm::read(tid, config.pointer + RSEQ_CS_OFFSET, &mut cs) {
        Ok(()) => {}
        // The area was unmapped: the kernel will end the thread for it, there is nothing to keep.
        Err(e) if e.errno() == Some(libc::EFAULT) => {}
        Err(e) => return Err(e),
    }
    Ok(Rseq { config, cs: u64::from_ne_bytes(cs) })
}
