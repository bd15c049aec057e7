//! Waiting for threads that we trace, with a deadline.
//!
//! nix's waitpid cannot be used: it fails on a stop for a real-time signal. The kernel offers no wait
//! with a timeout: an alarm ends it.
//!
//! # Safety
//! waitpid(2) writes to one local integer.
#![allow(unsafe_code)]

use std::time::{Duration, Instant};

use crate::{
    error::{Error, Kind, Result},
    pstree::RealPid,
    sys::alarm::Alarm,
    sys::errno,
    sys::ptrace::EVENT_STOP,
};

/// What a traced thread did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    /// Ended with this exit code.
    Exited(i32),
    /// Ended by this signal.
    Killed(i32),
    /// Stopped before a signal is delivered.
    Signal(i32),
    /// Stopped at entry to or exit from a system call.
    Syscall,
    /// Stopped for `PTRACE_EVENT_STOP`; the signal is SIGTRAP, or the stop signal of a process that is
    /// stopped by job control.
    EventStop(i32),
    /// Stopped for another `PTRACE_EVENT_*`.
    Event(i32),
    /// Neither (a continued child).
    Other(i32),
}

impl Status {
    /// Decodes the integer of waitpid(2) for a tracee attached with `PTRACE_O_TRACESYSGOOD`.
    pub fn from_raw(raw: i32) -> Self {
        if libc::WIFEXITED(raw) {
            return Status::Exited(libc::WEXITSTATUS(raw));
        }
        if libc::WIFSIGNALED(raw) {
            return Status::Killed(libc::WTERMSIG(raw));
        }
        if !libc::WIFSTOPPED(raw) {
            return Status::Other(raw);
        }
        let signal = libc::WSTOPSIG(raw);
        match raw >> 16 {
            0 if signal == libc::SIGTRAP | 0x80 => Status::Syscall,
            0 => Status::Signal(signal),
            EVENT_STOP => Status::EventStop(signal),
            event => Status::Event(event),
        }
    }

    /// Whether the thread is gone.
    pub fn is_end(self) -> bool {
        matches!(self, Status::Exited(_) | Status::Killed(_))
    }
}

/// The signal before which the tracee `tid` stands still, if it does, and if nobody has asked for that stop yet; it is
/// left to be asked for. `None` for a process that is no tracee or child of ours.
///
/// # Errors
/// Those of waitid(2).
pub fn signal_before(tid: RealPid) -> Result<Option<i32>> {
    // SAFETY: all fields are integers, for which zero bytes are a value.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let how = libc::WSTOPPED | libc::WNOHANG | libc::WNOWAIT | libc::__WALL;
    // SAFETY: info is a local of the right type.
    if unsafe { libc::waitid(libc::P_PID, tid.0.cast_unsigned(), &raw mut info, how) } < 0 {
        return match errno::last() {
            libc::ECHILD | libc::EINTR => Ok(None),
            e => Err(Error::sys("waitid", e)),
        };
    }
    // SAFETY: waitid fills these in, or leaves zeroes where there is nothing to tell.
    let (code, status) = unsafe { (info.si_code, info.si_status()) };
    // Stops for events and calls have more bits than the number of a signal.
    Ok((code == libc::CLD_TRAPPED && (1..=64).contains(&status)).then_some(status))
}

/// The next change of state of `tid` if there is one already.
///
/// # Errors
/// ECHILD becomes [`Kind::TaskDied`]: a tracee we do not wait for elsewhere can only vanish by being
/// reaped as part of an exec or by its group's end.
pub fn poll(tid: RealPid) -> Result<Option<Status>> {
    let mut raw = 0;
    loop {
        // SAFETY: raw is a local of the right type.
        let ret = unsafe { libc::waitpid(tid.0, &mut raw, libc::__WALL | libc::WNOHANG) };
        match ret {
            0 => return Ok(None),
            r if r > 0 => return Ok(Some(Status::from_raw(raw))),
            _ => match errno::last() {
                libc::EINTR => {}
                libc::ECHILD => return Err(Error::new(Kind::TaskDied(tid.0))),
                e => return Err(Error::sys("waitpid", e)),
            },
        }
    }
}

