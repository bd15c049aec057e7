//! Memory in huge pages of hugetlbfs: private, shared, as a memfd, inherited, half gone.
//!
//! # Safety
//!
//! munmap gets a huge page of this program's own; memfd_create gives a descriptor that is owned from then on.

use std::fs::File;
use std::os::fd::FromRawFd;
use std::os::unix::fs::MetadataExt;

use anyhow::Context;

use crate::kit::crew::member;
use crate::kit::mem::{Mapping, PAGE, map};
use crate::kit::{Check, number, rest, same, skip, sys};

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Bits of a page size given as its base 2 logarithm.
fn size_flag(shift: usize) -> i32 {
    (shift as i32) << 26
}

fn huge(pages: usize, shift: usize, flags: i32) -> anyhow::Result<Mapping> {
    let flags = flags | libc::MAP_HUGETLB | size_flag(shift);
    map(pages << shift, RW, flags, None).map_err(|e| skip(format!("no huge pages: {e:#}")))
}

/// Size of the pages that the kernel uses for the mapping, and its name.
fn kernel_page(m: Mapping) -> anyhow::Result<(String, String)> {
    let smaps = std::fs::read_to_string("/proc/self/smaps").context("smaps")?;
    let start = format!("{:x}-", m.at);
    let mut lines = smaps.lines().skip_while(|l| !l.starts_with(&start));
    let name =
        lines.next().context("no such mapping")?.split_whitespace().skip(5).collect::<Vec<_>>().join(" ");
    let size = lines.find_map(|l| l.strip_prefix("KernelPageSize:")).context("no KernelPageSize")?;
    Ok((size.trim().to_owned(), name))
}

/// See the module. Argument: base 2 logarithm of the page size, 21 by default.
pub fn run(args: &[String]) -> Check {
    let shift = number(args, 0, 21)?;
    let private = huge(3, shift, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)?;
    let small = |m: Mapping, page: usize, at: usize| m.pages((page << shift) / PAGE + at, 4);
    small(private, 0, 0).fill(1);
    small(private, 2, 100).fill(2);
    private.pages(0, 1 << (shift - 12)).protect(libc::PROT_READ)?;
    let shared = huge(2, shift, libc::MAP_SHARED | libc::MAP_ANONYMOUS)?;
    small(shared, 1, 9).fill(3);
    let name = c"huge";
    let flags = libc::MFD_HUGETLB | libc::MFD_ALLOW_SEALING | size_flag(shift) as u32;
    // SAFETY: the name ends with a zero.
    let memfd = sys("memfd_create", unsafe { libc::memfd_create(name.as_ptr(), flags) })?;
    // SAFETY: made just now.
    let memfd = unsafe { File::from_raw_fd(memfd) };
    memfd.set_len(2 << shift).context("ftruncate")?;
    let by_file = map(1 << shift, RW, libc::MAP_SHARED, Some((&memfd, 1 << shift)))?;
    small(by_file, 0, 7).fill(4);
    let view = map(1 << shift, RW, libc::MAP_PRIVATE, Some((&memfd, 1 << shift)))?;
    small(view, 0, 20).fill(5);
    // SAFETY: an integer.
    sys("fcntl", unsafe {
        libc::fcntl(std::os::fd::AsRawFd::as_raw_fd(&memfd), libc::F_ADD_SEALS, libc::F_SEAL_GROW)
    })?;
    let before = [private, shared, by_file, view].map(kernel_page);
    let inode = memfd.metadata().context("stat")?;
    let child = member(move || {
        // One page is its own by now, the others are as they were.
        small(private, 2, 50).fill(6);
        // SAFETY: the last huge page of the first mapping of this process.
        sys("munmap", unsafe { libc::munmap((private.at + (1 << shift)) as *mut libc::c_void, 1 << shift) })?;
        rest()?;
        small(private, 0, 0).check("inherited huge page", 1)?;
        small(private, 2, 100).check("inherited huge page, in part written", 2)?;
        small(private, 2, 50).check("huge page written after the fork", 6)?;
        small(shared, 0, 3).fill(7);
        small(by_file, 0, 30).fill(8);
        Ok(())
    })?;
    rest()?;
    small(private, 0, 0).check("private huge page", 1)?;
    small(private, 2, 100).check("second private huge page", 2)?;
    small(private, 2, 50).check_zero("rest of it")?;
    Mapping { at: private.at + (1 << shift), len: 4 * PAGE }.check_zero("untouched huge page")?;
    small(shared, 1, 9).check("shared huge page", 3)?;
    small(by_file, 0, 7).check("memfd in huge pages", 4)?;
    small(view, 0, 20).check("private view of it", 5)?;
    child.verify()?;
    small(shared, 0, 3).check("what the child wrote to shared huge pages", 7)?;
    small(by_file, 0, 30).check("what the child wrote to the memfd", 8)?;
    for (before, now) in before.into_iter().zip([private, shared, by_file, view]) {
        same("page size and name", kernel_page(now)?, before?)?;
    }
    let now = memfd.metadata().context("stat")?;
    same("size and page size of the memfd", (now.len(), now.blksize()), (inode.len(), inode.blksize()))?;
    same("growing a sealed memfd fails", memfd.set_len(4 << shift).is_err(), true)
}
