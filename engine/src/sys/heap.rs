//! The heap of this process as a private view of a file.
//!
//! A fork copies the page table entries of anonymous memory one by one, and every child that drops its copy takes them
//! apart again: with the images of a thousand tasks in the heap that is most of what a fork costs. Pages of a file have
//! entries only where they were touched; who touches others finds them in the page cache.
//!
//! # Safety
//! The process has one thread, which is looked at. From the first byte copied until the view is there nothing is written
//! to the heap: only system calls are made, on numbers.
#![allow(unsafe_code)]

use std::{
    fs,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::errno;
use crate::error::{Error, Result, SysContext};

/// From here on large allocations come out of the heap too, up to the largest that the library allows (32 MiB), so that
/// [`view_of_file`] covers them: mallopt(3).
pub(crate) fn take_large_too() {
    // SAFETY: a setting of the allocator, which takes its own lock; refused, it changes nothing.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20) };
}

/// From here on the heap keeps what is freed: no address that it has becomes free.
pub(crate) fn give_nothing_back() {
    take_large_too();
    // SAFETY: as there.
    unsafe { libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX) };
}

/// Where the heap ends. What is allocated next, if it is not much, has room below.
pub(crate) fn end() -> u64 {
    drop(std::hint::black_box(Vec::<u8>::with_capacity(1 << 20)));
    // SAFETY: only asks.
    unsafe { libc::sbrk(0) as u64 }
}

/// Makes the heap such a view if it has at least `least` bytes; tells whether it is one now. What is allocated later, or
/// written, is as before.
///
/// Precondition: the process has one thread.
///
/// # Errors
/// The heap is as it was.
pub(crate) fn view_of_file(least: u64) -> Result<bool> {
    let Some((start, len)) = range()?.filter(|(_, len)| *len as u64 >= least) else { return Ok(false) };
    let threads = fs::read_dir("/proc/self/task").call("opendir(/proc/self/task)")?.count();
    if threads != 1 {
        return Err(Error::bug(format!("{threads} threads have the heap in use")));
    }
    let file = memfd_create("rcriu-heap", MFdFlags::MFD_CLOEXEC).call("memfd_create")?;
    swap(start, len, &file).map(|()| true)
}

/// Start and length of the heap, if it is one plain mapping.
fn range() -> Result<Option<(usize, usize)>> {
    let maps = fs::read_to_string("/proc/self/maps").call("read(/proc/self/maps)")?;
    let mut heaps = maps.lines().filter(|line| line.ends_with("[heap]"));
    let (Some(line), None) = (heaps.next(), heaps.next()) else { return Ok(None) };
    let mut words = line.split_ascii_whitespace();
    let (Some(range), Some("rw-p")) = (words.next(), words.next()) else { return Ok(None) };
    let number = |text| usize::from_str_radix(text, 16).ok();
    let ends = range.split_once('-').and_then(|(start, end)| Some((number(start)?, number(end)?)));
    Ok(ends.map(|(start, end)| (start, end - start)))
}

#[inline(never)]
fn swap(start: usize, len: usize, file: &OwnedFd) -> Result<()> {
    let fd = file.as_raw_fd();
    let mut done = 0;
    while done < len {
        // SAFETY: inside the heap, which the kernel reads.
        match unsafe { libc::write(fd, (start + done) as *const _, len - done) } {
            n if n > 0 => done += n.cast_unsigned(),
            _ if errno::last() == libc::EINTR => {}
            _ => return Err(Error::sys("write(memfd)", errno::last())),
        }
    }
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_FIXED);
    // SAFETY: every byte of the range stays what it is, and it stays private to this process.
    match unsafe { libc::mmap(start as *mut _, len, prot, flags, fd, 0) } {
        libc::MAP_FAILED => Err(Error::sys("mmap of the heap", errno::last())),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In a child, which has one thread: what is in the heap stays, and it goes on growing.
    #[test]
    fn the_heap_stays_what_it_is() {
        let before: Vec<Box<u64>> = (0..100_000).map(Box::new).collect();
        // SAFETY: the child has one thread and ends without returning.
        match unsafe { libc::fork() } {
            0 => {
                let right = (|| {
                    view_of_file(1).ok()?;
                    let after: Vec<Box<u64>> = (0..1_000_000).map(Box::new).collect();
                    let same = |all: &[Box<u64>]| all.iter().zip(0..).all(|(b, n)| **b == n);
                    (same(&before) && same(&after)).then_some(())
                })();
                // SAFETY: ends the process.
                unsafe { libc::_exit(if right.is_some() { 7 } else { 1 }) }
            }
            child => {
                let mut status = 0;
                // SAFETY: the child is ours.
                assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
                assert_eq!(libc::WEXITSTATUS(status), 7);
            }
        }
    }
}