/// Waits for the end of a child that was killed.
pub fn end(pid: RealPid) {
    // SAFETY: a null status is not written.
    while unsafe { libc::waitpid(pid.0, std::ptr::null_mut(), libc::__WALL) } == -1
        && errno::last() == libc::EINTR
    {}
}

/// The next change of state of `tid`, or `None` when `deadline` passes first.
pub fn until(tid: RealPid, deadline: Instant) -> Result<Option<Status>> {
    /// Most injected calls take no longer than so many looks.
    const LOOKS: u32 = 8;
    for _ in 0..LOOKS {
        if let Some(status) = poll(tid)? {
            return Ok(Some(status));
        }
        std::hint::spin_loop();
    }
    let Some(_alarm) = Alarm::at(deadline) else { return nap_until(tid, deadline) };
    let mut raw = 0;
    loop {
        // SAFETY: raw is a local of the right type.
        match unsafe { libc::waitpid(tid.0, &mut raw, libc::__WALL) } {
            r if r > 0 => return Ok(Some(Status::from_raw(raw))),
            _ => match errno::last() {
                libc::EINTR if Instant::now() >= deadline => return poll(tid),
                libc::EINTR => {}
                libc::ECHILD => return Err(Error::new(Kind::TaskDied(tid.0))),
                e => return Err(Error::sys("waitpid", e)),
            },
        }
    }
}

/// The next change of state of any child or tracee; `None` now and then, so that the caller can look after other
/// things, or if there are none.
pub fn next() -> Result<Option<(RealPid, Status)>> {
    let alarm = Alarm::at(Instant::now() + Duration::from_millis(5));
    let options = if alarm.is_some() { libc::__WALL } else { libc::__WALL | libc::WNOHANG };
    let mut raw = 0;
    // SAFETY: raw is a local of the right type.
    match unsafe { libc::waitpid(-1, &mut raw, options) } {
        pid if pid > 0 => return Ok(Some((RealPid(pid), Status::from_raw(raw)))),
        0 => std::thread::sleep(Duration::from_micros(50)),
        _ => match errno::last() {
            libc::EINTR => {}
            libc::ECHILD => std::thread::sleep(Duration::from_millis(1)),
            e => return Err(Error::sys("waitpid", e)),
        },
    }
    Ok(None)
}

/// [`until`] where no alarm can be had: looks seldom and more seldom.
fn nap_until(tid: RealPid, deadline: Instant) -> Result<Option<Status>> {
    const LONGEST: Duration = Duration::from_millis(2);
    let mut nap = Duration::from_micros(20);
    loop {
        if let Some(status) = poll(tid)? {
            return Ok(Some(status));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        std::thread::sleep(nap.min(left));
        nap = (nap * 2).min(LONGEST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_statuses_are_told_apart() {
        assert_eq!(Status::from_raw(3 << 8), Status::Exited(3));
        assert_eq!(Status::from_raw(9), Status::Killed(9));
        assert_eq!(Status::from_raw(0x7f | libc::SIGTRAP << 8), Status::Signal(libc::SIGTRAP));
        // A real-time signal, which nix refuses.
        assert_eq!(Status::from_raw(0x7f | 42 << 8), Status::Signal(42));
        assert_eq!(Status::from_raw(0x7f | (libc::SIGTRAP | 0x80) << 8), Status::Syscall);
        assert_eq!(
            Status::from_raw(0x7f | libc::SIGSTOP << 8 | EVENT_STOP << 16),
            Status::EventStop(libc::SIGSTOP)
        );
        assert_eq!(Status::from_raw(0x7f | libc::SIGTRAP << 8 | 3 << 16), Status::Event(3));
        assert_eq!(Status::from_raw(0xffff), Status::Other(0xffff));
    }
}
