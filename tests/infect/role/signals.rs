//! Signals that are handled, queued, sent in masses, ignored and blocked.
//!
//! # Safety
//! Handlers only touch atomics; sets and actions are locals.

use std::{
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use super::{check, ready, wait};

static CAUGHT: AtomicU64 = AtomicU64::new(0);
static LOG: [AtomicU64; 64] = [const { AtomicU64::new(0) }; 64];
static LOGGED: AtomicUsize = AtomicUsize::new(0);

extern "C" fn count(_: i32) {
    CAUGHT.fetch_add(1, Ordering::SeqCst);
}

extern "C" fn log(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid structure.
    let value = unsafe { (*info).si_value() }.sival_ptr as u64;
    LOG[LOGGED.fetch_add(1, Ordering::SeqCst) % LOG.len()].store(value, Ordering::SeqCst);
}

fn set(signal: i32, handler: usize, flags: i32) {
    // SAFETY: the handlers only touch atomics.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler;
        action.sa_flags = flags;
        libc::sigaction(signal, &action, std::ptr::null_mut());
    }
}

/// Handles every signal there is: none is left that could tell of a visit's end.
pub fn handlers() {
    for signal in 1..=64 {
        if ![libc::SIGKILL, libc::SIGSTOP, 32, 33].contains(&signal) {
            set(signal, count as *const () as usize, libc::SA_RESTART);
        }
    }
    ready("");
    wait();
    check(CAUGHT.load(Ordering::SeqCst) == 0, "a handler ran");
}

/// Logs the values that come with a real-time signal.
pub fn queue() {
    set(libc::SIGRTMIN(), log as *const () as usize, libc::SA_SIGINFO | libc::SA_RESTART);
    set(libc::SIGUSR1, count as *const () as usize, libc::SA_RESTART);
    ready("");
    wait();
    let values: Vec<u64> =
        LOG[..LOGGED.load(Ordering::SeqCst)].iter().map(|v| v.load(Ordering::SeqCst)).collect();
    check(values == [1, 2, 3, 4, 5], &format!("signals came as {values:?}"));
    check(CAUGHT.load(Ordering::SeqCst) == 1, "SIGUSR1 was lost or doubled");
}

/// Counts what it gets; the test says how many there were.
pub fn storm() {
    set(libc::SIGRTMIN(), count as *const () as usize, libc::SA_RESTART);
    let spinner = std::thread::spawn(|| {
        while CAUGHT.load(Ordering::Relaxed) < u64::MAX / 2 {
            std::hint::spin_loop();
        }
    });
    ready("");
    let sent: u64 = wait().trim().parse().unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    while CAUGHT.load(Ordering::SeqCst) < sent && Instant::now() < end {
        std::thread::yield_now();
    }
    let caught = CAUGHT.swap(u64::MAX / 2, Ordering::SeqCst);
    spinner.join().unwrap();
    check(caught == sent, &format!("{sent} signals were sent, {caught} came"));
}

/// Handles the signal of a POSIX timer that goes off as often as it can. To set it anew the kernel lets go of the lock
/// for signals, between the look whether to stop and the signal's own stop, in which an earlier request is forgotten.
pub fn timer() {
    set(libc::SIGALRM, count as *const () as usize, libc::SA_RESTART);
    let mut timer: libc::timer_t = std::ptr::null_mut();
    // SAFETY: without an event structure SIGALRM is sent; the id is a local.
    let made = unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, std::ptr::null_mut(), &mut timer) };
    check(made == 0, "there is no timer");
    let every = |tv_nsec| {
        let time = libc::timespec { tv_sec: 0, tv_nsec };
        let value = libc::itimerspec { it_interval: time, it_value: time };
        // SAFETY: the timer is our own, the new value a local; the old one is not asked for.
        unsafe { libc::timer_settime(timer, 0, &value, std::ptr::null_mut()) };
    };
    every(10_000);
    ready("");
    wait();
    every(0);
    check(CAUGHT.load(Ordering::SeqCst) > 0, "the timer never went off");
}

/// Ignores some fault signals and blocks others.
pub fn fault_actions() {
    for signal in [libc::SIGTRAP, libc::SIGILL] {
        set(signal, libc::SIG_IGN, 0);
    }
    // SAFETY: locals of the right type.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGTRAP);
        libc::sigaddset(&mut set, libc::SIGSEGV);
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        // One waits to be delivered.
        libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), libc::SIGSEGV);
    }
    ready("");
    wait();
    // SAFETY: locals of the right type.
    unsafe {
        for signal in [libc::SIGTRAP, libc::SIGILL] {
            let mut action: libc::sigaction = std::mem::zeroed();
            libc::sigaction(signal, std::ptr::null(), &mut action);
            check(action.sa_sigaction == libc::SIG_IGN, &format!("signal {signal} is not ignored any more"));
        }
        let mut pending = std::mem::zeroed();
        libc::sigpending(&mut pending);
        check(libc::sigismember(&pending, libc::SIGSEGV) == 1, "the pending signal is gone");
    }
}
