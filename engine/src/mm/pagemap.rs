//! Which pages of a task have content of their own.
//!
//! Private memory that was never written, or that still shows its file, is left out: a restore gets it from
//! the kernel again. PAGEMAP_SCAN answers for whole ranges at once and costs only what is touched; before
//! Linux 6.7 `/proc/PID/pagemap` is read in large pieces, mappings that hold nothing are skipped.

mod walk;

use std::{fs::File, os::unix::fs::FileExt};

use nix::fcntl::OFlag;
use rcriu_images::pagemap::PAGE_SIZE;

pub use self::walk::Walk;
use self::walk::push;
use super::{
    status as st,
    vma::{TASK_SIZE, Vma},
};
use crate::{
    error::{Context, Result, SysContext},
    kernel::Kernel,
    procfs::ProcDir,
    sys::pagemap_scan::{self, Category, Query, Region},
};

/// Regions asked for at once: 96 KiB of them.
const REGIONS: usize = 4096;
/// Words of pagemap read at once: half a megabyte, a quarter of a gigabyte of memory.
const WORDS: u64 = 1 << 16;

/// Bits of a word of `/proc/PID/pagemap`.
mod word {
    pub const PRESENT: u64 = 1 << 63;
    pub const SWAPPED: u64 = 1 << 62;
    pub const FILE: u64 = 1 << 61;
    pub const GUARD: u64 = 1 << 58;
    pub const SOFT_DIRTY: u64 = 1 << 55;
    /// Mapped by nobody else (Linux 4.2).
    pub const EXCLUSIVE: u64 = 1 << 56;
}

/// `/proc/PID/pagemap`, read in large pieces.
#[derive(Debug)]
pub struct Words {
    file: File,
    buf: Vec<u8>,
}

impl Words {
    /// Of the task of `dir`.
    pub fn open(dir: &ProcDir) -> Result<Self> {
        Ok(Words { file: dir.file("pagemap", OFlag::O_RDONLY)?.into(), buf: Vec::new() })
    }

    /// The file itself, for other questions to it.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Calls `found(start, end, value)` for every longest run of pages in `[start, end)` whose words give the
    /// same `value`.
    fn runs<T: PartialEq + Copy>(
        &mut self,
        start: u64,
        end: u64,
        value: impl Fn(u64) -> T,
        mut found: impl FnMut(u64, u64, T) -> Result<()>,
    ) -> Result<()> {
        let mut run: Option<(u64, T)> = None;
        let mut at = start;
        while at < end {
            let pages = ((end - at) / PAGE_SIZE).clamp(1, WORDS);
            self.buf.resize(pages as usize * 8, 0);
            self.file
                .read_exact_at(&mut self.buf, at / PAGE_SIZE * 8)
                .call("pread(pagemap)")
                .during(|| format!("range {start:x}-{end:x}"))?;
            for word in self.buf.as_chunks::<8>().0 {
                let now = value(u64::from_ne_bytes(*word));
                match run {
                    Some((_, before)) if before == now => {}
                    Some((from, before)) => {
                        found(from, at, before)?;
                        run = Some((at, now));
                    }
                    None => run = Some((at, now)),
                }
                at += PAGE_SIZE;
            }
        }
        run.map_or(Ok(()), |(from, value)| found(from, end, value))
    }

    /// Calls `found(start, end, exclusive)` for every longest run of pages of `[start, end)` that have content of
    /// their own, told apart as by [`Words::sharing`].
    pub fn content(
        &mut self,
        start: u64,
        end: u64,
        mut found: impl FnMut(u64, u64, bool) -> Result<()>,
    ) -> Result<()> {
        let value = |word| {
            let content =
                word & (word::PRESENT | word::SWAPPED) != 0 && word & (word::FILE | word::GUARD) == 0;
            content.then_some(word & word::EXCLUSIVE != 0)
        };
        self.runs(start, end, value, |from, to, had| {
            had.map_or(Ok(()), |exclusive| found(from, to, exclusive))
        })
    }

