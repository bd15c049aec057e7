//! A futex word in memory shared with other processes.
//!
//! # Safety
//! Only addresses of live `AtomicU32` are handed to the kernel.
#![allow(unsafe_code)]

use std::{
    ptr::null,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use crate::{
    error::{Error, Result},
    sys::errno,
};

/// Blocks while `word` is `value`, until `deadline` at most. Gives whether the word changed.
///
/// # Errors
/// EINTR when a signal with a handler came, so that the caller can look at its signal flag.
pub fn wait_while(word: &AtomicU32, value: u32, deadline: Instant) -> Result<bool> {
    loop {
        if word.load(Ordering::Acquire) != value {
            return Ok(true);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left == Duration::ZERO {
            return Ok(false);
        }
        let timeout = libc::timespec {
            tv_sec: left.as_secs().min(i64::MAX as u64) as libc::time_t,
            tv_nsec: left.subsec_nanos().into(),
        };
        // SAFETY: the word is alive; the timeout is a local.
        let ret = unsafe {
            libc::syscall(
                libc::SYS_futex,
                word.as_ptr(),
                libc::FUTEX_WAIT,
                value,
                &raw const timeout,
                null::<u32>(),
                0,
            )
        };
        if ret < 0 {
            match errno::last() {
                libc::EAGAIN | libc::ETIMEDOUT => {}
                e => return Err(Error::sys("futex(FUTEX_WAIT)", e)),
            }
        }
    }
}

/// Wakes all who wait on `word`.
pub fn wake_all(word: &AtomicU32) -> Result<u64> {
    // SAFETY: the word is alive.
    let ret = unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
    errno::check(ret, "futex(FUTEX_WAKE)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_end_by_change_or_deadline() {
        let word = AtomicU32::new(1);
        let soon = Instant::now() + Duration::from_millis(10);
        assert!(!wait_while(&word, 1, soon).unwrap());
        assert!(Instant::now() >= soon);
        std::thread::scope(|s| {
            let waiter = s.spawn(|| wait_while(&word, 1, Instant::now() + Duration::from_secs(60)).unwrap());
            word.store(2, Ordering::Release);
            wake_all(&word).unwrap();
            assert!(waiter.join().unwrap());
        });
    }
}
