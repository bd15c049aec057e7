//! One visit: a stopped thread runs foreign code to its end and is put back.
//!
//! Two kinds. A *system call* visit runs one `syscall` instruction that the process already has; its
//! end is the exit stop. A *blob* visit enters the parasite; its end is the instruction after the
//! blob's last call, noticed in one of two ways:
//!
//! - by a signal the blob sends its own thread and the process ignores: one stop in all;
//! - by watching every system call (two stops each): where the process handles every such signal, and
//!   when another signal got in the way.
//!
//! Signals to the thread meanwhile are blocked or go back into the queue, with all their information,
//! and are delivered when the thread is let go. SIGSTOP cannot be blocked: it takes its ordinary course,
//! which stops the thread for job control; resuming it goes on with the visit, and the kernel stops the
//! process again when it is let go.

use std::time::{Duration, Instant};

use super::{
    fault,
    thread::{FAULTS, StoppedThread, bit, next_stop, stuck},
};
use crate::{
    arch::Regs,
    error::{Error, Kind, Result},
    faults,
    sys::{
        ptrace::{self, SudConfig},
        wait::Status,
    },
};

/// Longest time a visit may take. It takes microseconds; this is for machines that are very busy.
pub(super) const LIMIT: Duration = Duration::from_secs(20);
/// The same for one that waits for a disk.
pub(super) const LIMIT_IO: Duration = Duration::from_secs(600);
/// What rax holds at the entry stop of a system call.
const ENOSYS: u64 = -(libc::ENOSYS as i64) as u64;
/// `si_code` of a signal sent by tgkill(2).
const SI_TKILL: i32 = -6;

/// Where a visit ends.
#[derive(Clone, Copy, Debug)]
pub(super) enum End {
    /// After one system call. With a `net` the thread would undo all by itself if we died.
    Syscall { net: bool },
    /// At this address in the blob, noticed by this signal (0: by watching system calls).
    Blob { at: u64, signal: i32, limit: Duration },
}

impl End {
    fn limit(self) -> Duration {
        match self {
            End::Syscall { .. } => LIMIT,
            End::Blob { limit, .. } => limit,
        }
    }
}

/// Runs `thread` from `regs` to `end` and gives the registers it had there. Whatever happens, the thread
/// is its own again afterwards, in a stop from which it can be let go, unless it died.
pub(super) fn run(thread: &StoppedThread, regs: &Regs, end: End) -> Result<Regs> {
    let mut visit = Visit::new(thread, *regs, end);
    match visit.begin().and_then(|()| visit.go_on(None)) {
        Ok(Stop { regs, signal }) => visit.leave(signal).map(|()| regs),
        Err(e) => {
            visit.give_up();
            Err(e)
        }
    }
}

pub(super) struct Visit<'a> {
    thread: &'a StoppedThread,
    end: End,
    /// Registers it starts from.
    start: Regs,
    /// Whether something of the thread may not be its own.
    away: bool,
    /// Whether the blob came to its end, where the vector registers are the thread's.
    whole: bool,
    /// Whether the call of a system call visit has begun.
    entered: bool,
    /// Whether the thread's signal mask is not its own.
    masked: bool,
    /// Whether it stands in a stop as good as an event stop: that of the signal that tells of the end, or the exit from
    /// the system call.
    rests: bool,
    deadline: Instant,
}

/// The end of a visit: the registers there, and a signal that is not ours and must go back.
pub(super) struct Stop {
    regs: Regs,
    signal: i32,
}

impl<'a> Visit<'a> {
    pub(super) fn new(thread: &'a StoppedThread, start: Regs, end: End) -> Visit<'a> {
        let deadline = Instant::now() + end.limit();
        let no = false;
        Visit { thread, end, start, away: no, whole: no, masked: no, rests: no, entered: no, deadline }
    }

    /// The thread.
    pub(super) fn thread(&self) -> &'a StoppedThread {
        self.thread
    }

