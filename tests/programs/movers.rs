//! Threads that never stop changing large memory in every way there is: `movers MIB THREADS [UID]`. Each has an area of its
//! own and knows what every block of it holds: blocks are written, dropped, replaced by new mappings, moved away
//! and back, looked at by a child and by a short-lived thread. Memory that is not of one moment shows as a block
//! that holds something else. At the end it tells the longest time between two writes of a thread.
//!
//! # Safety
//!
//! Areas are reached through raw pointers by the thread that made them; children and short-lived threads only read
//! them while it waits for them. A child makes no call but reads and _exit.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Gid, Pid, Uid, fork, setresgid, setresuid};

use crate::kit::{Check, number, tell_ready, wait_term};

static STOP: AtomicBool = AtomicBool::new(false);
static PASSES: AtomicU64 = AtomicU64::new(0);
/// Longest time between two writes, in microseconds.
static PAUSE: AtomicU64 = AtomicU64::new(0);

const PAGE: usize = 4096;
const BLOCK: usize = 1 << 20;
const PROT: i32 = libc::PROT_READ | libc::PROT_WRITE;
const ANON: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

#[derive(Clone, Copy)]
struct Block(*mut u8);

// SAFETY: given to one thread that reads while the owner waits for it.
unsafe impl Send for Block {}

impl Block {
    fn word(self, page: usize) -> *mut u64 {
        // SAFETY: inside the block.
        unsafe { self.0.add(page * PAGE).cast() }
    }

    /// The page that does not hold `value`.
    fn wrong(self, value: u64) -> Option<(usize, u64)> {
        // SAFETY: mapped and aligned; volatile, so that it is really read.
        (0..BLOCK / PAGE).map(|p| (p, unsafe { self.word(p).read_volatile() })).find(|(_, is)| *is != value)
    }

    fn check(self, value: u64) -> Check {
        match self.wrong(value) {
            None => Ok(()),
            Some((page, is)) => bail!("page {page} of a block holds {is} instead of {value}"),
        }
    }

    fn write(self, was: u64, now: u64, last: &mut Instant) -> Check {
        for page in 0..BLOCK / PAGE {
            // SAFETY: as above.
            let is = unsafe { self.word(page).read_volatile() };
            ensure!(is == was, "page {page} of a block holds {is} instead of {was}");
            // SAFETY: as above; this thread alone writes here.
            unsafe { self.word(page).write_volatile(now) };
            let time = Instant::now();
            PAUSE.fetch_max((time - *last).as_micros() as u64, Ordering::Relaxed);
            *last = time;
        }
        Ok(())
    }
}

fn map(at: *mut u8, len: usize, flags: i32) -> Result<Block> {
    // SAFETY: a new mapping, or one over a block that is this thread's own.
    let is = unsafe { libc::mmap(at.cast(), len, PROT, ANON | flags, -1, 0) };
    ensure!(is != libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
    Ok(Block(is.cast()))
}

/// Moves the pages of `from` over `to`.
fn remap(from: Block, to: Block, flags: i32) -> Check {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | flags;
    // SAFETY: both are this thread's own.
    let is = unsafe { libc::mremap(from.0.cast(), BLOCK, BLOCK, flags, to.0) };
    ensure!(is != libc::MAP_FAILED, "mremap: {}", std::io::Error::last_os_error());
    Ok(())
}

fn child_sees(block: Block, value: u64) -> Check {
    // SAFETY: the child only reads memory and leaves.
    match unsafe { fork() }.context("fork")? {
        // SAFETY: _exit touches no memory.
        ForkResult::Child => unsafe { libc::_exit(i32::from(block.wrong(value).is_some())) },
        ForkResult::Parent { child } => match waitpid(child, None).context("waitpid")? {
            WaitStatus::Exited(_, 0) => Ok(()),
            other => bail!("a child ended so: {other:?}"),
        },
    }
}

fn move_on(len: usize, mut seed: u64) -> Check {
    let blocks = len / BLOCK;
    let area = map(std::ptr::null_mut(), len, 0)?;
    let spare = map(std::ptr::null_mut(), BLOCK, 0)?;
    // SAFETY: inside the area.
    let block = |at: usize| Block(unsafe { area.0.add(at * BLOCK) });
    let mut holds = vec![0u64; blocks];
    let mut last = Instant::now();
    for (at, value) in holds.iter_mut().enumerate() {
        block(at).write(0, seed, &mut last)?;
        *value = seed;
    }
    PASSES.fetch_add(1, Ordering::Release);
    while !STOP.load(Ordering::Relaxed) {
        for (at, value) in holds.iter_mut().enumerate() {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            let this = block(at);
            match seed % 64 {
                0..=5 => {
                    this.check(*value)?;
                    // SAFETY: this thread's own mapping.
                    let r = unsafe { libc::madvise(this.0.cast(), BLOCK, libc::MADV_DONTNEED) };
                    ensure!(r == 0, "madvise: {}", std::io::Error::last_os_error());
                    *value = 0;
                }
                6..=9 => {
                    this.check(*value)?;
                    map(this.0, BLOCK, libc::MAP_FIXED)?;
                    *value = 0;
                }
                10..=13 => {
                    remap(this, spare, libc::MREMAP_DONTUNMAP)?;
                    this.check(0).context("a block whose pages were moved away")?;
                    spare.check(*value).context("a block that was moved away")?;
                    remap(spare, this, libc::MREMAP_DONTUNMAP)?;
                    this.check(*value).context("a block that was moved back")?;
                }
                14 => child_sees(this, *value)?,
                15 => {
                    let value = *value;
                    // The whole block, not the pointer in it.
                    let look = std::thread::spawn(move || {
                        let this = this;
                        this.check(value)
                    });
                    look.join().map_err(|_| anyhow!("a thread panicked"))??;
                }
                _ => {
                    this.write(*value, seed, &mut last)?;
                    *value = seed;
                }
            }
            last = Instant::now();
        }
        PASSES.fetch_add(1, Ordering::Release);
    }
    holds.iter().enumerate().try_for_each(|(at, value)| block(at).check(*value))
}

/// See the module.
pub fn run(args: &[String]) -> Check {
    let (mib, count) = (number(args, 0, 16)?, number(args, 1, 2)? as u64);
    let uid = number(args, 2, 0)? as u32;
    if uid != 0 {
        let (gid, uid) = (Gid::from_raw(uid), Uid::from_raw(uid));
        setresgid(gid, gid, gid).context("setresgid")?;
        setresuid(uid, uid, uid).context("setresuid")?;
    }
    let threads: Vec<_> = (1..=count)
        .map(|n| {
            std::thread::spawn(move || {
                move_on((mib << 20) / count as usize, n.wrapping_mul(0x9e37_79b9_7f4a_7c15))
            })
        })
        .collect();
    let ended = || threads.iter().any(|t| t.is_finished());
    while PASSES.load(Ordering::Acquire) < count && !ended() {
        std::thread::yield_now();
    }
    PAUSE.store(0, Ordering::Relaxed);
    tell_ready()?;
    wait_term()?;
    // Some way on, after whatever has happened.
    let seen = PASSES.load(Ordering::Acquire);
    while PASSES.load(Ordering::Acquire) < seen + 2 * count && !ended() {
        std::thread::yield_now();
    }
    STOP.store(true, Ordering::Relaxed);
    for thread in threads {
        thread.join().map_err(|_| anyhow!("a thread panicked"))??;
    }
    println!("longest pause: {} us (pid {})", PAUSE.load(Ordering::Relaxed), Pid::this());
    Ok(())
}
