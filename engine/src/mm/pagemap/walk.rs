//! All of a task's page tables in one walk, for tasks with very many mappings: while the kernel writes the list of
//! these, both guard pages and content are found.

use rcriu_images::pagemap::PAGE_SIZE;

use super::{CONTENT, REGIONS, Scanner, split, wanted, with_content};
use crate::{
    error::Result,
    mm::vma::{TASK_SIZE, Vma},
    sys::pagemap_scan::{self, Category, Query, Region},
};

/// Runs of pages that one walk over all mappings has found, in order; neighbours are one run.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Walk {
    /// Guard pages (MADV_GUARD_INSTALL).
    pub guards: Vec<(u64, u64)>,
    /// Pages with content of their own.
    content: Vec<(u64, u64)>,
    /// Where it has come to.
    upto: u64,
}

/// Runs of a walk at most: more take too much memory.
const RUNS: usize = 1 << 20;

impl Scanner {
    /// Walks over all mappings once; `None` where that cannot tell everything, or there is too much to tell.
    pub fn walk(&mut self) -> Result<Option<Walk>> {
        let mut walk = Walk::default();
        while self.can_walk() && walk.content.len() <= RUNS {
            if walk.upto >= TASK_SIZE {
                return Ok(Some(walk));
            }
            self.walk_on(&mut walk, TASK_SIZE, REGIONS)?;
        }
        Ok(None)
    }

    /// Whether a walk can tell everything.
    pub fn can_walk(&self) -> bool {
        self.scan
    }

    /// Goes on with a walk, up to `end` or `runs` runs at most.
    ///
    /// Precondition: the task stands still, and [`Scanner::can_walk`].
    pub fn walk_on(&mut self, walk: &mut Walk, end: u64, runs: usize) -> Result<()> {
        let guard = self.guard();
        let query = Query { any_of: CONTENT | guard, returned: guard, ..with_content() };
        let runs = runs.clamp(1, self.regions.len());
        let regions = &mut self.regions[..runs];
        let (count, walked) = pagemap_scan::scan(&self.words.file, walk.upto, end, &query, regions)?;
        for region in &regions[..count] {
            let guards = region.categories().intersects(Category::GUARD);
            push(if guards { &mut walk.guards } else { &mut walk.content }, region);
        }
        walk.upto = pagemap_scan::next(walk.upto, walked, &regions[..count])?;
        Ok(())
    }
}

impl Walk {
    /// Where it has come to.
    pub fn upto(&self) -> u64 {
        self.upto
    }

    /// Whether there was too much to tell.
    pub fn is_too_long(&self) -> bool {
        self.content.len() > RUNS
    }

    /// Calls `found(vma, start, end)` for what has content from `start` on, up to `end`, and about `most` bytes of it;
    /// gives where it has come to. The first of `vmas` may be far below `start`.
    pub fn part(
        &self,
        vmas: &[Vma],
        (start, end): (u64, u64),
        most: u64,
        mut found: impl FnMut(&Vma, u64, u64) -> Result<()>,
    ) -> Result<u64> {
        let mut rest = &vmas[vmas.partition_point(|vma| vma.entry.end <= start)..];
        let first = self.content.partition_point(|run| run.1 <= start);
        let mut left = most;
        for run in self.content[first..].iter().take_while(|run| run.0 < end) {
            let from = run.0.max(start);
            let to = run.1.min(end).min(from + left);
            split(&mut rest, from, to, &mut |vma: &Vma, from, to| match wanted(vma) {
                true => found(vma, from, to),
                false => Ok(()),
            })?;
            left -= to - from;
            if left == 0 {
                return Ok(to);
            }
        }
        Ok(end)
    }

    /// As [`Scanner::by_scan`], without marks.
    pub(super) fn pages(
        &self,
        vmas: &[Vma],
        found: &mut impl FnMut(&Vma, u64, u64, bool) -> Result<()>,
    ) -> Result<u64> {
        let (Some(first), Some(last)) = (vmas.first(), vmas.last()) else { return Ok(0) };
        let (start, end) = (first.entry.start, last.entry.end);
        let from = self.content.partition_point(|run| run.1 <= start);
        let (mut rest, mut looked) = (vmas, 0);
        for run in self.content[from..].iter().take_while(|run| run.0 < end) {
            let (from, to) = (run.0.max(start), run.1.min(end));
            looked += (to - from) / PAGE_SIZE;
            split(&mut rest, from, to, &mut |vma: &Vma, from, to| found(vma, from, to, false))?;
        }
        Ok(looked)
    }
}

/// Appends a run of pages.
pub(super) fn push(runs: &mut Vec<(u64, u64)>, region: &Region) {
    match runs.last_mut() {
        Some((_, end)) if *end == region.start => *end = region.end,
        _ => runs.push((region.start, region.end)),
    }
}

#[cfg(test)]
mod tests {
    use rcriu_images::pb::VmaEntry;

    use super::*;
    use crate::mm::status as st;

    #[test]
    fn parts_follow_each_other() {
        let vma = |start: u64, end: u64, status| {
            let entry = VmaEntry { start: start << 12, end: end << 12, status, ..VmaEntry::default() };
            Vma { entry, name: None, touched: true }
        };
        let anon = st::REGULAR | st::ANON_PRIVATE;
        let shared = st::REGULAR | st::ANON_SHARED;
        let vmas = [vma(1, 4, anon), vma(4, 6, shared), vma(6, 7, anon), vma(20, 30, anon)];
        let content = [(2, 7), (22, 24), (26, 28)].map(|(a, b)| (a << 12, b << 12)).to_vec();
        let walk = Walk { content, ..Walk::default() };
        for most in 1..12 {
            let (mut at, mut pages) = (0, Vec::new());
            while at < 27 << 12 {
                let mut bytes = 0;
                let found = |vma: &Vma, start: u64, end: u64| {
                    assert!(vma.entry.start <= start && end <= vma.entry.end);
                    bytes += end - start;
                    pages.extend((start..end).step_by(4096).map(|at| at >> 12));
                    Ok(())
                };
                let next = walk.part(&vmas, (at, 27 << 12), most << 12, found).unwrap();
                assert!(next > at && bytes <= most << 12);
                at = next;
            }
            assert_eq!(pages, [2, 3, 6, 22, 23, 26], "{most} at a time");
        }
    }
}