    /// Sets out.
    pub(super) fn begin(&mut self) -> Result<()> {
        let tid = self.thread.tid;
        self.away = true;
        let regs = &{ self.start };
        if self.thread.syscall_user_dispatch().mode != 0 {
            ptrace::set_syscall_user_dispatch(tid, &SudConfig::default())?;
        }
        match self.end {
            // Nothing undoes this if we die now, so no other request comes in between: the mask is
            // only changed when a signal waits, lest it lose its place in the queue.
            End::Syscall { net: false } => {
                if self.has_deliverable_signal()? {
                    self.mask(u64::MAX)?;
                }
                self.thread.set_regs(regs)?;
            }
            End::Syscall { net: true } => {
                self.thread.set_regs(regs)?;
                faults::point("infect-call-entered")?;
                self.mask(u64::MAX)?;
            }
            // From here on the blob can undo everything by itself, the mask included.
            End::Blob { signal, .. } => {
                self.thread.set_regs(regs)?;
                faults::point("infect-blob-entered")?;
                let end = if signal == 0 { 0 } else { bit(signal) };
                self.mask(!FAULTS & !end)?;
            }
        }
        self.resume(0)?;
        faults::point(self.name("infect-call-running", "infect-blob-running"))
    }

    /// Waits for the next stop.
    pub(super) fn wait(&self) -> Result<Status> {
        let tid = self.thread.tid;
        next_stop(tid, self.deadline)?.ok_or_else(|| stuck(tid, "did not come back from injected code"))
    }

    /// Goes on from a stop, or from a thread that runs, to the end.
    pub(super) fn go_on(&mut self, mut status: Option<Status>) -> Result<Stop> {
        loop {
            let now = match status.take() {
                Some(status) => status,
                None => self.wait()?,
            };
            if let Some(stop) = self.look(now)? {
                self.whole = true;
                faults::point(self.name("infect-call-ended", "infect-blob-ended"))?;
                return Ok(stop);
            }
        }
    }

    /// Whether a stop is that of the blob's own signal, given that the blob has done all but send it: from outside
    /// a signal of the same number makes no difference, since the thread neither blocks nor minds it.
    pub(super) fn is_end(&self, status: Status) -> bool {
        matches!(self.end, End::Blob { signal, .. } if signal != 0 && status == Status::Signal(signal))
    }

    /// Gives the thread back to itself at such an end.
    pub(super) fn end(&mut self) -> Result<()> {
        (self.whole, self.rests) = (true, true);
        faults::point("infect-blob-ended")?;
        self.leave(0)
    }

    /// Gives the thread back at the end that [`Visit::go_on`] found.
    pub(super) fn end_at(&mut self, stop: Stop) -> Result<()> {
        self.leave(stop.signal)
    }

    /// After an error: the thread is put back, if it has not been yet.
    pub(super) fn give_up(&mut self) {
        if self.away
            && let Err(e) = self.recover()
            && !matches!(e.kind(), Kind::TaskDied(_))
        {
            log::error!("thread {}: can't be put back: {e}", self.thread.tid);
        }
    }

    /// Judges a stop: the end, or resumes.
    fn look(&mut self, status: Status) -> Result<Option<Stop>> {
        let tid = self.thread.tid;
        match status {
            Status::Exited(_) | Status::Killed(_) => return Err(Error::new(Kind::TaskDied(tid.0))),
            Status::Syscall => match self.end {
                End::Syscall { .. } if self.entered => {
                    self.rests = true;
                    return Ok(Some(Stop { regs: self.thread.current_regs()?, signal: 0 }));
                }
                End::Syscall { .. } => {
                    self.entered = true;
                    self.resume(0)?;
                }
                End::Blob { at, .. } => {
                    let mut regs = self.thread.current_regs()?;
                    if regs.rip == at && regs.rax != ENOSYS {
                        return Ok(Some(Stop { regs, signal: 0 }));
                    }
                    if regs.rip == at {
                        // Entering the last call: the signal that would tell of the end is not to be sent.
                        regs.rdx = 0;
                        self.thread.set_regs(&regs)?;
                    }
                    self.resume(0)?;
                }
            },
            // Job control, or its end: neither says anything about the visit.
            Status::EventStop(_) | Status::Event(_) | Status::Other(_) => self.resume(0)?,
            Status::Signal(signal) => return self.signal(signal),
        }
        Ok(None)
    }

