//! Why an operation must stop early: a signal to us, or the end of the time it was given.
//!
//! A signal handler cannot unwind, and killing ourselves would leave tasks seized: so the handler only stores
//! the number here, and the engine asks [`check`] wherever it may stop. The error then takes the ordinary path
//! and guards put everything back. This is one of the two process-wide variables of the program.

use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::time::Duration;

use crate::error::{Error, Kind, Result};

struct Flag {
    /// Number of the signal, 0 for none.
    signal: AtomicI32,
    /// Deadline in nanoseconds of CLOCK_MONOTONIC, 0 for none.
    deadline: AtomicU64,
}

static FLAG: Flag = Flag { signal: AtomicI32::new(0), deadline: AtomicU64::new(0) };

/// Asks for a stop because of `signal`. Async-signal-safe; the first signal stays.
pub fn raise(signal: i32) {
    let _ = FLAG.signal.compare_exchange(0, signal, Ordering::Relaxed, Ordering::Relaxed);
}

/// The whole operation may take `limit` from now on; `None` lifts the limit.
pub fn set_deadline(limit: Option<Duration>) {
    let at = limit
        .map_or(0, |limit| u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX).saturating_add(now()).max(1));
    FLAG.deadline.store(at, Ordering::Relaxed);
}

/// Forgets signal and deadline: for a server that goes on to its next request.
pub fn reset() {
    FLAG.signal.store(0, Ordering::Relaxed);
    FLAG.deadline.store(0, Ordering::Relaxed);
}

/// Fails with [`Kind::Interrupted`] or [`Kind::TimedOut`] if the operation must stop.
///
/// Cheap enough for every task and every chunk of memory. Not to be asked on the way back (in guards).
pub fn check() -> Result<()> {
    match FLAG.signal.load(Ordering::Relaxed) {
        0 => {}
        signal => return Err(Error::new(Kind::Interrupted(signal))),
    }
    match FLAG.deadline.load(Ordering::Relaxed) {
        0 => Ok(()),
        at if now() < at => Ok(()),
        _ => Err(Error::new(Kind::TimedOut)),
    }
}

/// Time left before the deadline, at most `at_most`: what a blocking wait may be given.
pub fn remaining(at_most: Duration) -> Duration {
    match FLAG.deadline.load(Ordering::Relaxed) {
        0 => at_most,
        at => at_most.min(Duration::from_nanos(at.saturating_sub(now()))),
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

    #[test]
    fn signal_and_deadline_stop_the_operation_until_reset() {
        // One test for both: the flag belongs to the whole process.
        reset();
        check().unwrap();
        set_deadline(Some(Duration::from_secs(3600)));
        check().unwrap();
        assert!(remaining(Duration::from_secs(7200)) <= Duration::from_secs(3600));
        set_deadline(Some(Duration::ZERO));
        assert_eq!(check().unwrap_err().kind(), &Kind::TimedOut);
        raise(15);
        raise(2);
        assert_eq!(check().unwrap_err().kind(), &Kind::Interrupted(15));
        reset();
        check().unwrap();
        assert_eq!(remaining(Duration::from_secs(5)), Duration::from_secs(5));
    }
}
