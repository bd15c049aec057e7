//! Huge pages for memory that is restored.
//!
//! A block of 2 MiB all of whose pages are in the images gets one huge page instead of 512 small ones: one fault
//! instead of 512, and no more memory than before. It is asked for with `MADV_COLLAPSE`, which leaves no mark on
//! the mapping, on a block of which one page is there.
//!
//! The administrator's `never`, the program's `PR_SET_THP_DISABLE` and `MADV_NOHUGEPAGE` are respected, and what
//! KSM is to merge stays small. Where huge pages are hard to get, because memory is scattered, small ones are
//! faster: after the first refusal, or the first that takes long, no more are asked for.

use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use nix::time::{ClockId, clock_gettime};
use rcriu_images::{pagemap::PAGE_SIZE, pb};

use super::super::TABLE;
use crate::{mm::status as st, sys::map::Region};

/// Bytes of a huge page.
pub const SIZE: u64 = TABLE;
/// What a huge page may cost at most, of processor time: small ones for as much memory take about as long.
const COST: Duration = Duration::from_micros(1000);
/// Where the administrator says whether there are any.
const ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
/// The same for this size alone (Linux 6.8).
const ENABLED_SIZE: &str = "/sys/kernel/mm/transparent_hugepage/hugepages-2048kB/enabled";

/// `MADV_POPULATE_WRITE` (Linux 5.14).
const MADV_POPULATE_WRITE: i32 = 23;
/// `MADV_COLLAPSE` (Linux 6.1).
const MADV_COLLAPSE: i32 = 25;

/// Whether huge pages are taken.
#[derive(Debug)]
pub struct Huge(AtomicBool);

impl Huge {
    /// None.
    pub fn never() -> Huge {
        Huge(AtomicBool::new(false))
    }

    /// As the system allows.
    pub fn as_allowed() -> Huge {
        let set = |path: &str, what: &str| fs::read_to_string(path).is_ok_and(|text| text.contains(what));
        // Where the size has no say of its own, it does as all.
        let allowed =
            !set(ENABLED_SIZE, "[never]") && (set(ENABLED, "[always]") || set(ENABLED, "[madvise]"));
        Huge(AtomicBool::new(allowed))
    }

    /// Whether the blocks of a mapping may get them.
    pub fn suits(&self, vma: &pb::VmaEntry) -> bool {
        let against = 1 << libc::MADV_NOHUGEPAGE | 1 << libc::MADV_MERGEABLE;
        self.0.load(Ordering::Relaxed)
            && vma.status & st::ANON_PRIVATE != 0
            && vma.flags & libc::MAP_HUGETLB as u32 == 0
            && vma.madv.unwrap_or(0) & against == 0
    }

    /// Gives the blocks in `[start, end)` huge pages if they can be had.
    pub fn take(&self, region: &Region, start: u64, end: u64) {
        if !self.0.load(Ordering::Relaxed) {
            return;
        }
        let before = thread_time();
        let taken = (start..end)
            .step_by(SIZE as usize)
            .try_for_each(|block| region.advise(block, PAGE_SIZE, MADV_POPULATE_WRITE))
            .and_then(|()| region.advise(start, end - start, MADV_COLLAPSE));
        let blocks = u32::try_from((end - start) / SIZE).unwrap_or(u32::MAX);
        let slow = thread_time().saturating_sub(before) > COST * blocks;
        if slow || taken.is_err() {
            self.0.store(false, Ordering::Relaxed);
        }
    }
}

/// Processor time of this thread.
fn thread_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}
