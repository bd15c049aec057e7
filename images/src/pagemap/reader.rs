//! Finding and reading pages through the chain of parents.

use std::{fs::File, os::unix::fs::FileExt};

use super::{PAGE_SIZE, Pagemap, Place, addressed, addressed::ADDRESS, later};
use crate::{
    catalog::ImageKind,
    dir::ImageDir,
    error::{Error, Result},
    packed::Packed,
};

/// Where the bytes of a run are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// At this byte of the pages file of a level; level 0 is the newest set.
    Stored { level: usize, offset: u64 },
    /// With the server that answers page faults.
    Lazy,
    /// Not in the images.
    Absent,
    /// A pagemap says the parent has it, and the parent does not.
    Missing,
}

/// Consecutive bytes with one source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    pub vaddr: u64,
    /// Length in bytes.
    pub len: u64,
    pub source: Source,
    /// Marked by the newest set as one that may be filled on demand.
    pub lazy: bool,
}

/// The pages of one task or shared memory object, over all sets of an incremental dump.
#[derive(Debug)]
pub struct PageReader {
    levels: Vec<Level>,
}

#[derive(Debug)]
struct Level {
    map: Pagemap,
    /// None if the pages file is absent, as it is when nothing is stored.
    pages: Option<Stored>,
    name: String,
    layout: Layout,
}

/// What holds the stored pages of a level.
#[derive(Debug)]
pub enum Stored {
    /// The pages file.
    Plain(File),
    /// Blocks in its place; offsets are those that pages would have in the pages file.
    Packed(Box<Packed>),
}

impl Stored {
    /// Opens what there is of the pages that a pagemap of this folder speaks of.
    ///
    /// # Errors
    /// Compressed pages that are not all there, or that the inventory knows nothing of.
    pub fn open(dir: &ImageDir, map: &Pagemap) -> Result<Option<Self>> {
        let id = map.pages_id.into();
        let packed = match &map.blocks {
            Some(blocks) => {
                later::check_inventory(dir)?;
                Packed::of_pages(dir, id, blocks.clone())?
            }
            None => match dir.open_raw(ImageKind::Pages, id)? {
                Some(file) => return Ok(Some(Stored::Plain(file))),
                None => Packed::open(dir, id)?,
            },
        };
        Ok(packed.map(Box::new).map(Stored::Packed))
    }

    /// Bytes of all pages.
    pub fn size(&self) -> std::io::Result<u64> {
        match self {
            Stored::Plain(file) => Ok(file.metadata()?.len()),
            Stored::Packed(packed) => Ok(packed.blocks.len()),
        }
    }
}

/// How a pages file is laid out.
#[derive(Debug, Clone, Copy)]
enum Layout {
    /// Page after page.
    Plain,
    /// As sets without pagemaps have it: behind `head` bytes, each page has its address before it.
    Addressed { head: u64 },
}

impl Layout {
    /// Byte offset of a stored page.
    fn offset(self, page: u64) -> u64 {
        match self {
            Layout::Plain => page * PAGE_SIZE,
            Layout::Addressed { head } => head + page * (PAGE_SIZE + ADDRESS) + ADDRESS,
        }
    }
}

impl PageReader {
    /// Opens the pagemap of `id` and of its parents; `None` if the newest set has none. The chain ends
    /// at the first parent without this pagemap.
    pub fn open(dir: &ImageDir, kind: ImageKind, id: u64) -> Result<Option<Self>> {
        let mut levels = Vec::new();
        for dir in dir.chain()? {
            if let Some(map) = Pagemap::read(&dir, kind, id)? {
                let pages = Stored::open(&dir, &map)?;
                let name = ImageKind::Pages.file_name(map.pages_id.into());
                levels.push(Level { map, pages, name, layout: Layout::Plain });
            } else if let Some((map, pages, head)) = addressed::read(&dir, kind, id)? {
                let name = addressed::kind_of(kind).file_name(id);
                let (pages, layout) = (Some(Stored::Plain(pages)), Layout::Addressed { head });
                levels.push(Level { map, pages, name, layout });
            } else {
                break;
            }
        }
        Ok(if levels.is_empty() { None } else { Some(Self { levels }) })
    }

    /// How many sets take part.
    pub fn levels(&self) -> usize {
        self.levels.len()
    }

    /// The pagemap of a level.
    pub fn pagemap(&self, level: usize) -> Option<&Pagemap> {
        self.levels.get(level).map(|l| &l.map)
    }

    /// The pages file of a level, where it has one: not if its pages are compressed.
    pub fn pages(&self, level: usize) -> Option<&File> {
        match self.stored(level)? {
            Stored::Plain(file) => Some(file),
            Stored::Packed(_) => None,
        }
    }

    /// What holds the pages of a level.
    pub fn stored(&self, level: usize) -> Option<&Stored> {
        self.levels.get(level)?.pages.as_ref()
    }