    /// Calls `found(start, end, exclusive)` for every longest run of pages of `[start, end)` that are mapped by
    /// this task alone, or that may be mapped by others too.
    pub fn sharing(
        &mut self,
        start: u64,
        end: u64,
        found: impl FnMut(u64, u64, bool) -> Result<()>,
    ) -> Result<()> {
        self.runs(start, end, |word| word & word::EXCLUSIVE != 0, found)
    }
}

/// How the kernel remembers which pages were written since they were last dumped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marks {
    /// Soft-dirty bits.
    SoftDirty,
    /// Asynchronous write protection of a userfaultfd; needs PAGEMAP_SCAN.
    WriteProtect,
}

/// Finds pages of one task.
#[derive(Debug)]
pub struct Scanner {
    words: Words,
    scan: bool,
    guards: bool,
    regions: Vec<Region>,
    walk: Option<Walk>,
}

/// Either of these makes content.
const CONTENT: Category = Category::PRESENT.union(Category::SWAPPED);

/// The question for pages with content of their own: neither of a file nor the kernel's page of zeroes.
fn with_content() -> Query {
    let plain = Category::PFNZERO | Category::FILE;
    Query { inverted: plain, all_of: plain, any_of: CONTENT, ..Query::default() }
}

impl Scanner {
    /// For the task of `dir`, which must not run meanwhile.
    pub fn new(dir: &ProcDir, kernel: &Kernel) -> Result<Self> {
        Ok(Scanner {
            words: Words::open(dir)?,
            scan: kernel.pagemap_scan,
            guards: kernel.pagemap_scan_guards,
            regions: vec![Region::default(); REGIONS],
            walk: None,
        })
    }

    /// Uses what a walk has found, which was made since the task stands still.
    #[must_use]
    pub fn knowing(self, walk: Option<Walk>) -> Self {
        Scanner { walk, ..self }
    }

    /// Calls `found(vma, start, end, unchanged)` for every run of pages of `vmas` whose content must be kept, in
    /// order of addresses. `unchanged` is true only where `marks` say that nobody wrote there since the marks
    /// were set. Gives how many pages were looked at, for the statistics.
    pub fn pages(
        &mut self,
        vmas: &[Vma],
        marks: Option<Marks>,
        mut found: impl FnMut(&Vma, u64, u64, bool) -> Result<()>,
    ) -> Result<u64> {
        let mut looked = 0;
        let mut rest = vmas;
        while let Some((first, _)) = rest.split_first() {
            if first.dumps_all() && first.has_pages() {
                looked += (first.entry.end - first.entry.start) / PAGE_SIZE;
                found(first, first.entry.start, first.entry.end, false)?;
            } else if wanted(first) {
                // One question for all that follow each other: gaps between mappings cost nothing.
                let run = if self.scan { rest.iter().take_while(|v| wanted(v)).count() } else { 1 };
                let (these, others) = rest.split_at(run);
                looked += match &self.walk {
                    Some(walk) if marks.is_none() => walk.pages(these, &mut found)?,
                    _ if self.scan => self.by_scan(these, marks, &mut found)?,
                    _ => self.by_words(first, marks, &mut found)?,
                };
                rest = others;
                continue;
            }
            rest = &rest[1..];
        }
        Ok(looked)
    }

    /// What tells guard pages, if the kernel does.
    fn guard(&self) -> Category {
        if self.guards { Category::GUARD } else { Category::empty() }
    }

