//! A program that never stops writing: `writer MIB`. Every pass adds one to a counter in each page, in order, and
//! checks it before: memory that is not of one moment shows as a counter that is not what the pass before left.
//! A second area is filled and dropped again and again, a third is unmapped and mapped anew.
//!
//! # Safety
//!
//! The areas are reached through a raw pointer by the thread that made them, and only by it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context, Result, bail, ensure};

use crate::kit::{Check, number, tell_ready, wait_term};

static STOP: AtomicBool = AtomicBool::new(false);
static PASSES: AtomicU64 = AtomicU64::new(0);

const PAGE: usize = 4096;
/// Bytes of the areas that come and go.
const SMALL: usize = 64 * PAGE;

fn map(len: usize) -> Result<*mut u64> {
    // SAFETY: a fresh anonymous mapping, which nobody else knows.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    ensure!(at != libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
    Ok(at.cast())
}

/// Every page's counter goes from `was` to `now`.
fn pass(area: *mut u64, len: usize, was: u64, now: u64) -> Check {
    for page in 0..len / PAGE {
        // SAFETY: inside the area, aligned to a page.
        let counter = unsafe { area.add(page * PAGE / 8) };
        // SAFETY: as above; volatile, so that each is really read and written in order.
        let is = unsafe { counter.read_volatile() };
        if is != was {
            bail!("page {page} is at {is} in the pass after {was}");
        }
        // SAFETY: as above.
        unsafe { counter.write_volatile(now) };
    }
    Ok(())
}

fn write_on(len: usize) -> Check {
    let (area, dropped) = (map(len)?, map(SMALL)?);
    let mut n = 0;
    while !STOP.load(Ordering::Relaxed) {
        pass(area, len, n, n + 1)?;
        pass(dropped, SMALL, 0, n + 1).context("dropped memory")?;
        pass(dropped, SMALL, n + 1, n + 2).context("dropped memory")?;
        // SAFETY: our own mapping.
        let r = unsafe { libc::madvise(dropped.cast(), SMALL, libc::MADV_DONTNEED) };
        ensure!(r == 0, "madvise: {}", std::io::Error::last_os_error());
        let brief = map(SMALL)?;
        pass(brief, SMALL, 0, n).context("brief memory")?;
        pass(brief, SMALL, n, n + 1).context("brief memory")?;
        // SAFETY: our own mapping, not used any more.
        ensure!(unsafe { libc::munmap(brief.cast(), SMALL) } == 0, "munmap");
        n += 1;
        PASSES.store(n, Ordering::Release);
    }
    Ok(())
}

/// See the module.
pub fn run(args: &[String]) -> Check {
    let len = number(args, 0, 16)? * (1 << 20);
    let writer = std::thread::spawn(move || write_on(len));
    while PASSES.load(Ordering::Acquire) == 0 && !writer.is_finished() {
        std::thread::yield_now();
    }
    tell_ready()?;
    wait_term()?;
    // At least one whole pass after whatever has happened.
    let seen = PASSES.load(Ordering::Acquire);
    while PASSES.load(Ordering::Acquire) < seen + 2 && !writer.is_finished() {
        std::thread::yield_now();
    }
    STOP.store(true, Ordering::Relaxed);
    writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))?
}
