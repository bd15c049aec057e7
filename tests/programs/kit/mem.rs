//! Mappings with a pattern in them that can be told apart by seed and position.
//!
//! # Safety
//!
//! A `Mapping` owns its range until the process ends: it is never unmapped, so a reference into it stays
//! valid. Its protections are the caller's to know, as `fill` and `check` state.

use std::os::fd::AsRawFd;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;

use super::Check;

pub const PAGE: usize = 4096;

/// A range of memory of this process, kept until its end.
#[derive(Debug, Clone, Copy)]
pub struct Mapping {
    pub at: usize,
    pub len: usize,
}

/// mmap(2) at a place of the kernel's choosing.
pub fn map(len: usize, prot: i32, flags: i32, file: Option<(&std::fs::File, usize)>) -> Result<Mapping> {
    map_at(0, len, prot, flags, file)
}

/// mmap(2) with an address; give MAP_FIXED_NOREPLACE in `flags` to insist on it.
pub fn map_at(
    at: usize,
    len: usize,
    prot: i32,
    flags: i32,
    file: Option<(&std::fs::File, usize)>,
) -> Result<Mapping> {
    let (fd, offset) = file.map_or((-1, 0), |(f, o)| (f.as_raw_fd(), o as libc::off_t));
    // SAFETY: without MAP_FIXED no mapping of others is touched; callers never pass that flag.
    let p = unsafe { libc::mmap(at as *mut libc::c_void, len, prot, flags, fd, offset) };
    if p == libc::MAP_FAILED {
        return Err(Errno::last()).with_context(|| format!("mmap of {len} bytes"));
    }
    Ok(Mapping { at: p as usize, len })
}

/// A private anonymous readable and writable mapping.
pub fn anon(len: usize) -> Result<Mapping> {
    map(len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None)
}

/// A shared anonymous readable and writable mapping.
pub fn shared(len: usize) -> Result<Mapping> {
    map(len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS, None)
}

/// The word that belongs at word position `at` under `seed`.
pub fn word(seed: u64, at: usize) -> u64 {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(at as u64 + 1);
    x ^= x >> 30;
    x = x.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^ (x >> 27)
}

impl Mapping {
    /// A part of the range, in pages.
    pub fn pages(self, from: usize, count: usize) -> Mapping {
        assert!((from + count) * PAGE <= self.len);
        Mapping { at: self.at + from * PAGE, len: count * PAGE }
    }

    /// The bytes; the range must be readable.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the range stays mapped; readability is the caller's promise.
        unsafe { std::slice::from_raw_parts(self.at as *const u8, self.len) }
    }

    fn words(&self) -> &[u64] {
        // SAFETY: as `bytes`; the start is aligned to a page.
        unsafe { std::slice::from_raw_parts(self.at as *const u64, self.len / 8) }
    }

    /// The words, to be written; the range must be writable and nobody may hold `bytes` of it.
    #[allow(clippy::mut_from_ref)]
    fn words_mut(&self) -> &mut [u64] {
        // SAFETY: the range stays mapped; that it is writable and not borrowed is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.at as *mut u64, self.len / 8) }
    }

    /// Writes the pattern of `seed`; the range must be writable.
    pub fn fill(&self, seed: u64) -> &Mapping {
        self.fill_by(|i| word(seed, i))
    }

    /// Writes words by their position; the range must be writable.
    pub fn fill_by(&self, word: impl Fn(usize) -> u64) -> &Mapping {
        self.words_mut().iter_mut().enumerate().for_each(|(i, w)| *w = word(i));
        self
    }

    /// Writes zeros; the range must be writable.
    pub fn clear(&self) {
        self.words_mut().fill(0);
    }

    /// Fails at the first word that is not the pattern's; the range must be readable.
    pub fn check(&self, what: &str, seed: u64) -> Check {
        self.check_by(what, |i| word(seed, i))
    }

    /// Fails at the first word that is not what its position says; the range must be readable.
    pub fn check_by(&self, what: &str, word: impl Fn(usize) -> u64) -> Check {
        match self.words().iter().enumerate().find(|(i, w)| **w != word(*i)) {
            None => Ok(()),
            Some((i, w)) => {
                bail!("{what}: word {i} at {:#x} is {w:#x}, was {:#x}", self.at + 8 * i, word(i))
            }
        }
    }

    /// Fails unless everything reads as zero.
    pub fn check_zero(&self, what: &str) -> Check {
        match self.words().iter().position(|w| *w != 0) {
            None => Ok(()),
            Some(i) => bail!("{what}: word {i} at {:#x} is not zero", self.at + 8 * i),
        }
    }

    /// mprotect(2) of the whole range.
    pub fn protect(&self, prot: i32) -> Result<Mapping> {
        // SAFETY: the range is this mapping's own.
        let r = unsafe { libc::mprotect(self.at as *mut libc::c_void, self.len, prot) };
        super::sys("mprotect", r)?;
        Ok(*self)
    }

    /// madvise(2) of the whole range.
    pub fn advise(&self, advice: i32) -> Result<Mapping> {
        // SAFETY: the range is this mapping's own; callers give no advice that drops what they check.
        let r = unsafe { libc::madvise(self.at as *mut libc::c_void, self.len, advice) };
        super::sys("madvise", r).with_context(|| format!("advice {advice}"))?;
        Ok(*self)
    }

    /// A shared atomic word of the range.
    pub fn atomic(&self, at: usize) -> &std::sync::atomic::AtomicU32 {
        assert!(at * 4 + 4 <= self.len);
        // SAFETY: inside the range, aligned, and only used as an atomic.
        unsafe { &*((self.at + at * 4) as *const std::sync::atomic::AtomicU32) }
    }
}

/// Frame number of each page of the range, None for pages that are not present. Needs root.
pub fn frames(range: Mapping) -> Result<Vec<Option<u64>>> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::open("/proc/self/pagemap").context("pagemap")?;
    let mut raw = vec![0u8; range.len / PAGE * 8];
    file.read_exact_at(&mut raw, (range.at / PAGE * 8) as u64).context("reading pagemap")?;
    Ok(raw
        .chunks_exact(8)
        .map(|c| u64::from_ne_bytes(c.try_into().unwrap_or_default()))
        .map(|e| (e >> 63 == 1).then_some(e & ((1 << 55) - 1)))
        .collect())
}
