//! Why an operation must stop early: a signal to us, or the end of the time it was given.
//!
//! A signal handler cannot unwind, and killing ourselves would leave tasks seized: so the handler only stores
//! the number here, and the engine asks [`check`] wherever it may stop. The error then takes the ordinary path
//! and guards put everything back. This is one of the two process-wide variables of the program.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::error::{Error, Kind, Result};

static FLAG: Flag = Flag::new();

/// Asks for a stop because of `signal`. Async-signal-safe; the first signal stays.
pub fn raise(signal: i32) {
    FLAG.raise(signal);
}

/// The whole operation may take `limit` from now on; `None` lifts the limit.
pub fn set_deadline(limit: Option<Duration>) {
    FLAG.set_deadline(limit);
}

/// Forgets signal and deadline: for a server that goes on to its next request.
pub fn reset() {
    FLAG.reset();
}

/// Fails with [`Kind::Interrupted`] or [`Kind::TimedOut`] if the operation must stop.
///
/// Cheap enough for every task and every chunk of memory. Not to be asked on the way back (in guards).
pub fn check() -> Result<()> {
    FLAG.check()
}

/// Time left before the deadline, at most `at_most`: what a blocking wait may be given.
pub fn remaining(at_most: Duration) -> Duration {
    FLAG.remaining(at_most)
}

/// Waits until `fd` has something to read or its other end is gone, or the operation must stop.
///
/// # Errors
/// As [`check`]; poll(2) itself.
pub fn wait_readable(fd: BorrowedFd<'_>) -> Result<()> {
    FLAG.wait_readable(fd)
}

struct Flag {
    /// Number of the signal, 0 for none.
    signal: AtomicI32,
    /// Deadline in nanoseconds of CLOCK_MONOTONIC, 0 for none.
    deadline: AtomicU64,
}

impl Flag {
    const fn new() -> Flag {
        Flag { signal: AtomicI32::new(0), deadline: AtomicU64::new(0) }
    }

    fn raise(&self, signal: i32) {
        let _ = self.signal.compare_exchange(0, signal, Ordering::Relaxed, Ordering::Relaxed);
    }

    fn set_deadline(&self, limit: Option<Duration>) {
        let at = limit.map_or(0, |limit| {
            u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX).saturating_add(now()).max(1)
        });
        self.deadline.store(at, Ordering::Relaxed);
    }

    fn reset(&self) {
        self.signal.store(0, Ordering::Relaxed);
        self.deadline.store(0, Ordering::Relaxed);
    }

    fn check(&self) -> Result<()> {
        match self.signal.load(Ordering::Relaxed) {
            0 => {}
            signal => return Err(Error::new(Kind::Interrupted(signal))),
        }
        match self.deadline.load(Ordering::Relaxed) {
            0 => Ok(()),
            at if now() < at => Ok(()),
            _ => Err(Error::new(Kind::TimedOut)),
        }
    }

    fn remaining(&self, at_most: Duration) -> Duration {
        match self.deadline.load(Ordering::Relaxed) {
            0 => at_most,
            at => at_most.min(Duration::from_nanos(at.saturating_sub(now()))),
        }
    }

    fn wait_readable(&self, fd: BorrowedFd<'_>) -> Result<()> {
        loop {
            self.check()?;
            // A signal between the check and the call is noticed after this time.
            let nap = self.remaining(Duration::from_secs(1)).as_millis() as u16;
            let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::from(nap)) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(e) => return Err(Error::sys("poll", e as i32)),
            }
        }
    }
}

fn now() -> u64 {
    let t = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .unwrap_or(nix::sys::time::TimeSpec::new(0, 0));
    t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn signal_and_deadline_stop_the_operation_until_reset() {
        let flag = Flag::new();
        flag.check().unwrap();
        flag.set_deadline(Some(Duration::from_secs(3600)));
        flag.check().unwrap();
        assert!(flag.remaining(Duration::from_secs(7200)) <= Duration::from_secs(3600));
        flag.set_deadline(Some(Duration::ZERO));
        assert_eq!(flag.check().unwrap_err().kind(), &Kind::TimedOut);
        flag.raise(15);
        flag.raise(2);
        assert_eq!(flag.check().unwrap_err().kind(), &Kind::Interrupted(15));
        flag.reset();
        flag.check().unwrap();
        assert_eq!(flag.remaining(Duration::from_secs(5)), Duration::from_secs(5));
    }

    #[test]
    fn waiting_ends_with_data_the_other_end_or_the_deadline() {
        let flag = Flag::new();
        let (reader, writer) = std::io::pipe().unwrap();
        flag.set_deadline(Some(Duration::from_millis(5)));
        assert_eq!(flag.wait_readable(reader.as_fd()).unwrap_err().kind(), &Kind::TimedOut);
        flag.set_deadline(None);
        drop(writer);
        flag.wait_readable(reader.as_fd()).unwrap();
    }
}