    /// Whether pages of some level are compressed.
    pub fn any_packed(&self) -> bool {
        self.levels.iter().any(|level| matches!(level.pages, Some(Stored::Packed(_))))
    }

    /// Reads the bytes of a [`Source::Stored`].
    ///
    /// # Errors
    /// A pages file that is missing, shorter, damaged.
    pub fn read_stored(&self, level: usize, buf: &mut [u8], offset: u64) -> Result<()> {
        let Some(level) = self.levels.get(level) else {
            return Err(Error::invalid("pagemap", format!("there is no level {level}")));
        };
        let want = buf.len();
        let cut = |left| {
            let text = format!("truncated: {want} bytes at {offset} wanted, {left} left");
            Error::invalid(&level.name, text)
        };
        match &level.pages {
            None => Err(cut(0)),
            Some(Stored::Packed(packed)) => packed.read_exact_at(buf, offset),
            Some(Stored::Plain(file)) => match file.read_exact_at(buf, offset) {
                Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
                    Err(cut(file.metadata().map_or(0, |m| m.len().saturating_sub(offset))))
                }
                Err(e) => Err(Error::sys(&level.name, "pread", e)),
                Ok(()) => Ok(()),
            },
        }
    }

    /// What the range consists of, in order and without gaps. Neighbours in the same file are one run.
    pub fn runs(&self, start: u64, end: u64) -> Vec<Run> {
        let mut runs = Vec::new();
        self.resolve(0, start, end, &mut runs);
        runs
    }

    fn resolve(&self, level: usize, start: u64, end: u64, runs: &mut Vec<Run>) {
        let none = if level == 0 { Source::Absent } else { Source::Missing };
        let mut at = start;
        let regions = self.levels.get(level).map_or(&[][..], |l| l.map.from(start));
        for region in regions.iter().take_while(|r| r.vaddr < end) {
            if at < region.vaddr {
                push(runs, at, region.vaddr, none, false);
                at = region.vaddr;
            }
            let upto = region.end().min(end);
            match region.place {
                Place::Present { first } => {
                    let lazy = level == 0 && region.lazy;
                    self.resolve_stored((level, first, lazy), at - region.vaddr, at, upto, runs);
                }
                Place::Parent => self.resolve(level + 1, at, upto, runs),
                Place::Lazy => push(runs, at, upto, Source::Lazy, level == 0),
            }
            at = upto;
        }
        push(runs, at, end, none, false);
    }

    /// Bytes `at` to `upto`, which begin `into` bytes after the stored page `first`.
    fn resolve_stored(
        &self,
        (level, first, lazy): (usize, u64, bool),
        into: u64,
        at: u64,
        upto: u64,
        runs: &mut Vec<Run>,
    ) {
        let layout = self.levels[level].layout;
        if let Layout::Plain = layout {
            let offset = layout.offset(first) + into;
            return push(runs, at, upto, Source::Stored { level, offset }, lazy);
        }
        let mut at = at;
        let mut into = into;
        while at < upto {
            let in_page = into % PAGE_SIZE;
            let next = upto.min(at + (PAGE_SIZE - in_page));
            let offset = layout.offset(first + into / PAGE_SIZE) + in_page;
            push(runs, at, next, Source::Stored { level, offset }, lazy);
            into += next - at;
            at = next;
        }
    }

    /// The bytes at `vaddr`; `None` if not all of them are stored. Memory is asked for as they are found,
    /// so a wrong `len` costs nothing.
    pub fn read(&self, vaddr: u64, len: u64) -> Result<Option<Vec<u8>>> {
        let Some(end) = vaddr.checked_add(len) else { return Ok(None) };
        let runs = self.runs(vaddr, end);
        if !runs.iter().all(|r| matches!(r.source, Source::Stored { .. })) {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        for run in runs {
            let Source::Stored { level, offset } = run.source else { return Ok(None) };
            let Level { pages, name, .. } = &self.levels[level];
            let have =
                pages.as_ref().map_or(Ok(0), Stored::size).map_err(|e| Error::sys(name, "fstat", e))?;
            let left = have.saturating_sub(offset);
            if left < run.len {
                let text = format!("truncated: {} bytes at {offset} wanted, {left} left", run.len);
                return Err(Error::invalid(name, text));
            }
            let from = bytes.len();
            bytes.resize(from + run.len as usize, 0);
            self.read_stored(level, &mut bytes[from..], offset)?;
        }
        Ok(Some(bytes))
    }
}

fn push(runs: &mut Vec<Run>, start: u64, end: u64, source: Source, lazy: bool) {
    if start >= end {
        return;
    }
    if let Some(last) = runs.last_mut() {
        let follows = match (last.source, source) {
            (Source::Stored { level: a, offset }, Source::Stored { level: b, offset: next }) => {
                a == b && offset + last.len == next
            }
            (a, b) => a == b,
        };
        if follows && last.lazy == lazy {
            last.len += end - start;
            return;
        }
    }
    runs.push(Run { vaddr: start, len: end - start, source, lazy });
}
