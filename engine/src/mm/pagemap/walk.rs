//! All of a task's page tables in one walk, for tasks with very many mappings: while the kernel writes the list of
//! these, another thread finds both guard pages and content.

use rcriu_images::pagemap::PAGE_SIZE;

use super::{CONTENT, Scanner, split, with_content};
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
}

/// Runs of a walk at most: more take too much memory.
const RUNS: usize = 1 << 20;

impl Scanner {
    /// Walks over all mappings once; `None` where that cannot tell everything, or there is too much to tell.
    pub fn walk(&mut self) -> Result<Option<Walk>> {
        if !self.scan {
            return Ok(None);
        }
        let guard = self.guard();
        let query = Query { any_of: CONTENT | guard, returned: guard, ..with_content() };
        let mut walk = Walk::default();
        let mut at = 0;
        while at < TASK_SIZE {
            let (count, walked) =
                pagemap_scan::scan(&self.words.file, at, TASK_SIZE, &query, &mut self.regions)?;
            for region in &self.regions[..count] {
                let guards = region.categories().intersects(Category::GUARD);
                push(if guards { &mut walk.guards } else { &mut walk.content }, region);
            }
            if walk.content.len() > RUNS {
                return Ok(None);
            }
            at = pagemap_scan::next(at, walked, &self.regions[..count])?;
        }
        Ok(Some(walk))
    }
}

impl Walk {
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
