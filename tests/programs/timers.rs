//! Interval timers and POSIX timers: armed, periodic, disarmed, expired but not delivered.
//!
//! # Safety
//!
//! Timer calls get structures that outlive them.

use anyhow::{Context, bail};
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};

use crate::kit::{Check, rest, same, skip, sys};

fn itimer(which: i32) -> anyhow::Result<libc::itimerval> {
    // SAFETY: an all-zero itimerval is a valid value, filled by the call.
    let mut value: libc::itimerval = unsafe { std::mem::zeroed() };
    // SAFETY: `value` outlives the call.
    sys("getitimer", unsafe { libc::getitimer(which as _, &mut value) })?;
    Ok(value)
}

fn span(sec: i64) -> libc::timeval {
    libc::timeval { tv_sec: sec, tv_usec: 250_000 }
}

/// The three interval timers, far from expiry, with and without an interval.
pub fn run(_: &[String]) -> Check {
    let set = [(libc::ITIMER_REAL, 900, 100), (libc::ITIMER_VIRTUAL, 800, 0), (libc::ITIMER_PROF, 700, 300)];
    for (which, value, interval) in set {
        let interval = if interval == 0 { libc::timeval { tv_sec: 0, tv_usec: 0 } } else { span(interval) };
        let timer = libc::itimerval { it_value: span(value), it_interval: interval };
        // SAFETY: `timer` outlives the call.
        sys("setitimer", unsafe { libc::setitimer(which as _, &timer, std::ptr::null_mut()) })?;
    }
    rest()?;
    for (which, value, interval) in set {
        let now = itimer(which)?;
        same("interval", now.it_interval.tv_sec, interval)?;
        // A dump must not start the time anew nor let it run out.
        if !(value - 120..=value).contains(&now.it_value.tv_sec) {
            bail!("timer {which} has {} s left of {value}", now.it_value.tv_sec);
        }
    }
    Ok(())
}

struct Posix {
    id: i32,
    clock: i32,
    value: i64,
    interval: i64,
    signal: i32,
}

fn create(clock: i32, notify: i32, signal: i32, value: usize) -> anyhow::Result<i32> {
    // SAFETY: an all-zero sigevent is a valid value.
    let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
    event.sigev_notify = notify;
    event.sigev_signo = signal;
    event.sigev_value.sival_ptr = value as *mut libc::c_void;
    event.sigev_notify_thread_id = nix::unistd::gettid().as_raw();
    let mut id = -1i32;
    // SAFETY: the raw call is used because the kernel's id is what a restore must keep; both outlive it.
    sys("timer_create", unsafe { libc::syscall(libc::SYS_timer_create, clock, &mut event, &mut id) })?;
    Ok(id)
}

fn arm(id: i32, value: (i64, i64), interval: i64) -> Check {
    let new = libc::itimerspec {
        it_value: libc::timespec { tv_sec: value.0, tv_nsec: value.1 },
        it_interval: libc::timespec { tv_sec: interval, tv_nsec: 0 },
    };
    let none = std::ptr::null_mut::<libc::itimerspec>();
    // SAFETY: `new` outlives the call.
    sys("timer_settime", unsafe { libc::syscall(libc::SYS_timer_settime, id, 0, &new, none) }).map(drop)
}

/// POSIX timers with gaps between their ids, each way of notification, one with an overrun.
pub fn posix(_: &[String]) -> Check {
    let rt = libc::SIGRTMIN();
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&SigSet::all()), None).context("sigprocmask")?;
    let mut timers = Vec::new();
    for (i, (clock, notify, value, interval)) in [
        (libc::CLOCK_MONOTONIC, libc::SIGEV_SIGNAL, 900, 50),
        (libc::CLOCK_REALTIME, libc::SIGEV_NONE, 800, 0),
        (libc::CLOCK_MONOTONIC, libc::SIGEV_THREAD_ID, 700, 60),
        (libc::CLOCK_BOOTTIME, libc::SIGEV_SIGNAL, 0, 0),
    ]
    .into_iter()
    .enumerate()
    {
        let gap = create(clock, libc::SIGEV_NONE, 0, 0)?;
        let signal = rt + i as i32;
        let id = create(clock, notify, signal, 0x1000 + i)?;
        // SAFETY: an id of ours.
        sys("timer_delete", unsafe { libc::syscall(libc::SYS_timer_delete, gap) })?;
        arm(id, (value, 0), interval)?;
        timers.push(Posix { id, clock, value, interval, signal });
    }
    rest()?;
    for timer in &timers {
        // SAFETY: an all-zero itimerspec is a valid value, filled by the call.
        let mut now: libc::itimerspec = unsafe { std::mem::zeroed() };
        // SAFETY: `now` outlives the call.
        let r = unsafe { libc::syscall(libc::SYS_timer_gettime, timer.id, &mut now) };
        sys("timer_gettime", r).with_context(|| format!("timer {} of clock {}", timer.id, timer.clock))?;
        same("interval", now.it_interval.tv_sec, timer.interval)?;
        if !((timer.value - 120).max(0)..=timer.value).contains(&now.it_value.tv_sec) {
            bail!("timer {} has {} s left of {}", timer.id, now.it_value.tv_sec, timer.value);
        }
    }
    // They still fire, with the signal and value they were made with.
    let first = timers.first().ok_or_else(|| skip("no timer"))?;
    arm(first.id, (0, 1_000_000), 0)?;
    let mut one: libc::sigset_t = *SigSet::empty().as_ref();
    // SAFETY: a set of our own.
    unsafe { libc::sigaddset(&mut one, first.signal) };
    // SAFETY: an all-zero siginfo is a valid value, filled by the call.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: both outlive the call.
    while unsafe { libc::sigwaitinfo(&one, &mut info) } < 0 {}
    // SAFETY: a timer's signal carries a value.
    same("value of the timer's signal", unsafe { info.si_value().sival_ptr } as usize, 0x1000)
}
