//! Pages: from the images into the mappings of a task.
//!
//! ```text
//! bulk     large reads, by several threads
//! forced   into memory that may not be written
//! units    what is read at a time
//! huge     huge pages where a block is full
//! ```

mod bulk;
mod forced;
mod huge;
mod units;

use rcriu_images::{
    pagemap::{PAGE_SIZE, PageReader, Run, Source, Stored},
    pb,
};

pub use bulk::{Bulk, To};
pub use huge::Huge;

use units::Blocks;

use super::{Pages, Placed, READ_WRITE};
use crate::error::{Error, Result};
use crate::mm::{lazy::OfVma, status as st};
use crate::sys::map::{OwnMemory, Region};

/// Most bytes and pieces gathered before they are read.
const BATCH: u64 = 1 << 30;
const PIECES: usize = 1 << 16;
/// Bytes compared at a time: what is read twice should still be in the cache of the processor, and every page of the
/// buffers is one that a child takes a copy of.
const COMPARED: u64 = 64 << 10;

/// Whether every page of the pagemap lies in a mapping.
///
/// # Errors
/// One that does not: such a page would be lost.
pub fn check_covered(pages: &PageReader, vmas: &[pb::VmaEntry]) -> Result<()> {
    let Some(map) = pages.pagemap(0) else { return Ok(()) };
    let mut vmas = vmas.iter().filter(|v| v.status & st::GUARD == 0).peekable();
    for region in &map.regions {
        let mut at = region.vaddr;
        while at < region.end() {
            while vmas.next_if(|v| v.end <= at).is_some() {}
            match vmas.peek().filter(|v| v.start <= at) {
                Some(vma) => at = vma.end.min(region.end()),
                None => return Err(Error::image(format!("pagemap: page {at:#x} lies in no mapping"))),
            }
        }
    }
    Ok(())
}

/// Whether the images have any page of the range.
pub fn has_content(pages: &PageReader, start: u64, end: u64) -> bool {
    pages.pagemap(0).is_some_and(|map| map.from(start).first().is_some_and(|r| r.vaddr < end))
}

/// What a mapping holds before it is filled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Memory {
    /// What the parent had.
    Inherited,
    /// Nothing.
    Fresh,
    /// Nothing, and it consists of mappings that have their protections already.
    Protected,
}

/// Gives `at` its content. Fresh `memory` has none yet; inherited memory has the parent's. Pages that come late
/// by the `rule` are left out; tells whether there are any.
pub fn fill(
    at: &mut Placed,
    pages: Option<&PageReader>,
    memory: Memory,
    rule: OfVma,
    bulk: &Bulk,
    comparer: &mut Comparer,
    counts: &mut Pages,
) -> Result<bool> {
    let (start, end) = (at.vma.start, at.vma.end);
    let fresh = memory != Memory::Inherited;
    let runs = match pages {
        Some(pages) => pages.runs(start, end),
        None => vec![Run { vaddr: start, len: end - start, source: Source::Absent, lazy: false }],
    };
    if fresh
        && is_code(&at.vma)
        && let Some(pages) = pages
    {
        match force(&at.region, pages, &runs, start, counts) {
            Err(e) if e.errno() == Some(libc::EIO) => {}
            other => return other.map(|()| false),
        }
    }
    if at.prot & READ_WRITE != READ_WRITE && runs.iter().any(|r| r.source != Source::Absent) {
        at.region.protect(at.region.start(), at.region.len(), READ_WRITE)?;
        at.prot = READ_WRITE;
    }
    let delta = at.region.start().wrapping_sub(start);
    let mut late = false;
    let stored = |run: &&Run| matches!(run.source, Source::Stored { .. }) && !rule.is_late(run);
    let full = match memory == Memory::Fresh && bulk.huge.suits(&at.vma) {
        true => runs.iter().filter(stored).map(|run| (run.vaddr, run.vaddr + run.len)).collect(),
        false => Vec::new(),
    };
    let here = full.into_iter().map(|(start, end)| (start.wrapping_add(delta), end.wrapping_add(delta)));
    let to = match memory {
        Memory::Protected => To::Protected,
        _ => To::Writable(Blocks::inside(here, huge::SIZE)),
    };
    let mut batch =
        Batch { region: &at.region, pages, bulk, to, level: 0, offset: 0, len: 0, pieces: Vec::new() };
    for run in runs {
        crate::interrupt::check()?;
        let here = run.vaddr.wrapping_add(delta);
        if rule.is_late(&run) {
            late = true;
            if !fresh {
                at.region.advise(here, run.len, libc::MADV_DONTNEED)?;
            }
            continue;
        }
        match run.source {
            Source::Stored { level, offset } if fresh => {
                counts.restored += run.len / PAGE_SIZE;
                batch.add(level, offset, here, run.len)?;
            }
            Source::Stored { level, offset } => {
                comparer.compare(&at.region, pages, (level, offset), here, run.len, counts)?;
            }
            Source::Absent if fresh => {}
            // The parent may have pages there; those that the child has not are dropped.
            Source::Absent => at.region.advise(here, run.len, libc::MADV_DONTNEED)?,
            Source::Lazy => {
                return Err(Error::image(format!("page {:#x} stayed with the dump", run.vaddr))
                    .remedy("restore with --lazy-pages"));
            }
            Source::Missing => {
                return Err(Error::image(format!("page {:#x} is in none of the parent images", run.vaddr)));
            }
        }
    }
    batch.flush()?;
    Ok(late)
}

