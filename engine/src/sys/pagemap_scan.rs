//! The PAGEMAP_SCAN ioctl of `/proc/PID/pagemap` (Linux 6.7): which pages are of which category, as
//! ranges, and write-protecting what was found.
//!
//! Source: Documentation/admin-guide/mm/pagemap.rst and `uapi/linux/fs.h` of the kernel.
//!
//! # Safety
//! The kernel writes the argument structure and at most `vec_len` regions, both locals or slices here.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd};

use crate::{
    error::{Error, Result},
    sys::errno,
};

bitflags::bitflags! {
    /// Categories of pages (`PAGE_IS_*`).
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct Category: u64 {
        /// Lies in a range where asynchronous write protection is on.
        const WPALLOWED = 1;
        /// Written since it was write-protected. Never-touched pages count as written too.
        const WRITTEN = 1 << 1;
        /// Belongs to a file, shared memory included.
        const FILE = 1 << 2;
        /// In memory.
        const PRESENT = 1 << 3;
        /// In swap.
        const SWAPPED = 1 << 4;
        /// The shared zero page.
        const PFNZERO = 1 << 5;
        /// Mapped by a huge page entry.
        const HUGE = 1 << 6;
        /// Soft-dirty.
        const SOFT_DIRTY = 1 << 7;
        /// Guard page made by madvise (MADV_GUARD_INSTALL).
        const GUARD = 1 << 8;
    }

    /// `PM_SCAN_*`.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct Flags: u64 {
        /// Write-protect the pages that match.
        const WP_MATCHING = 1;
        /// Fail where asynchronous write protection is not registered.
        const CHECK_WPASYNC = 1 << 1;
    }
}

/// A run of pages of equal categories.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct Region {
    /// First address.
    pub start: u64,
    /// Address behind it.
    pub end: u64,
    categories: u64,
}

impl Region {
    /// The asked categories (`Query::returned`) the pages have. Bits of later kernels are dropped.
    pub fn categories(&self) -> Category {
        Category::from_bits_truncate(self.categories)
    }
}

/// Which pages to report.
#[derive(Clone, Copy, Debug, Default)]
pub struct Query {
    /// What to do with matching pages.
    pub flags: Flags,
    /// Categories whose bits are flipped before matching.
    pub inverted: Category,
    /// All of these must be set.
    pub all_of: Category,
    /// At least one of these must be set, unless empty.
    pub any_of: Category,
    /// Which bits the regions report.
    pub returned: Category,
}

#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610_u32 as libc::Ioctl;
const _: () = assert!(size_of::<ScanArg>() == 0x60 && size_of::<Region>() == 24);

/// Fills `regions` with matching runs in `[start, end)`, both page aligned; gives how many there are
/// and the address where the walk ended. If that is less than `end`, scan again from there.
///
/// Precondition: there is room for a region. Without any, the kernel write-protects all pages of the range, also
/// those that do not match and those that were never touched.
///
/// # Errors
/// ENOTTY before Linux 6.7; EPERM with `CHECK_WPASYNC` on a range without it; EINVAL for categories
/// the kernel does not know.
pub fn scan(
    pagemap: impl AsFd,
    start: u64,
    end: u64,
    query: &Query,
    regions: &mut [Region],
) -> Result<(usize, u64)> {
    if regions.is_empty() {
        return Err(Error::bug("PAGEMAP_SCAN without room for an answer"));
    }
    let mut arg = ScanArg {
        size: size_of::<ScanArg>() as u64,
        flags: query.flags.bits(),
        start,
        end,
        vec: regions.as_mut_ptr().expose_provenance() as u64,
        vec_len: regions.len() as u64,
        category_inverted: query.inverted.bits(),
        category_mask: query.all_of.bits(),
        category_anyof_mask: query.any_of.bits(),
        return_mask: query.returned.bits(),
        ..ScanArg::default()
    };
    // SAFETY: arg is a local; vec and vec_len describe the caller's slice.
    let ret = unsafe { libc::ioctl(pagemap.as_fd().as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
    let count = errno::check(ret.into(), "ioctl(PAGEMAP_SCAN)")? as usize;
    if count > regions.len() {
        return Err(Error::bug(format!("PAGEMAP_SCAN gave {count} of {} regions", regions.len())));
    }
    Ok((count, arg.walk_end))
}

/// Where the next scan starts. The kernel reports an end of the walk that may lie before the last region, when
/// its own buffer was emptied in between; it has been past all regions then.
pub fn next(at: u64, walked: u64, regions: &[Region]) -> Result<u64> {
    let next = regions.last().map_or(walked, |last| walked.max(last.end));
    if next <= at { Err(Error::bug("PAGEMAP_SCAN does not advance")) } else { Ok(next) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn touched_pages_are_reported_in_runs() {
        let len = 16 * 4096;
        let mut map = memmap2::MmapMut::map_anon(len).unwrap();
        for page in [1, 2, 7] {
            map[page * 4096] = 1;
        }
        let base = map.as_ptr().addr() as u64;
        let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
        let query = Query { all_of: Category::PRESENT, returned: Category::PRESENT, ..Query::default() };
        let mut regions = [Region::default(); 8];
        match scan(&pagemap, base, base + len as u64, &query, &mut regions) {
            Err(e) if e.errno() == Some(libc::ENOTTY) => eprintln!("SKIP: no PAGEMAP_SCAN"),
            r => {
                let (n, end) = r.unwrap();
                let runs: Vec<_> =
                    regions[..n].iter().map(|r| ((r.start - base) / 4096, (r.end - base) / 4096)).collect();
                assert_eq!(runs, [(1, 3), (7, 8)]);
                assert_eq!(end, base + len as u64);
                assert_eq!(regions[0].categories(), Category::PRESENT);
                let (n, end) = scan(&pagemap, base, base + len as u64, &query, &mut regions[..1]).unwrap();
                assert_eq!(n, 1);
                assert!(end < base + len as u64, "the walk stops when the room is used up");
            }
        }
    }
}