    fn signal(&mut self, signal: i32) -> Result<Option<Stop>> {
        let tid = self.thread.tid;
        if let End::Blob { at, signal: ours, .. } = self.end
            && signal == ours
        {
            let regs = self.thread.current_regs()?;
            if regs.rip == at {
                // Somebody else's signal of the same number may have swallowed ours. Without room in the queue
                // (RLIMIT_SIGPENDING) ours comes without information, which reads as zeroes.
                let info = ptrace::get_siginfo(tid)?;
                let own = info.code() == SI_TKILL || (info.code() == 0 && info.pid() == 0);
                self.rests = own;
                return Ok(Some(Stop { regs, signal: if own { 0 } else { signal } }));
            }
        }
        if signal == libc::SIGSTOP {
            self.resume(signal)?;
            return Ok(None);
        }
        if self.is_fault(signal)? {
            return Err(fault::report(self.thread, signal)?);
        }
        // A blocked signal goes back into the queue. Ours is now blocked too, so system calls are
        // watched from here on.
        self.mask(!FAULTS | bit(signal))?;
        if let End::Blob { signal: ours, .. } = &mut self.end {
            *ours = 0;
        }
        self.resume(signal)?;
        Ok(None)
    }

    /// Whether the foreign code caused this signal. Positive codes come from the kernel; one that was
    /// pending before, and is let through because a blob visit leaves fault signals unblocked, comes
    /// before the first instruction.
    fn is_fault(&self, signal: i32) -> Result<bool> {
        if FAULTS & bit(signal) == 0 || ptrace::get_siginfo(self.thread.tid)?.code() <= 0 {
            return Ok(false);
        }
        let waited =
            matches!(self.end, End::Blob { .. }) && self.thread.current_regs()?.rip == self.start.rip;
        Ok(!waited)
    }

    fn resume(&self, signal: i32) -> Result<()> {
        match self.end {
            End::Blob { signal: ours, .. } if ours != 0 => ptrace::cont(self.thread.tid, signal),
            _ => ptrace::syscall(self.thread.tid, signal),
        }
    }

    fn mask(&mut self, mask: u64) -> Result<()> {
        self.masked = true;
        ptrace::set_sigmask(self.thread.tid, mask)
    }

    fn name(&self, call: &'static str, blob: &'static str) -> &'static str {
        if matches!(self.end, End::Blob { .. }) { blob } else { call }
    }

    fn has_deliverable_signal(&self) -> Result<bool> {
        let open = |list: Vec<ptrace::SigInfo>| {
            list.iter().any(|i| (1..=64).contains(&i.signo()) && self.thread.sigmask() & bit(i.signo()) == 0)
        };
        Ok(open(self.thread.pending(false)?) || open(self.thread.pending(true)?))
    }

    /// Gives the thread back to itself. `signal` is a stranger's that this stop would deliver.
    fn leave(&mut self, signal: i32) -> Result<()> {
        let blob = matches!(self.end, End::Blob { .. });
        let net = !matches!(self.end, End::Syscall { net: false });
        // The way out of its own restores the mask too, so where there is one the mask comes first;
        // where there is none, the registers come first.
        if net && self.masked {
            ptrace::set_sigmask(self.thread.tid, self.thread.sigmask())?;
        }
        // Between an end that was found and this nothing has run.
        self.thread.put_back(blob && !self.whole)?;
        let undone = faults::point(self.name("infect-call-undone", "infect-blob-undone"));
        if !net && self.masked {
            ptrace::set_sigmask(self.thread.tid, self.thread.sigmask())?;
        }
        // Let go from the stop of our own signal, without the signal or with one that does nothing, the thread goes on
        // as from any other. So it does from the exit of a call: being detached wakes it as a signal would.
        let rests = self.rests && signal == 0;
        if !rests {
            self.thread.park(signal, self.deadline)?;
        }
        self.thread.stands_at_exit(rests && matches!(self.end, End::Syscall { .. }));
        self.away = false;
        undone
    }

    /// After an error: whatever the thread does, it is stopped and put back.
    fn recover(&mut self) -> Result<()> {
        self.deadline = Instant::now() + LIMIT;
        self.whole = false;
        let tid = self.thread.tid;
        // A thread that is stopped takes requests; one that still runs must be stopped first.
        if matches!(self.thread.current_regs(), Err(e) if matches!(e.kind(), Kind::TaskDied(_))) {
            ptrace::interrupt(tid)?;
            match next_stop(tid, self.deadline)? {
                Some(s) if s.is_end() => return Err(Error::new(Kind::TaskDied(tid.0))),
                Some(_) => {}
                None => return Err(stuck(tid, "can't be stopped")),
            }
        }
        self.leave(0)
    }
}
