//! Ends a blocking wait of the calling thread at a point in time.
//!
//! waitpid(2) has no timeout, and looking again and again costs the processor that the one waited for may need.
//! So a timer sends this thread a signal that does nothing but interrupt. It repeats until the alarm is dropped,
//! in case the first one comes before the wait has begun.
//!
//! # Safety
//! The handler does nothing. The timer is this thread's own; a forked child does not have it and makes another.
#![allow(unsafe_code)]

use std::{
    cell::Cell,
    sync::Once,
    time::{Duration, Instant},
};

/// How soon it repeats.
const AGAIN: Duration = Duration::from_millis(10);

thread_local! {
    /// The process that made the timer, and the timer.
    static TIMER: Cell<Option<(u32, libc::timer_t)>> = const { Cell::new(None) };
}

/// An alarm that is set; dropped, it is off.
#[derive(Debug)]
pub(crate) struct Alarm(libc::timer_t);

/// A signal that nobody else uses: the last but one.
fn signal() -> i32 {
    libc::SIGRTMAX() - 1
}

extern "C" fn interrupt(_: i32) {}

/// Whether the signal is ours to use. Asked once: its action is process-wide.
fn handled() -> bool {
    static ONCE: Once = Once::new();
    static OURS: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
    ONCE.call_once(|| {
        // SAFETY: all fields are integers, for which zero bytes are a value.
        let (mut old, mut new): (libc::sigaction, libc::sigaction) = unsafe { std::mem::zeroed() };
        new.sa_sigaction = interrupt as extern "C" fn(i32) as libc::sighandler_t;
        // SAFETY: valid actions; the handler does nothing. Without SA_RESTART, or it would not interrupt.
        let ours = unsafe {
            libc::sigaction(signal(), std::ptr::null(), &mut old) == 0
                && old.sa_sigaction == libc::SIG_DFL
                && libc::sigaction(signal(), &new, std::ptr::null_mut()) == 0
        };
        OURS.store(ours, std::sync::atomic::Ordering::Release);
    });
    OURS.load(std::sync::atomic::Ordering::Acquire)
}

/// A blocked signal interrupts nothing.
fn is_blocked() -> bool {
    nix::sys::signal::SigSet::thread_get_mask().map_or(true, |mask| {
        // SAFETY: a valid set; the number is one of a signal.
        unsafe { libc::sigismember(mask.as_ref(), signal()) != 0 }
    })
}

fn timer() -> Option<libc::timer_t> {
    let me = std::process::id();
    if let Some((_, timer)) = TIMER.get().filter(|(pid, _)| *pid == me) {
        return Some(timer);
    }
    if !handled() || is_blocked() {
        return None;
    }
    // SAFETY: all fields are integers or pointers, for which zero bytes are a value; the timer is a local.
    let timer = unsafe {
        let mut event: libc::sigevent = std::mem::zeroed();
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal();
        event.sigev_notify_thread_id = libc::gettid();
        let mut timer = std::mem::zeroed();
        if libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer) != 0 {
            return None;
        }
        timer
    };
    TIMER.set(Some((me, timer)));
    Some(timer)
}

fn set(timer: libc::timer_t, first: Duration, again: Duration) -> bool {
    let time = |d: Duration| libc::timespec {
        tv_sec: d.as_secs().min(i64::MAX as u64) as i64,
        tv_nsec: d.subsec_nanos().into(),
    };
    let value = libc::itimerspec { it_value: time(first), it_interval: time(again) };
    // SAFETY: the timer exists as long as its thread; the value is a local.
    unsafe { libc::timer_settime(timer, 0, &value, std::ptr::null_mut()) == 0 }
}

impl Alarm {
    /// Interrupts this thread at `deadline` and from then on; `None` if that cannot be had here.
    pub(crate) fn at(deadline: Instant) -> Option<Alarm> {
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        let timer = timer()?;
        set(timer, left, AGAIN).then_some(Alarm(timer))
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        set(self.0, Duration::ZERO, Duration::ZERO);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blocking_call_is_interrupted_in_time() {
        for _ in 0..2 {
            let start = Instant::now();
            let alarm = Alarm::at(start + Duration::from_millis(20)).unwrap();
            // SAFETY: no memory is involved.
            assert_eq!(unsafe { libc::pause() }, -1);
            drop(alarm);
            let took = start.elapsed();
            assert!(took >= Duration::from_millis(20) && took < Duration::from_secs(10), "{took:?}");
        }
    }
}