    /// `vmas` is not empty and ascends.
    fn by_scan(
        &mut self,
        vmas: &[Vma],
        marks: Option<Marks>,
        found: &mut impl FnMut(&Vma, u64, u64, bool) -> Result<()>,
    ) -> Result<u64> {
        // What the categories of an unchanged page are, among those that tell.
        let (telling, unchanged) = match marks {
            None => (Category::empty(), None),
            Some(Marks::SoftDirty) => (Category::SOFT_DIRTY, Some(Category::empty())),
            // Only where write protection is on does "not written" mean anything.
            Some(Marks::WriteProtect) => (Category::WPALLOWED | Category::WRITTEN, Some(Category::WPALLOWED)),
        };
        let query = Query { returned: CONTENT | self.guard() | telling, ..with_content() };
        let end = vmas[vmas.len() - 1].entry.end;
        let mut at = vmas[0].entry.start;
        let mut looked = 0;
        let mut rest = vmas;
        while at < end {
            let (count, walked) = pagemap_scan::scan(&self.words.file, at, end, &query, &mut self.regions)?;
            for region in self.regions[..count].iter().filter(|r| !r.categories().intersects(Category::GUARD))
            {
                looked += (region.end - region.start) / PAGE_SIZE;
                let unchanged = unchanged == Some(region.categories() & telling);
                // A page of a file's private mapping that was dropped leaves a mark which looks like swap.
                let real = region.categories().intersects(Category::PRESENT);
                split(&mut rest, region.start, region.end, &mut |vma: &Vma, from, to| {
                    let told = vma.can_be_tracked() && (real || vma.is(st::ANON_PRIVATE));
                    found(vma, from, to, unchanged && told)
                })?;
            }
            at = pagemap_scan::next(at, walked, &self.regions[..count])?;
        }
        Ok(looked)
    }

    fn by_words(
        &mut self,
        vma: &Vma,
        marks: Option<Marks>,
        found: &mut impl FnMut(&Vma, u64, u64, bool) -> Result<()>,
    ) -> Result<u64> {
        if !vma.touched {
            return Ok(0);
        }
        let (start, end) = (vma.entry.start, vma.entry.end);
        let soft_dirty = marks == Some(Marks::SoftDirty) && vma.can_be_tracked();
        let value = |word| {
            let content =
                word & (word::PRESENT | word::SWAPPED) != 0 && word & (word::FILE | word::GUARD) == 0;
            content.then_some(soft_dirty && word & word::SOFT_DIRTY == 0)
        };
        self.words.runs(start, end, value, |from, to, unchanged| match unchanged {
            Some(unchanged) => found(vma, from, to, unchanged),
            None => Ok(()),
        })?;
        Ok((end - start) / PAGE_SIZE)
    }

    /// Ranges of guard pages (MADV_GUARD_INSTALL), in order. Empty where the kernel cannot tell.
    pub fn guards(&mut self) -> Result<Vec<(u64, u64)>> {
        let mut all = Vec::new();
        if !self.guards {
            return Ok(all);
        }
        let query = Query { all_of: Category::GUARD, returned: Category::GUARD, ..Query::default() };
        let mut at = 0;
        while at < TASK_SIZE {
            let (count, walked) =
                pagemap_scan::scan(&self.words.file, at, TASK_SIZE, &query, &mut self.regions)?;
            for region in &self.regions[..count] {
                push(&mut all, region);
            }
            at = pagemap_scan::next(at, walked, &self.regions[..count])?;
        }
        Ok(all)
    }
}

fn wanted(vma: &Vma) -> bool {
    vma.has_pages() && !vma.dumps_all()
}

