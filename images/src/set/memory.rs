//! How much memory a set holds, and where it is.

use std::collections::BTreeMap;

use super::{ImageSet, Task};
use crate::{
    catalog::ImageKind,
    error::Result,
    pagemap::{PAGE_SIZE, PageReader, Pagemap, Source},
};

/// Sums in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryTotals {
    /// Length of all mappings.
    pub mapped: u64,
    /// All pages of tasks that the images speak of.
    pub private: u64,
    /// The same of shared memory, each object once.
    pub shared: u64,
    /// Of both: in the pages files of this set.
    pub stored: u64,
    /// In those of its parents.
    pub in_parent: u64,
    /// With the server that answers page faults.
    pub lazy: u64,
    /// Said to be in a parent, where they are not.
    pub missing: u64,
}

impl MemoryTotals {
    /// All pages the images speak of.
    pub fn rss(&self) -> u64 {
        self.private + self.shared
    }

    /// Adds what a pagemap covers; gives its length in bytes.
    fn add(&mut self, pages: &PageReader) -> u64 {
        let Some(map) = pages.pagemap(0) else { return 0 };
        let mut all = 0u64;
        for region in &map.regions {
            all += region.len();
            for run in pages.runs(region.vaddr, region.end()) {
                *match run.source {
                    Source::Stored { level: 0, .. } => &mut self.stored,
                    Source::Stored { .. } => &mut self.in_parent,
                    Source::Lazy => &mut self.lazy,
                    Source::Absent | Source::Missing => &mut self.missing,
                } += run.len;
            }
        }
        all
    }
}

/// Adds up the private memory of one task.
pub fn task_memory(set: &ImageSet, task: &Task) -> Result<MemoryTotals> {
    let mut totals = MemoryTotals::default();
    if let Some(mm) = &task.mm {
        totals.mapped = mm.vmas.iter().map(|v| v.end.saturating_sub(v.start)).fold(0, u64::saturating_add);
    }
    if let Some(pages) = task.pages(&set.dir)? {
        totals.private = totals.add(&pages);
    }
    Ok(totals)
}

/// Adds up all pagemaps of the set.
pub fn memory(set: &ImageSet) -> Result<MemoryTotals> {
    let mut totals = MemoryTotals::default();
    let vmas = set.tasks.iter().filter_map(|t| t.mm.as_ref()).flat_map(|mm| &mm.vmas);
    totals.mapped = vmas.map(|v| v.end.saturating_sub(v.start)).fold(0, u64::saturating_add);
    for (kind, id) in set.dir.images()? {
        if !matches!(kind, ImageKind::Pagemap | ImageKind::ShmemPagemap) {
            continue;
        }
        if let Some(pages) = PageReader::open(&set.dir, kind, id)? {
            let len = totals.add(&pages);
            *if kind == ImageKind::Pagemap { &mut totals.private } else { &mut totals.shared } += len;
        }
    }
    Ok(totals)
}

/// Pagemaps that tell of the pages files of this set, one for each, by their numbers. Their regions are left out.
pub(super) fn pages_files(set: &ImageSet) -> Result<BTreeMap<u32, Pagemap>> {
    let mut files = BTreeMap::new();
    for (kind, id) in set.dir.images()? {
        if matches!(kind, ImageKind::Pagemap | ImageKind::ShmemPagemap)
            && let Some(map) = Pagemap::read(&set.dir, kind, id)?
        {
            files.insert(map.pages_id, Pagemap { regions: Vec::new(), ..map });
        }
    }
    Ok(files)
}

/// Bytes of stored pages.
pub(super) fn bytes(pages: u64) -> u64 {
    pages.saturating_mul(PAGE_SIZE)
}
