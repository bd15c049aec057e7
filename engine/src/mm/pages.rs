//! Content of pages: from a task's memory to `pages-N.img`, with the pagemap that says what they are.
//!
//! Runs are gathered into one large read of many pieces and one large write. Pages full of zeros in memory
//! that reads as zero when absent are not written: that also covers the huge zero page, which the kernel
//! does not report as such.
//!
//! process_vm_readv(2) is the fast way to read, but it pins pages, and since Linux 5.19 pinning gives the task
//! its own copy of a page that it shares with parent or child since a fork. Such pages are read through
//! `/proc/PID/mem`, which leaves them shared.

use std::sync::{
    Arc,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

use nix::sys::uio::RemoteIoVec;
use rcriu_images::{
    ImageDir, ImageKind,
    pagemap::{PAGE_SIZE, Place, Region},
};

use super::{pagemap::Words, sink::Sink, vma::Vma, xfer::Link};
use crate::{
    error::{Error, Result},
    interrupt,
    procfs::ProcDir,
    pstree::RealPid,
    sys::vm::{self, MemFile},
};

/// Bytes gathered before they are read and written.
const BATCH: u64 = 4 << 20;

/// Where pages go: the image folder, the numbers of page files, and what was counted.
#[derive(Debug, Clone)]
pub struct PageStore {
    pub images: ImageDir,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    next: AtomicU32,
    /// Pages go to a page server instead.
    link: Option<Arc<Link>>,
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
        PageStore::with(images, 1, None)
    }

    fn with(images: ImageDir, first: u32, link: Option<Link>) -> Self {
        let shared =
            Shared { next: AtomicU32::new(first), link: link.map(Arc::new), counts: Counts::default() };
        PageStore { images, shared: Arc::new(shared) }
    }

    /// Pages go through `link` if there is one; no page file is written here then.
    pub fn sending(images: ImageDir, link: Option<Link>) -> Self {
        PageStore::with(images, 1, link)
    }

    /// Of a page server: its page files have numbers that those of a dump into the same folder have not.
    pub fn of_server(images: ImageDir) -> Self {
        PageStore::with(images, 0x1_0001, None)
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
        let sink = match &self.shared.link {
            Some(link) => Sink::server(link, kind, id)?,
            None => {
                let pages_id = self.shared.next.fetch_add(1, Ordering::Relaxed);
                Sink::files(&self.images, kind, id, pages_id)?
            }
        };
        Ok(PagesOut { sink, open: None, written: 0, in_parent: 0 })
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
        if let Some(open) = self.open.take() {
            self.sink.region(&open)?;
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

/// Whether all bytes are 0.
fn is_zero(page: &[u8]) -> bool {
    // Words first: most pages differ early.
    let (head, words, tail) = page
        .as_chunks::<8>()
        .0
        .split_first()
        .map_or((0, &[][..], page), |(h, w)| (u64::from_ne_bytes(*h), w, page.as_chunks::<8>().1));
    head == 0 && words.iter().all(|w| u64::from_ne_bytes(*w) == 0) && tail.iter().all(|b| *b == 0)
}

/// Copies pages of one task, gathered into large batches.
pub struct Copier<'a> {
    dir: &'a ProcDir,
    tid: RealPid,
    out: &'a mut PagesOut,
    /// Stack pointers of all threads, as page addresses in order: those pages cannot be lazy.
    stacks: &'a [u64],
    pieces: Vec<Piece>,
    bytes: u64,
    buf: Vec<u8>,
    mem: Option<MemFile>,
    words: Words,
    parts: Vec<(u64, u64, bool)>,
    /// The task runs meanwhile.
    running: bool,
}

#[derive(Debug, Clone, Copy)]
struct Piece {
    start: u64,
    len: u64,
    lazy: bool,
    skip_zero: bool,
    /// By process_vm_readv.
    fast: bool,
    /// Not read at all: the parent images have it.
    parent: bool,
}

impl<'a> Copier<'a> {
    /// Reads through the live thread whose folder `dir` is; `stacks` must be sorted page addresses.
    pub fn new(dir: &'a ProcDir, out: &'a mut PagesOut, stacks: &'a [u64]) -> Result<Self> {
        let words = Words::open(dir)?;
        Ok(Copier {
            dir,
            tid: dir.pid(),
            out,
            stacks,
            pieces: Vec::new(),
            bytes: 0,
            buf: Vec::new(),
            mem: None,
            words,
            parts: Vec::new(),
            running: false,
        })
    }

    /// The task runs meanwhile: pages that are gone when they are to be read are left out.
    pub fn running(mut self) -> Self {
        self.running = true;
        self
    }

    /// Takes `[start, end)` of `vma`; addresses must ascend.
    pub fn add(&mut self, vma: &Vma, start: u64, end: u64) -> Result<()> {
        if !vma.may_be_lazy() {
            return self.run(vma, start, end, false);
        }
        let mut at = start;
        let from = self.stacks.partition_point(|s| *s < start);
        for stack in self.stacks[from..].iter().take_while(|s| **s < end) {
            self.run(vma, at, *stack, true)?;
            self.run(vma, *stack, stack + PAGE_SIZE, false)?;
            at = stack + PAGE_SIZE;
        }
        self.run(vma, at, end, true)
    }

    /// Leaves `[start, end)` to the parent images; addresses must ascend.
    pub fn parent(&mut self, start: u64, end: u64) -> Result<()> {
        let len = end - start;
        self.pieces.push(Piece { start, len, lazy: false, skip_zero: false, fast: true, parent: true });
        if self.pieces.len() == vm::MAX_PIECES { self.flush() } else { Ok(()) }
    }

    fn run(&mut self, vma: &Vma, start: u64, end: u64, lazy: bool) -> Result<()> {
        if !vma.readable() || vma.dumps_all() {
            return self.piece(vma, start, end, lazy, vma.readable());
        }
        let mut parts = std::mem::take(&mut self.parts);
        let told = self.words.sharing(start, end, |from, to, exclusive| {
            parts.push((from, to, exclusive));
            Ok(())
        });
        match told {
            Err(_) if self.running => {
                parts.clear();
                parts.push((start, end, false));
            }
            other => other?,
        }
        for (from, to, exclusive) in parts.drain(..) {
            self.piece(vma, from, to, lazy, exclusive)?;
        }
        self.parts = parts;
        Ok(())
    }

    fn piece(&mut self, vma: &Vma, start: u64, end: u64, lazy: bool, fast: bool) -> Result<()> {
        let mut at = start;
        while at < end {
            let len = (end - at).min(BATCH - self.bytes);
            self.pieces.push(Piece {
                start: at,
                len,
                lazy,
                skip_zero: vma.zero_is_absent(),
                fast,
                parent: false,
            });
            self.bytes += len;
            at += len;
            if self.bytes == BATCH || self.pieces.len() == vm::MAX_PIECES {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Reads and writes what was gathered. To be called at the end.
    pub fn flush(&mut self) -> Result<()> {
        interrupt::check()?;
        let mut buf = std::mem::take(&mut self.buf);
        buf.resize(self.bytes as usize, 0);
        let read = self.read(&mut buf);
        let written = if !self.running {
            read.and_then(|()| self.write(&buf))
        } else if self.dir.read("stat").is_err() {
            // The number may be somebody else's by now, and what was read too.
            self.write_parents()
        } else if read.is_ok() {
            self.write(&buf)
        } else {
            self.page_by_page()
        };
        self.buf = buf;
        self.pieces.clear();
        self.bytes = 0;
        written
    }

    fn read(&mut self, buf: &mut [u8]) -> Result<()> {
        let mut at = 0;
        for group in self.pieces.chunk_by(|a, b| (a.fast, a.parent) == (b.fast, b.parent)) {
            if group[0].parent {
                continue;
            }
            let len: u64 = group.iter().map(|p| p.len).sum();
            let part = &mut buf[at..at + len as usize];
            if group[0].fast {
                read_pieces(self.tid, group, part)?;
            } else {
                let mem = memory(&mut self.mem, self.tid)?;
                let mut part = part;
                for piece in group {
                    let (this, others) = part.split_at_mut(piece.len as usize);
                    mem.read(piece.start, this).map_err(|e| unreadable(piece, e))?;
                    part = others;
                }
            }
            at += len as usize;
        }
        Ok(())
    }

    fn write(&mut self, buf: &[u8]) -> Result<()> {
        let mut rest = buf;
        for piece in &self.pieces {
            if piece.parent {
                self.out.parent(piece.start, piece.len / PAGE_SIZE)?;
                continue;
            }
            let (this, others) = rest.split_at(piece.len as usize);
            piece.write(self.out, piece.start, this)?;
            rest = others;
        }
        Ok(())
    }

    fn write_parents(&mut self) -> Result<()> {
        let mut parents = self.pieces.iter().filter(|p| p.parent);
        parents.try_for_each(|p| self.out.parent(p.start, p.len / PAGE_SIZE))
    }

    /// Of a running task, when not all pages are there any more.
    fn page_by_page(&mut self) -> Result<()> {
        let mut page = [0; PAGE_SIZE as usize];
        for piece in &self.pieces {
            if piece.parent {
                self.out.parent(piece.start, piece.len / PAGE_SIZE)?;
                continue;
            }
            for at in (piece.start..piece.start + piece.len).step_by(page.len()) {
                let read = memory(&mut self.mem, self.tid).and_then(|mem| mem.read(at, &mut page));
                if read.is_ok() && self.dir.read("stat").is_ok() {
                    piece.write(self.out, at, &page)?;
                }
            }
        }
        Ok(())
    }
}

impl Piece {
    fn write(&self, out: &mut PagesOut, at: u64, bytes: &[u8]) -> Result<()> {
        if self.skip_zero { out.add_nonzero(at, bytes, self.lazy) } else { out.add(at, bytes, self.lazy) }
    }
}

fn memory(mem: &mut Option<MemFile>, tid: RealPid) -> Result<&mut MemFile> {
    Ok(match mem {
        Some(mem) => mem,
        none => none.insert(MemFile::open(tid)?),
    })
}

fn read_pieces(tid: RealPid, pieces: &[Piece], buf: &mut [u8]) -> Result<()> {
    let remote: Vec<_> =
        pieces.iter().map(|p| RemoteIoVec { base: p.start as usize, len: p.len as usize }).collect();
    let got = vm::read_pieces(tid, &remote, buf)? as u64;
    if got == buf.len() as u64 {
        return Ok(());
    }
    let mut before = 0;
    let piece = pieces.iter().find(|p| {
        before += p.len;
        before > got
    });
    let error = Error::sys("process_vm_readv", libc::EFAULT);
    Err(piece.map_or(error.clone(), |p| unreadable(p, error)))
}

fn unreadable(piece: &Piece, e: Error) -> Error {
    e.during(format!("content of {:x}-{:x}", piece.start, piece.start + piece.len))
        .remedy("guard pages of madvise need Linux 6.15 or later to be recognised")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mm::status as st;
    use rcriu_images::pagemap::PageReader;

    fn store() -> (tempfile::TempDir, PageStore) {
        let dir = tempfile::tempdir().unwrap();
        let store = PageStore::new(ImageDir::open(dir.path()).unwrap());
        (dir, store)
    }

    #[test]
    fn zero_is_told_from_nonzero() {
        let mut page = vec![0u8; 4096];
        assert!(is_zero(&page));
        for at in [0, 7, 8, 4095] {
            page[at] = 1;
            assert!(!is_zero(&page));
            page[at] = 0;
        }
    }

    #[test]
    fn neighbours_join_and_zero_pages_vanish() {
        let (dir, store) = store();
        let mut out = store.create(ImageKind::Pagemap, 7).unwrap();
        let mut bytes = vec![0u8; 4 * 4096];
        bytes[0] = 1;
        bytes[3 * 4096] = 2;
        out.add_nonzero(0x1000, &bytes, true).unwrap();
        out.add(0x5000, &bytes[..4096], true).unwrap();
        out.add(0x6000, &bytes[4096..8192], false).unwrap();
        assert_eq!(out.finish().unwrap(), Written { written: 4, in_parent: 0 });
        let reader = PageReader::open(&store.images, ImageKind::Pagemap, 7).unwrap().unwrap();
        let regions = &reader.pagemap(0).unwrap().regions;
        let seen: Vec<_> = regions.iter().map(|r| (r.vaddr, r.pages, r.lazy)).collect();
        assert_eq!(seen, [(0x1000, 1, true), (0x4000, 2, true), (0x6000, 1, false)]);
        assert_eq!(std::fs::metadata(dir.path().join("pages-1.img")).unwrap().len(), 4 * 4096);
        assert_eq!(reader.read(0x4000, 4096).unwrap().unwrap(), bytes[3 * 4096..]);
    }

    #[test]
    fn memory_is_copied_whatever_its_protection() {
        let (_dir, store) = store();
        let page = 4096;
        let len = (BATCH as usize) + 3 * page;
        let mut memory = memmap2::MmapOptions::new().len(len).map_anon().unwrap();
        for (n, chunk) in memory.chunks_mut(page).enumerate() {
            chunk[..8].copy_from_slice(&(n as u64 + 1).to_ne_bytes());
        }
        let base = memory.as_ptr() as u64;
        let me = ProcDir::open(RealPid(std::process::id() as i32)).unwrap();
        for prot in [3, 0] {
            let entry = rcriu_images::pb::VmaEntry {
                start: base,
                end: base + len as u64,
                status: st::REGULAR | st::ANON_PRIVATE,
                flags: 0x22,
                prot,
                ..Default::default()
            };
            let vma = Vma { entry, name: None, touched: true };
            let mut out = store.create(ImageKind::Pagemap, u64::from(prot)).unwrap();
            let stack = [base + 5 * PAGE_SIZE];
            let mut copier = Copier::new(&me, &mut out, &stack).unwrap();
            copier.add(&vma, base, base + len as u64).unwrap();
            copier.flush().unwrap();
            assert_eq!(out.finish().unwrap().written as usize, len / page);
            let reader = PageReader::open(&store.images, ImageKind::Pagemap, prot.into()).unwrap().unwrap();
            let lazy: Vec<_> = reader.pagemap(0).unwrap().regions.iter().map(|r| (r.pages, r.lazy)).collect();
            assert_eq!(lazy, [(5, true), (1, false), (len as u64 / PAGE_SIZE - 6, true)]);
            assert_eq!(reader.read(base, len as u64).unwrap().unwrap(), &memory[..]);
        }
    }

    #[test]
    fn memory_that_is_gone_is_named() {
        let (_dir, store) = store();
        let entry = rcriu_images::pb::VmaEntry {
            start: 0x1000,
            end: 0x2000,
            status: st::REGULAR | st::ANON_PRIVATE,
            prot: 1,
            ..Default::default()
        };
        let vma = Vma { entry, name: None, touched: true };
        let mut out = store.create(ImageKind::Pagemap, 1).unwrap();
        let me = ProcDir::open(RealPid(std::process::id() as i32)).unwrap();
        let mut copier = Copier::new(&me, &mut out, &[]).unwrap();
        copier.add(&vma, 0x1000, 0x2000).unwrap();
        let e = copier.flush().unwrap_err().to_string();
        assert!(e.starts_with("content of 1000-2000: "), "{e}");
    }
}
