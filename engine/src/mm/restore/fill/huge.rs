//! Huge pages for memory that is restored.
//!
//! A block of 2 MiB all of whose pages are in the images gets one huge page instead of 512 small ones: one fault
//! instead of 512, and no more memory than before. It is asked for with `MADV_COLLAPSE`, which leaves no mark on
//! the mapping, on a block of which one page is there.
//!
//! The administrator's `never`, the program's `PR_SET_THP_DISABLE` and `MADV_NOHUGEPAGE` are respected, and what
//! KSM is to merge stays small. Where huge pages are hard to get, because memory is scattered, small ones are
//! faster: after a refusal, or a call that takes long, some blocks are left out before it is tried again.

use std::{
    fs,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
    time::Duration,
};

use nix::time::{ClockId, clock_gettime};
use rcriu_images::{pagemap::PAGE_SIZE, pb};

use super::{super::TABLE, bulk::MADV_POPULATE_WRITE};
use crate::{mm::status as st, sys::map::Region};

/// Bytes of a huge page.
pub const SIZE: u64 = TABLE;
/// What a huge page may cost at most, of processor time: small ones for as much memory take about as long.
const COST: Duration = Duration::from_micros(1000);
/// Where the administrator says whether there are any.
const ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
/// The same for this size alone (Linux 6.8).
const ENABLED_SIZE: &str = "/sys/kernel/mm/transparent_hugepage/hugepages-2048kB/enabled";

/// `MADV_COLLAPSE` (Linux 6.1).
const MADV_COLLAPSE: i32 = 25;

/// Most calls left out in a row after a bad one.
const PATIENCE: u32 = 64;

/// Whether huge pages are taken, and how it went so far.
#[derive(Debug)]
pub struct Huge {
    allowed: bool,
    /// Calls to be left out.
    wait: AtomicU32,
    /// How many the last bad one was worth, twice as many each time; 0 while all goes well.
    penalty: AtomicU32,
    taken: AtomicU64,
}

impl Huge {
    fn new(allowed: bool) -> Huge {
        Huge { allowed, wait: AtomicU32::new(0), penalty: AtomicU32::new(1), taken: AtomicU64::new(0) }
    }

    /// None.
    pub fn never() -> Huge {
        Huge::new(false)
    }

    /// Those that [`Huge::are_allowed`] said.
    pub fn if_allowed(allowed: bool) -> Huge {
        Huge::new(allowed)
    }

    /// Whether the system allows them.
    pub fn are_allowed() -> bool {
        let set = |path: &str, what: &str| fs::read_to_string(path).is_ok_and(|text| text.contains(what));
        // Where the size has no say of its own, it does as all.
        !set(ENABLED_SIZE, "[never]") && (set(ENABLED, "[always]") || set(ENABLED, "[madvise]"))
    }

    /// Whether the blocks of a mapping may get them.
    pub fn suits(&self, vma: &pb::VmaEntry) -> bool {
        let against = 1 << libc::MADV_NOHUGEPAGE | 1 << libc::MADV_MERGEABLE;
        self.allowed
            && vma.status & st::ANON_PRIVATE != 0
            && vma.flags & libc::MAP_HUGETLB as u32 == 0
            && vma.madv.unwrap_or(0) & against == 0
    }

    /// How many were taken.
    pub fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// Gives the blocks in `[start, end)` huge pages as far as they can be had; where those that have none begin.
    pub fn take(&self, region: &Region, start: u64, end: u64) -> u64 {
        let waits = |n: u32| n.checked_sub(1);
        if !self.allowed || self.wait.fetch_update(Ordering::Relaxed, Ordering::Relaxed, waits).is_ok() {
            return start;
        }
        let mut at = start;
        while at < end {
            // While it does not go well, one block tells whether more are worth while.
            let well = self.penalty.load(Ordering::Relaxed) == 0;
            let upto = if well { end } else { at + SIZE };
            let before = thread_time();
            let done = (at..upto)
                .step_by(SIZE as usize)
                .try_for_each(|block| region.advise(block, PAGE_SIZE, MADV_POPULATE_WRITE))
                .and_then(|()| region.advise(at, upto - at, MADV_COLLAPSE));
            let blocks = (upto - at) / SIZE;
            let most = COST * u32::try_from(blocks).unwrap_or(u32::MAX);
            let slow = thread_time().saturating_sub(before) > most;
            if done.is_ok() {
                self.taken.fetch_add(blocks, Ordering::Relaxed);
                at = upto;
            }
            if slow || done.is_err() {
                let penalty = (self.penalty.load(Ordering::Relaxed) * 2).clamp(2, PATIENCE);
                self.penalty.store(penalty, Ordering::Relaxed);
                self.wait.store(penalty, Ordering::Relaxed);
                return at;
            }
            self.penalty.store(0, Ordering::Relaxed);
        }
        at
    }
}

/// Processor time of this thread.
fn thread_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}
