//! Content of pages: from a task's memory to `pages-N.img`, with the pagemap that says what they are.
//!
//! ```text
//! copier     runs of pages, gathered; how each is read
//! source     reading them from outside
//! direct     written by the process itself
//! uncached   some of those written here meanwhile, past the page cache
//! fetched    read by those who compress them
//! ```
//!
//! Pages full of zeros in memory that reads as zero when absent are not written: that also covers the huge
//! zero page, which the kernel does not report as such.

mod copier;
mod direct;
mod fetched;
mod source;
mod uncached;

use std::{
    collections::VecDeque,
    fs::File,
    io::Seek,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use nix::{
    fcntl::{FallocateFlags, fallocate},
    sys::{
        resource::{RLIM_INFINITY, Resource, getrlimit},
        statfs::{EXT4_SUPER_MAGIC, fstatfs},
    },
};
use rcriu_images::{
    ImageDir, ImageKind,
    packed::is_zero,
    pagemap::{PAGE_SIZE, Place, Region},
    sums::Known,
};

use self::fetched::Later;
use self::uncached::Uncached;
pub use self::{copier::Copier, source::Source};
use super::{sink::Sink, xfer::Link};
use crate::error::{Result, SysContext};

/// Bytes that a page file is given at once at most, as it grows.
const RESERVED: u64 = 1 << 30;

/// Where pages go: the image folder, the numbers of page files, and what was counted.
#[derive(Debug, Clone)]
pub struct PageStore {
    pub images: ImageDir,
    shared: Arc<Shared>,
    /// Sums of pages that go past the page cache, if sums are wanted: what is in it can be read back.
    known: Option<Arc<Known>>,
}

#[derive(Debug)]
struct Shared {
    next: AtomicU32,
    /// Pages go to a page server instead.
    link: Option<Arc<Link>>,
    /// Pages are compressed, at this level.
    compress: Option<i32>,
    counts: Counts,
}

/// Pages of shared memory looked at and written.
#[derive(Debug, Default)]
pub struct Counts {
    pub shmem_scanned: AtomicU64,
    pub shmem_written: AtomicU64,
}

impl PageStore {
    pub fn new(images: ImageDir) -> Self {
        PageStore::with(images, 1, None, None)
    }

    fn with(images: ImageDir, first: u32, link: Option<Link>, compress: Option<i32>) -> Self {
        let link = link.map(Arc::new);
        let shared = Shared { next: AtomicU32::new(first), link, compress, counts: Counts::default() };
        PageStore { images, shared: Arc::new(shared), known: None }
    }

    /// Pages go through `link` if there is one; no page file is written here then. Otherwise they are compressed if
    /// a level is given.
    pub fn of_dump(images: ImageDir, link: Option<Link>, compress: Option<i32>) -> Self {
        PageStore::with(images, 1, link, compress)
    }

    /// Makes sums if `yes`: see [`PageStore::known`].
    #[must_use]
    pub fn with_sums(self, yes: bool) -> Self {
        PageStore { known: yes.then(Arc::default), ..self }
    }

    /// Sums of pages that are written so far and are not in the page cache.
    pub fn known(&self) -> Arc<Known> {
        self.known.clone().unwrap_or_default()
    }

    /// Of a page server: its page files have numbers that those of a dump into the same folder have not.
    pub fn of_server(images: ImageDir) -> Self {
        PageStore::with(images, 0x1_0001, None, None)
    }

    /// The connection to the page server, if pages go to one.
    pub fn link(&self) -> Option<&Link> {
        self.shared.link.as_deref()
    }

    /// All objects are complete: a page server confirms that it has them.
    pub fn finish(&self) -> Result<()> {
        self.link().map_or(Ok(()), Link::finish)
    }

    /// What was counted so far.
    pub fn counts(&self) -> &Counts {
        &self.shared.counts
    }

    /// Begins the pagemap `kind` of object `id` and the page file that belongs to it.
    pub fn create(&self, kind: ImageKind, id: u64) -> Result<PagesOut> {
        let mut known = None;
        let sink = match &self.shared.link {
            Some(link) => Sink::server(link, kind, id)?,
            None => {
                let pages_id = self.shared.next.fetch_add(1, Ordering::Relaxed);
                known = self.known.clone().map(|known| (known, pages_id));
                match self.shared.compress {
                    Some(level) => Sink::packed(&self.images, kind, id, pages_id, level)?,
                    None => Sink::files(&self.images, kind, id, pages_id)?,
                }
            }
        };
        let waiting = VecDeque::new();
        Ok(PagesOut {
            sink,
            open: None,
            written: 0,
            in_parent: 0,
            reserved: 0,
            expected: 0,
            uncached: Beside::Untried,
            known,
            waiting,
        })
    }
}

/// A pagemap and its pages, being written.
#[derive(Debug)]
pub struct PagesOut {
    sink: Sink,
    /// The region that may still grow.
    open: Option<Region>,
    written: u64,
    in_parent: u64,
    /// Where the blocks that the page file was given end; it may be longer than its content then.
    reserved: u64,
    /// Length that it is expected to have, 0 if nobody knows.
    expected: u64,
    uncached: Beside,
    /// Where sums of what goes past the page cache go, and the number of the page file.
    known: Option<(Arc<Known>, u32)>,
    /// Regions behind memory that is being fetched.
    waiting: VecDeque<Later>,
}

/// The way past the page cache, beside that through it.
#[derive(Debug)]
enum Beside {
    Never,
    Untried,
    Open(Box<Uncached>),
}

impl PagesOut {
    /// Appends whole pages that lie at `vaddr`; addresses must ascend.
    pub fn add(&mut self, vaddr: u64, bytes: &[u8], lazy: bool) -> Result<()> {
        let pages = bytes.len() as u64 / PAGE_SIZE;
        self.written += pages;
        // What comes before is complete on the way to a page server.
        self.region(Region { vaddr, pages, place: Place::Present { first: 0 }, lazy })?;
        self.sink.content(vaddr, bytes, lazy)
    }

    /// The page file, where pages go there as they are: what is appended to it is then told to
    /// [`PagesOut::stored`].
    pub fn file(&mut self) -> Result<Option<&File>> {
        self.sink.file()
    }

    /// Gives the page file the blocks for `len` more bytes, where that makes writing them faster: on ext4 there is
    /// no reservation for each block then. Tells whether the file is that long now.
    fn reserve(&mut self, len: u64) -> Result<bool> {
        let Some(mut file) = self.sink.file()? else { return Ok(false) };
        if !fstatfs(file).is_ok_and(|fs| fs.filesystem_type() == EXT4_SUPER_MAGIC) {
            return Ok(false);
        }
        // Where files may not become longer than so much, one that seems to be is a signal that ends us.
        let limited = getrlimit(Resource::RLIMIT_FSIZE).is_ok_and(|(soft, _)| soft != RLIM_INFINITY);
        let mode = if limited { FallocateFlags::FALLOC_FL_KEEP_SIZE } else { FallocateFlags::empty() };
        let at = file.stream_position().call("lseek")?;
        let end = at + len;
        if self.reserved < end {
            // What is on its way past the page cache is waited for meanwhile, so that this is to be rare.
            // Not more than is expected: others may need the room.
            let more = at.min(RESERVED).min(self.expected.saturating_sub(end));
            let from = self.reserved.max(at);
            let reserve =
                |upto: u64| fallocate(file, mode, from.cast_signed(), (upto - from).cast_signed()).is_ok();
            // A file system that has no room says so when it is written to.
            self.reserved =
                [end + more, end].into_iter().find(|upto| reserve(*upto)).unwrap_or(self.reserved);
        }
        Ok(self.reserved >= end && !limited)
    }

    /// About so many bytes are to be expected in all.
    fn expect(&mut self, bytes: u64) {
        self.expected = bytes;
        if bytes < uncached::FROM {
            self.uncached = Beside::Never;
        }
    }

    /// Makes ready for a batch of at most `len` bytes; the way past the page cache, if a part of it may go there.
    fn uncached(&mut self, len: u64) -> Result<Option<Box<Uncached>>> {
        let long = self.reserve(len)?;
        let Some(file) = self.sink.file()? else { return Ok(None) };
        if !long {
            return Ok(None);
        }
        Ok(match std::mem::replace(&mut self.uncached, Beside::Never) {
            Beside::Never => None,
            Beside::Untried => Uncached::open(file, self.known.is_some()).map(Box::new),
            Beside::Open(uncached) => Some(uncached),
        })
    }

    /// Takes back what [`PagesOut::uncached`] gave; if the batch was not `written`, the page file has lost its
    /// blocks.
    fn give_back(&mut self, uncached: Option<Box<Uncached>>, written: bool) {
        if let Some(uncached) = uncached {
            self.uncached = Beside::Open(uncached);
        }
        if !written {
            self.reserved = 0;
        }
    }

    /// Takes sums of pages from `offset` of the page file on.
    fn summed(&self, offset: u64, sums: Vec<u32>) {
        if let Some((known, id)) = &self.known {
            known.add(ImageKind::Pages, (*id).into(), offset, sums);
        }
    }

    /// Says that `pages` pages that lie at `vaddr` were appended to the page file; addresses must ascend.
    pub fn stored(&mut self, vaddr: u64, pages: u64, lazy: bool) -> Result<()> {
        self.written += pages;
        self.region(Region { vaddr, pages, place: Place::Present { first: 0 }, lazy })
    }

    /// Says that the `pages` pages at `vaddr` are in the parent images; addresses must ascend.
    pub fn parent(&mut self, vaddr: u64, pages: u64) -> Result<()> {
        self.in_parent += pages;
        self.region(Region { vaddr, pages, place: Place::Parent, lazy: false })
    }

    /// Takes a region whose content is not written here; addresses must ascend.
    pub fn elsewhere(&mut self, region: Region) -> Result<()> {
        if region.place == Place::Parent {
            self.in_parent += region.pages;
        }
        self.region(region)
    }

    /// Whether the parent images of the page server have this object; `None` when pages go to files here.
    pub fn server_has_parent(&self) -> Option<bool> {
        self.sink.server_has_parent()
    }

    fn region(&mut self, new: Region) -> Result<()> {
        if !self.waiting.is_empty() {
            self.waiting.push_back(Later::Region(new));
            return Ok(());
        }
        self.region_now(new)
    }

    fn region_now(&mut self, new: Region) -> Result<()> {
        match &mut self.open {
            Some(open) if open.end() == new.vaddr && (open.place, open.lazy) == (new.place, new.lazy) => {
                open.pages += new.pages;
            }
            open => {
                if let Some(done) = open.replace(new) {
                    self.sink.region(&done)?;
                }
            }
        }
        Ok(())
    }

    /// Like [`PagesOut::add`], but leaves out pages that are zero.
    pub fn add_nonzero(&mut self, vaddr: u64, bytes: &[u8], lazy: bool) -> Result<()> {
        let page = PAGE_SIZE as usize;
        let mut at = 0;
        while at < bytes.len() {
            let zero = is_zero(&bytes[at..at + page]);
            let run = bytes[at..].chunks(page).take_while(|p| is_zero(p) == zero).count() * page;
            if !zero {
                self.add(vaddr + at as u64, &bytes[at..at + run], lazy)?;
            }
            at += run;
        }
        Ok(())
    }

    /// Completes both images; gives what went into them.
    pub fn finish(mut self) -> Result<Written> {
        self.fetched_all()?;
        if let Some(open) = self.open.take() {
            self.sink.region(&open)?;
        }
        if (self.reserved > 0 || matches!(self.uncached, Beside::Open(_)))
            && let Some(mut file) = self.sink.file()?
        {
            if let Beside::Open(uncached) = &mut self.uncached {
                uncached.finish(file)?;
            }
            if self.reserved > 0 {
                let end = file.stream_position().call("lseek")?;
                file.set_len(end).call("ftruncate")?;
            }
        }
        self.sink.finish()?;
        Ok(Written { written: self.written, in_parent: self.in_parent })
    }
}

/// Pages of a pagemap.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Written {
    /// In its page file.
    pub written: u64,
    /// Left to the parent images.
    pub in_parent: u64,
}

#[cfg(test)]
mod tests;
