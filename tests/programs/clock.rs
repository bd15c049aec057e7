//! A thread that reads the clocks through the vdso the whole time: it may never see one go backwards, nor
//! fault.
//!
//! # Safety
//!
//! getcpu(2) fills a local.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context, anyhow, bail};
use nix::time::{ClockId, clock_getcpuclockid, clock_gettime};

use crate::kit::{Check, rest};

fn reader(stop: &AtomicBool, rounds: &AtomicU64) -> Check {
    let clocks = [ClockId::CLOCK_MONOTONIC, ClockId::CLOCK_REALTIME, ClockId::CLOCK_BOOTTIME];
    let now = |clock: ClockId| clock_gettime(clock).context("clock_gettime");
    let mut last = [now(clocks[0])?, now(clocks[1])?, now(clocks[2])?];
    while !stop.load(Ordering::Relaxed) {
        for (clock, last) in clocks.iter().zip(&mut last) {
            let read = now(*clock)?;
            if read < *last {
                bail!("{clock:?} went from {last} back to {read}");
            }
            *last = read;
        }
        let mut cpu = 0u32;
        // SAFETY: a valid pointer for the CPU, none for the node.
        unsafe { libc::syscall(libc::SYS_getcpu, &mut cpu, std::ptr::null_mut::<u32>(), 0) };
        // SAFETY: no arguments.
        if unsafe { libc::sched_getcpu() } < 0 {
            bail!("sched_getcpu failed");
        }
        rounds.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// See the module.
pub fn run(_: &[String]) -> Check {
    let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let thread = {
        let (stop, rounds) = (stop.clone(), rounds.clone());
        std::thread::spawn(move || reader(&stop, &rounds))
    };
    while rounds.load(Ordering::Relaxed) < 1000 {
        std::thread::yield_now();
    }
    rest()?;
    let at = rounds.load(Ordering::Relaxed);
    while rounds.load(Ordering::Relaxed) < at + 1000 && !thread.is_finished() {
        std::thread::yield_now();
    }
    stop.store(true, Ordering::Relaxed);
    clock_getcpuclockid(nix::unistd::Pid::this()).context("clock_getcpuclockid")?;
    thread.join().map_err(|_| anyhow!("the reader panicked"))?
}
