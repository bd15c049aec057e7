//! A futex word, the only thing blobs wait on.
//!
//! Words may lie in memory shared with the engine, so the shared (not the private) operations are
//! used unless the caller says otherwise.
//!
//! # Safety
//! Only addresses of live `AtomicU32` are handed to the kernel.

use core::sync::atomic::{AtomicU32, Ordering};

use crate::syscall::{nr, syscall3, syscall4};

const FUTEX_WAIT: usize = 0;
const FUTEX_WAKE: usize = 1;

/// Blocks until `word` is no longer `value`. Spurious wake-ups and signals are waited out.
pub fn wait_while(word: &AtomicU32, value: u32) {
    while word.load(Ordering::Acquire) == value {
        // SAFETY: the word is alive; no timeout is given. Any error (EAGAIN, EINTR) means: look again.
        let _ = unsafe { syscall4(nr::FUTEX, word.as_ptr() as usize, FUTEX_WAIT, value as usize, 0) };
    }
}

/// Blocks until `word` is `value`.
pub fn wait_until(word: &AtomicU32, value: u32) {
    loop {
        let seen = word.load(Ordering::Acquire);
        if seen == value {
            return;
        }
        wait_while(word, seen);
    }
}

/// Stores `value` and wakes all waiters.
pub fn set_and_wake(word: &AtomicU32, value: u32) {
    word.store(value, Ordering::Release);
    wake_all(word);
}

/// Takes one from `word` and wakes all waiters; gives the new value.
pub fn dec_and_wake(word: &AtomicU32) -> u32 {
    let left = word.fetch_sub(1, Ordering::AcqRel).wrapping_sub(1);
    wake_all(word);
    left
}

/// Wakes all waiters.
pub fn wake_all(word: &AtomicU32) {
    // SAFETY: the word is alive; waking cannot fail on a valid address.
    let _ = unsafe { syscall3(nr::FUTEX, word.as_ptr() as usize, FUTEX_WAKE, i32::MAX as usize) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waiter_wakes_when_the_word_changes() {
        let word = AtomicU32::new(2);
        std::thread::scope(|s| {
            let waiter = s.spawn(|| wait_until(&word, 0));
            assert_eq!(dec_and_wake(&word), 1);
            set_and_wake(&word, 0);
            waiter.join().unwrap();
        });
        wait_while(&word, 1);
    }
}
