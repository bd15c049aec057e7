//! A process that checks itself without end, and one that stops and asks it without end, to be killed.
//!
//! # Safety
//! Raw calls on locals of the right types.

use std::{
    io::{Read, Write},
    os::fd::AsRawFd,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use rcriu_engine::{
    Result,
    infect::{Asked, Infected, StoppedTask},
    kernel::Kernel,
    pstree::RealPid,
};

use super::{check, cpu, errno, ready, wait};

/// Rounds of each worker; the test looks whether they go on.
static ROUNDS: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];
/// Sleeps that ended with EINTR: no harm, but to be counted.
static SHORTENED: AtomicU64 = AtomicU64::new(0);

fn worker(index: usize, mut round: impl FnMut() + Send + 'static) {
    std::thread::spawn(move || {
        loop {
            round();
            ROUNDS[index].fetch_add(1, Ordering::Relaxed);
        }
    });
}

pub fn victim() {
    let avx = std::is_x86_feature_detected!("avx");
    worker(0, move || check(!avx || cpu::registers_hold(42, 100_000), "registers changed"));
    worker(1, || {
        let time = libc::timespec { tv_sec: 0, tv_nsec: 1_000_000 };
        // SAFETY: a local.
        match unsafe { libc::clock_nanosleep(libc::CLOCK_MONOTONIC, 0, &time, std::ptr::null_mut()) } {
            0 => {}
            libc::EINTR => drop(SHORTENED.fetch_add(1, Ordering::Relaxed)),
            e => check(false, &format!("sleep gave {e}")),
        }
    });
    let (mut r1, mut w1) = std::io::pipe().unwrap();
    let (mut r2, mut w2) = std::io::pipe().unwrap();
    worker(2, move || {
        let mut b = [0u8; 8];
        r1.read_exact(&mut b).unwrap();
        w2.write_all(&b).unwrap();
    });
    let mut n = 0u64;
    worker(3, move || {
        // A mask of its own, which must stay.
        // SAFETY: locals of the right types.
        unsafe {
            let mut mask: libc::sigset_t = std::mem::zeroed();
            if n == 0 {
                libc::sigaddset(&mut mask, libc::SIGUSR2);
                libc::pthread_sigmask(libc::SIG_SETMASK, &mask, std::ptr::null_mut());
            }
            libc::pthread_sigmask(libc::SIG_SETMASK, std::ptr::null(), &mut mask);
            let blocked = (1..=31).filter(|s| libc::sigismember(&mask, *s) == 1).collect::<Vec<_>>();
            check(blocked == [libc::SIGUSR2], &format!("blocked signals are {blocked:?}"));
        }
        n += 1;
        w1.write_all(&n.to_ne_bytes()).unwrap();
        let mut poll = libc::pollfd { fd: r2.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: a local.
        let polled = unsafe { libc::poll(&mut poll, 1, 60_000) };
        check(polled == 1 || (polled == -1 && errno() == libc::EINTR), "poll failed");
        let mut b = [0u8; 8];
        r2.read_exact(&mut b).unwrap();
        check(u64::from_ne_bytes(b) == n, "an answer was lost");
    });
    // So many that they are asked together.
    for _ in 0..6 {
        std::thread::spawn(|| {
            loop {
                std::thread::sleep(Duration::from_millis(1));
            }
        });
    }
    ready(&format!("{} {}", ROUNDS.as_ptr() as u64, SHORTENED.as_ptr() as u64));
    wait();
}

/// Stops, enters, asks and leaves process `pid` until it is killed itself.
pub fn tracer(pid: i32) {
    let kernel = Kernel::probe().unwrap();
    ready("");
    loop {
        visit(pid, &kernel).unwrap();
    }
}

/// The same once; an error is told to the test.
pub fn tracer_once(pid: i32) {
    let kernel = Kernel::probe().unwrap();
    match visit(pid, &kernel) {
        Ok(()) => ready(""),
        Err(e) => ready(&e.to_string()),
    }
    wait();
}

fn visit(pid: i32, kernel: &Kernel) -> Result<()> {
    let stopped = StoppedTask::seize(RealPid(pid), kernel, Duration::from_secs(10))?;
    let infected = Infected::new(&stopped, kernel)?;
    infected.task_info()?;
    infected.sigactions()?;
    infected.itimers()?;
    for thread in stopped.threads() {
        infected.thread_info(thread)?;
    }
    let ask = |thread| Asked { thread, inspect: RealPid(0), session: false };
    infected.threads_info(&stopped.threads().iter().map(ask).collect::<Vec<_>>())?;
    infected.cure()?;
    stopped.release()
}