/// Hands the part of `[start, end)` in each mapping to `found`; `rest` loses those that end before.
fn split(
    rest: &mut &[Vma],
    mut start: u64,
    end: u64,
    found: &mut impl FnMut(&Vma, u64, u64) -> Result<()>,
) -> Result<()> {
    while start < end {
        let Some(vma) = rest.first() else { return Ok(()) };
        if vma.entry.end <= start {
            *rest = &rest[1..];
            continue;
        }
        let from = start.max(vma.entry.start);
        let to = end.min(vma.entry.end);
        if from < to {
            found(vma, from, to)?;
        }
        start = to.max(start + PAGE_SIZE);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{mm::status as st, pstree::RealPid};
    use rcriu_images::pb::VmaEntry;

    fn vma(start: u64, end: u64, status: u32) -> Vma {
        let entry = VmaEntry { start, end, status, flags: 0x22, prot: 3, ..VmaEntry::default() };
        Vma { entry, name: None, touched: true }
    }

    #[test]
    fn regions_are_split_at_mappings() {
        let anon = st::REGULAR | st::ANON_PRIVATE;
        let vmas = [vma(0x1000, 0x3000, anon), vma(0x3000, 0x4000, anon), vma(0x8000, 0x9000, anon)];
        let mut rest = &vmas[..];
        let mut runs = Vec::new();
        let mut found = |v: &Vma, a, b| {
            runs.push((v.entry.start, a, b));
            Ok(())
        };
        split(&mut rest, 0x2000, 0x4000, &mut found).unwrap();
        split(&mut rest, 0x8000, 0x9000, &mut found).unwrap();
        assert_eq!(runs, [(0x1000, 0x2000, 0x3000), (0x3000, 0x3000, 0x4000), (0x8000, 0x8000, 0x9000)]);
    }

    /// More runs than fit in one answer of the kernel: each is found once.
    #[test]
    fn many_runs_are_found_once_each() {
        let pages = 5 * REGIONS as u64;
        let page = PAGE_SIZE as usize;
        let mut memory = memmap2::MmapOptions::new().len(pages as usize * page).map_anon().unwrap();
        memory.advise(memmap2::Advice::NoHugePage).unwrap();
        for n in (0..pages as usize).step_by(3) {
            memory[n * page] = 1;
        }
        let base = memory.as_ptr() as u64;
        let vmas = [vma(base, base + pages * PAGE_SIZE, st::REGULAR | st::ANON_PRIVATE)];
        let dir = ProcDir::open(RealPid(std::process::id() as i32)).unwrap();
        let mut runs = Vec::new();
        let mut scanner = Scanner::new(&dir, &Kernel::probe().unwrap()).unwrap();
        scanner
            .pages(&vmas, None, |_, a, b, _| {
                runs.push(((a - base) / PAGE_SIZE, (b - base) / PAGE_SIZE));
                Ok(())
            })
            .unwrap();
        assert!(runs.iter().copied().eq((0..pages).step_by(3).map(|n| (n, n + 1))));
    }

    /// All ways of asking find the same pages of our own memory.
    #[test]
    fn touched_pages_are_found_either_way() {
        let page = PAGE_SIZE as usize;
        let mut memory = memmap2::MmapOptions::new().len(64 * page).map_anon().unwrap();
        memory.advise(memmap2::Advice::NoHugePage).unwrap();
        for n in [3, 4, 5, 40] {
            memory[n * page] = 1;
        }
        let base = memory.as_ptr() as u64;
        let anon = st::REGULAR | st::ANON_PRIVATE;
        // As two mappings, so that a run is split between them.
        let vmas =
            [vma(base, base + 4 * PAGE_SIZE, anon), vma(base + 4 * PAGE_SIZE, base + 64 * PAGE_SIZE, anon)];
        let dir = ProcDir::open(RealPid(std::process::id() as i32)).unwrap();
        let mut kernel = Kernel::probe().unwrap();
        let mut answers = Vec::new();
        let scan = kernel.pagemap_scan;
        for (scan, ahead) in [(scan, false), (scan, true), (false, false)] {
            kernel.pagemap_scan = scan;
            let mut runs = Vec::new();
            let mut scanner = Scanner::new(&dir, &kernel).unwrap();
            let walk = if ahead { scanner.walk().unwrap() } else { None };
            scanner
                .knowing(walk)
                .pages(&vmas, None, |_, a, b, _| {
                    runs.push(((a - base) / PAGE_SIZE, (b - base) / PAGE_SIZE));
                    Ok(())
                })
                .unwrap();
            answers.push(runs);
        }
        assert_eq!(answers[0], [(3, 4), (4, 6), (40, 41)]);
        assert!(answers.iter().all(|answer| *answer == answers[0]));
    }
}
