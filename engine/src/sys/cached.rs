//! Whether bytes of a file can be read without waiting for a disk.
//!
//! # Safety
//! The one byte that is read goes into a local, and so does what the kernel counts.
#![allow(unsafe_code)]

use std::{fs::File, os::fd::AsRawFd};

use crate::{
    error::{Error, Result},
    sys::errno,
};

/// Whether the byte at `offset` is in the page cache; where that cannot be told (file systems without
/// `RWF_NOWAIT`), or behind the end, it is.
pub fn has(file: &File, offset: u64) -> Result<bool> {
    let mut byte = 0u8;
    let to = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    loop {
        // SAFETY: one buffer of one byte, which outlives the call.
        let n = unsafe {
            libc::preadv2(file.as_raw_fd(), &raw const to, 1, offset.cast_signed(), libc::RWF_NOWAIT)
        };
        return match errno::last() {
            _ if n >= 0 => Ok(true),
            libc::EINTR => continue,
            libc::EAGAIN => Ok(false),
            libc::EOPNOTSUPP | libc::ENOSYS => Ok(true),
            e => Err(Error::sys("preadv2", e)),
        };
    }
}

/// `struct cachestat_range` and `struct cachestat` of `linux/mman.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Range {
    offset: u64,
    len: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// cachestat(2), whose number is the same everywhere.
const CACHESTAT: libc::c_long = 451;

/// Pages of a range of a file that are in the page cache (Linux 6.5).
pub fn count(file: &File, offset: u64, len: u64) -> Result<u64> {
    let (range, mut count) = (Range { offset, len }, Count::default());
    // SAFETY: both structures outlive the call.
    let done = unsafe { libc::syscall(CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut count, 0) };
    errno::check(done, "cachestat")?;
    Ok(count.cached)
}

/// How a range is asked about when the kernel cannot count.
const ASKED: u64 = 1 << 20;

/// Lengths of the parts of a range of a file that are in the page cache, and of those that are not, in turn; the
/// first is one that is in it, perhaps of length 0. `counts` says whether the kernel may be asked to count; if it
/// cannot, single bytes tell for all of a MiB.
pub fn parts(file: &File, offset: u64, len: u64, counts: bool) -> Result<Vec<u64>> {
    let mut parts = vec![0];
    if !counts || halves(file, offset, len, &mut parts).is_err() {
        parts = vec![0];
        for at in (offset..offset + len).step_by(ASKED as usize) {
            let part = ASKED.min(offset + len - at);
            add(&mut parts, has(file, at + part - 1)? || has(file, at)?, part);
        }
    }
    Ok(parts)
}

fn add(parts: &mut Vec<u64>, cached: bool, len: u64) {
    if (parts.len() % 2 == 1) != cached {
        parts.push(0);
    }
    if let Some(last) = parts.last_mut() {
        *last += len;
    }
}

fn halves(file: &File, offset: u64, len: u64, parts: &mut Vec<u64>) -> Result<()> {
    const PAGE: u64 = 4096;
    match count(file, offset, len)? {
        0 => add(parts, false, len),
        all if all * PAGE >= len || len <= PAGE => add(parts, true, len),
        _ => {
            let half = (len / 2).next_multiple_of(PAGE);
            halves(file, offset, half, parts)?;
            halves(file, offset + half, len - half, parts)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn parts_take_turns() {
        let mut parts = vec![0];
        for (cached, len) in [(false, 1), (false, 2), (true, 3), (true, 4), (false, 5)] {
            add(&mut parts, cached, len);
        }
        assert_eq!(parts, [0, 3, 7, 5]);
    }

    /// What was just written is there, in both ways of asking; what nobody wrote or read is not.
    #[test]
    fn written_pages_are_cached() {
        let file = tempfile::tempfile().unwrap();
        let len = 8 << 20;
        file.set_len(len).unwrap();
        file.write_all_at(&vec![1; 3 << 20], 1 << 20).unwrap();
        if count(&file, 0, len).is_ok() {
            let odd = parts(&file, 0, len, true).unwrap();
            assert_eq!(odd, [0, 1 << 20, 3 << 20, 4 << 20]);
        }
        assert_eq!(parts(&file, 1 << 20, 3 << 20, false).unwrap(), [3 << 20]);
    }
}