/// Whether it is code of a file: pages of it that differ were written by a debugger, never by the program, and
/// a mapping that was never writable is not charged as memory that may be. Making it writable would change that.
pub fn is_code(vma: &pb::VmaEntry) -> bool {
    let (write, exec) = (libc::PROT_WRITE as u32, libc::PROT_EXEC as u32);
    vma.status & st::FILE_PRIVATE != 0 && vma.prot & (write | exec) == exec
}

/// Writes the pages of a mapping that is not writable.
fn force(region: &Region, pages: &PageReader, runs: &[Run], start: u64, counts: &mut Pages) -> Result<()> {
    for run in runs.iter().filter(|r| r.source != Source::Absent) {
        let mut done = 0;
        while done < run.len {
            let len = (run.len - done).min(COMPARED);
            let from = run.vaddr + done;
            let Some(bytes) = pages.read(from, len)? else {
                return Err(Error::image(format!("page {from:#x} is not in the images")));
            };
            region.force(region.start() + (from - start), &bytes)?;
            done += len;
        }
        counts.restored += run.len / PAGE_SIZE;
    }
    Ok(())
}

/// Consecutive bytes of a pages file on their way to several places.
struct Batch<'a> {
    region: &'a Region,
    pages: Option<&'a PageReader>,
    bulk: &'a Bulk,
    to: To,
    level: usize,
    offset: u64,
    len: u64,
    pieces: Vec<(u64, u64)>,
}

impl Batch<'_> {
    fn add(&mut self, level: usize, mut offset: u64, mut at: u64, mut len: u64) -> Result<()> {
        while len > 0 {
            let follows = self.level == level && self.offset + self.len == offset;
            if !follows || self.len >= BATCH || self.pieces.len() >= PIECES {
                self.flush()?;
                (self.level, self.offset) = (level, offset);
            }
            let part = len.min(BATCH - self.len);
            self.pieces.push((at, part));
            self.len += part;
            (offset, at, len) = (offset + part, at + part, len - part);
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        if self.len == 0 {
            return Ok(());
        }
        let missing = || missing(self.pages, self.level, self.offset);
        let stored = self.pages.and_then(|p| p.stored(self.level)).ok_or_else(missing)?;
        if self.bulk.read(self.region, stored, self.offset, &self.pieces, &self.to)? != self.len {
            return Err(missing());
        }
        self.pieces.clear();
        self.len = 0;
        Ok(())
    }
}

/// That a pages file is shorter than its pagemap says.
pub fn missing(pages: Option<&PageReader>, level: usize, offset: u64) -> Error {
    let id = pages.and_then(|p| p.pagemap(level)).map_or(0, |map| map.pages_id);
    Error::image(format!("pages-{id}.img ends before all of what should stand at {offset:#x}"))
}

/// Compares inherited memory with the images; of use in one task.
#[derive(Debug, Default)]
pub struct Comparer {
    memory: Option<OwnMemory>,
    wanted: Vec<u8>,
    have: Vec<u8>,
}

impl Comparer {
    /// Writes those pages of a run that differ from what is there.
    fn compare(
        &mut self,
        region: &Region,
        pages: Option<&PageReader>,
        (level, offset): (usize, u64),
        at: u64,
        len: u64,
        counts: &mut Pages,
    ) -> Result<()> {
        use std::os::unix::fs::FileExt;
        let missing = |at| missing(pages, level, at);
        let stored = pages.and_then(|p| p.stored(level)).ok_or_else(|| missing(offset))?;
        let size = len.min(COMPARED) as usize;
        let Comparer { memory, wanted, have } = self;
        if wanted.len() < size {
            wanted.resize(size, 0);
            have.resize(size, 0);
        }
        let memory = match memory {
            Some(memory) => memory,
            none => none.insert(OwnMemory::open()?),
        };
        let mut done = 0;
        while done < len {
            let part = (len - done).min(COMPARED) as usize;
            let (wanted, have) = (&mut wanted[..part], &mut have[..part]);
            match stored {
                Stored::Packed(packed) => packed.read_exact_at(wanted, offset + done)?,
                Stored::Plain(file) => {
                    file.read_exact_at(wanted, offset + done).map_err(|e| match e.kind() {
                        std::io::ErrorKind::UnexpectedEof => missing(offset + done),
                        _ => Error::io("pread", &e),
                    })?;
                }
            }
            region.read_with(memory, at + done, have)?;
            let page = PAGE_SIZE as usize;
            let differs = |i: usize| wanted[i * page..(i + 1) * page] != have[i * page..(i + 1) * page];
            let total = part / page;
            let mut i = 0;
            while i < total {
                let first = i;
                while i < total && differs(i) {
                    i += 1;
                }
                if i > first {
                    region.write(at + done + (first * page) as u64, &wanted[first * page..i * page])?;
                    counts.restored += (i - first) as u64;
                } else {
                    counts.shared += 1;
                    i += 1;
                }
            }
            counts.compared += total as u64;
            done += part as u64;
        }
        Ok(())
    }
}
