//! From the memory of one task to where its pages go.
//!
//! ```text
//! parent    not copied: the parent images have it
//! direct    the process writes its own pages to the file: one copy, no page is pinned or unshared
//! read      process_vm_readv(2), for pages that nobody else maps; by those who compress them, if there are any
//! mem       /proc/PID/mem: pages that are shared since a fork, or that the process may not read
//! ```
//!
//! Why pages are read in two ways, see [`super::source`].

use rcriu_images::pagemap::{PAGE_SIZE, Place, Region};

use super::{PagesOut, direct::Direct, source::Source};
use crate::{
    error::Result,
    infect::{Infected, pages::MOST},
    interrupt,
    mm::vma::Vma,
    procfs::ProcDir,
    sys::vm,
};

/// Bytes gathered before they are read and written.
const BATCH: u64 = 4 << 20;
/// The same where the process writes them itself; between batches we look for signals.
const BATCH_DIRECT: u64 = 32 << 20;
/// The first of those: the next are twice as long, as what is learnt of the machine in one serves the next.
const BATCH_FIRST: u64 = 8 << 20;
/// Batches end where a huge page may begin: a restore that reads what follows in another way has a page for each.
pub(super) const BLOCK: u64 = 2 << 20;
/// Pieces gathered at most.
const PIECES: usize = MOST.1;
const _: () = assert!(PIECES <= vm::MAX_PIECES && BATCH_DIRECT <= MOST.0);

/// Copies pages of one task, gathered into large batches.
pub struct Copier<'a> {
    dir: &'a ProcDir,
    out: &'a mut PagesOut,
    /// Stack pointers of all threads, as page addresses in order: those pages cannot be lazy.
    stacks: &'a [u64],
    direct: Way<'a>,
    pieces: Vec<Piece>,
    bytes: u64,
    /// Bytes gathered where the process writes them itself.
    batch: u64,
    buf: Vec<u8>,
    source: Source,
    /// The task runs meanwhile.
    running: bool,
    /// What was left out to be served later, in order; none if nothing is.
    served: Option<Vec<(u64, u64)>>,
}

/// Whether the process writes its pages itself.
enum Way<'a> {
    /// It may, once there is enough to be worth while.
    May(&'a Infected<'a>),
    Does(Direct<'a>),
    No,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    pub start: u64,
    pub len: u64,
    pub lazy: bool,
    pub skip_zero: bool,
    pub road: Road,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Road {
    /// Not copied at all.
    Parent,
    /// Not copied, but served later.
    Later,
    /// Direct or read; where shared with others, mem.
    Own,
    Read,
    Mem,
}

impl<'a> Copier<'a> {
    /// Reads through the live thread whose folder `dir` is; `stacks` must be sorted page addresses.
    pub fn new(dir: &'a ProcDir, out: &'a mut PagesOut, stacks: &'a [u64]) -> Result<Self> {
        Ok(Copier {
            dir,
            out,
            stacks,
            direct: Way::No,
            pieces: Vec::new(),
            bytes: 0,
            batch: BATCH_FIRST,
            buf: Vec::new(),
            source: Source::new(dir)?,
            running: false,
            served: None,
        })
    }

    /// The task runs meanwhile: pages that are gone when they are to be read are left out.
    pub fn running(mut self) -> Self {
        self.running = true;
        self
    }

    /// Lets the process write its pages itself, where nothing speaks against it.
    #[must_use]
    pub fn with(mut self, infected: &'a Infected<'a>) -> Self {
        self.direct = Way::May(infected);
        self
    }

    /// Lazy pages are not copied: they are served later, if `serve` says so.
    #[must_use]
    pub fn serving(mut self, serve: bool) -> Self {
        self.served = serve.then(Vec::new);
        self
    }

    /// What was left out for that.
    pub fn served(self) -> Vec<(u64, u64)> {
        self.served.unwrap_or_default()
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
        self.pieces.push(Piece { start, len, lazy: false, skip_zero: false, road: Road::Parent });
        if self.pieces.len() == PIECES { self.flush() } else { Ok(()) }
    }

    fn run(&mut self, vma: &Vma, start: u64, end: u64, lazy: bool) -> Result<()> {
        if let Some(served) = self.served.as_mut().filter(|_| lazy && start < end) {
            served.push((start, end));
            self.pieces.push(Piece { start, len: end - start, lazy, skip_zero: false, road: Road::Later });
            return if self.pieces.len() == PIECES { self.flush() } else { Ok(()) };
        }
        let road = match (vma.readable(), vma.dumps_all()) {
            (true, false) => Road::Own,
            (true, true) => Road::Read,
            (false, _) => Road::Mem,
        };
        let mut at = start;
        while at < end {
            let mut len = (end - at).min(self.batch() - self.bytes);
            let full = len < end - at;
            let over = (at + len) % BLOCK;
            if full && over < len {
                len -= over;
            }
            let piece = Piece { start: at, len, lazy, skip_zero: vma.zero_is_absent(), road };
            match self.pieces.last_mut().filter(|last| piece.continues(last)) {
                Some(last) => last.len += len,
                None => self.pieces.push(piece),
            }
            self.bytes += len;
            at += len;
            if full || self.bytes == self.batch() || self.pieces.len() == PIECES {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn batch(&self) -> u64 {
        if matches!(self.direct, Way::Does(_)) { self.batch } else { BATCH }
    }

    /// Reads and writes what was gathered. To be called at the end.
    pub fn flush(&mut self) -> Result<()> {
        interrupt::check()?;
        if let Way::May(infected) = self.direct
            && self.bytes > BATCH / 2
        {
            self.direct = Direct::new(infected, self.dir, self.out)?.map_or(Way::No, Way::Does);
        }
        let pieces = std::mem::take(&mut self.pieces);
        self.bytes = 0;
        for group in pieces.chunk_by(|a, b| a.road == b.road) {
            match group[0].road {
                Road::Parent => {
                    for piece in group {
                        self.out.parent(piece.start, piece.len / PAGE_SIZE)?;
                    }
                }
                Road::Later => {
                    for Piece { start, len, .. } in group {
                        let pages = len / PAGE_SIZE;
                        let region = Region { vaddr: *start, pages, place: Place::Lazy, lazy: true };
                        self.out.elsewhere(region)?;
                    }
                }
                Road::Own => self.own(group)?,
                Road::Read | Road::Mem => self.copy(group)?,
            }
        }
        self.pieces = pieces;
        self.pieces.clear();
        Ok(())
    }

    fn own(&mut self, group: &[Piece]) -> Result<()> {
        if let Way::Does(direct) = &self.direct {
            if direct.write(group, &mut self.source, self.out)? {
                self.batch = (2 * self.batch).min(BATCH_DIRECT);
                return Ok(());
            }
            // Protection keys or the like: not worth trying again for each of its mappings.
            self.direct = Way::No;
            let all: Vec<Piece> = group.iter().map(|p| Piece { road: Road::Mem, ..*p }).collect();
            return self.copy(&all);
        }
        let mut parts = Vec::with_capacity(group.len());
        for piece in group {
            let before = parts.len();
            let told = self.source.roads(piece, &mut parts);
            match told {
                Err(_) if self.running => {
                    parts.truncate(before);
                    parts.push(Piece { road: Road::Mem, ..*piece });
                }
                other => other?,
            }
        }
        parts.chunk_by(|a, b| a.road == b.road).try_for_each(|group| self.copy(group))
    }

    /// All by one of the two ways, through a buffer or by those who compress.
    fn copy(&mut self, group: &[Piece]) -> Result<()> {
        let still = group[0].road == Road::Read && !self.running;
        if still && self.out.fetches(group.iter().map(|p| p.len).sum()) {
            return self.out.fetch(self.dir.pid(), group);
        }
        for group in parts(group, BATCH) {
            self.copy_batch(&group)?;
        }
        Ok(())
    }

    fn copy_batch(&mut self, group: &[Piece]) -> Result<()> {
        let len: u64 = group.iter().map(|p| p.len).sum();
        let mut buf = std::mem::take(&mut self.buf);
        if buf.len() < len as usize {
            buf.resize(len as usize, 0);
        }
        let bytes = &mut buf[..len as usize];
        let read = self.source.read(group, bytes);
        let written = if !self.running {
            read.and_then(|()| self.write(group, bytes))
        } else if self.dir.read("stat").is_err() {
            // The number may be somebody else's by now, and what was read too.
            Ok(())
        } else if read.is_ok() {
            self.write(group, bytes)
        } else {
            self.page_by_page(group)
        };
        self.buf = buf;
        written
    }

    fn write(&mut self, group: &[Piece], buf: &[u8]) -> Result<()> {
        let mut rest = buf;
        for piece in group {
            let (this, others) = rest.split_at(piece.len as usize);
            piece.write(self.out, piece.start, this)?;
            rest = others;
        }
        Ok(())
    }

    /// Of a running task, when not all pages are there any more.
    fn page_by_page(&mut self, group: &[Piece]) -> Result<()> {
        let mut page = [0; PAGE_SIZE as usize];
        for piece in group {
            for at in (piece.start..piece.start + piece.len).step_by(page.len()) {
                let read = self.source.memory().and_then(|mem| mem.read(at, &mut page));
                if read.is_ok() && self.dir.read("stat").is_ok() {
                    piece.write(self.out, at, &page)?;
                }
            }
        }
        Ok(())
    }
}

impl Piece {
    /// Whether it begins where `before` ends, in the same mapping or in one that is treated alike.
    fn continues(&self, before: &Piece) -> bool {
        before.start + before.len == self.start
            && (before.lazy, before.skip_zero, before.road) == (self.lazy, self.skip_zero, self.road)
    }

    fn write(&self, out: &mut PagesOut, at: u64, bytes: &[u8]) -> Result<()> {
        if self.skip_zero { out.add_nonzero(at, bytes, self.lazy) } else { out.add(at, bytes, self.lazy) }
    }
}

/// Cuts pieces into batches of at most `most` bytes and [`PIECES`] pieces.
pub(super) fn parts(pieces: &[Piece], most: u64) -> Vec<Vec<Piece>> {
    let mut all = vec![Vec::new()];
    let mut bytes = 0;
    for piece in pieces {
        let mut rest = *piece;
        while rest.len > 0 {
            if bytes == most || all.last().is_some_and(|last| last.len() == PIECES) {
                all.push(Vec::new());
                bytes = 0;
            }
            let len = rest.len.min(most - bytes);
            all.last_mut().into_iter().for_each(|last: &mut Vec<Piece>| last.push(Piece { len, ..rest }));
            bytes += len;
            rest = Piece { start: rest.start + len, len: rest.len - len, ..rest };
        }
    }
    all.retain(|batch| !batch.is_empty());
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_that_are_treated_alike_are_one_piece() {
        let piece = |start, road| Piece { start, len: 0x1000, lazy: false, skip_zero: true, road };
        let first = piece(0x1000, Road::Own);
        assert!(piece(0x2000, Road::Own).continues(&first));
        assert!(!piece(0x3000, Road::Own).continues(&first));
        assert!(!piece(0x2000, Road::Mem).continues(&first));
        assert!(!Piece { lazy: true, ..piece(0x2000, Road::Own) }.continues(&first));
        assert!(!Piece { skip_zero: false, ..piece(0x2000, Road::Own) }.continues(&first));
    }

    #[test]
    fn batches_are_neither_long_nor_many() {
        let piece = |start, len| Piece { start, len, lazy: false, skip_zero: true, road: Road::Read };
        let cut = parts(&[piece(0, 3), piece(10, 12), piece(30, 1)], 5);
        let seen: Vec<Vec<_>> = cut.iter().map(|b| b.iter().map(|p| (p.start, p.len)).collect()).collect();
        assert_eq!(seen, [vec![(0, 3), (10, 2)], vec![(12, 5)], vec![(17, 5)], vec![(30, 1)]]);
        let many: Vec<Piece> = (0..PIECES as u64 + 1).map(|i| piece(2 * i, 1)).collect();
        assert_eq!(parts(&many, 1 << 20).iter().map(Vec::len).collect::<Vec<_>>(), [PIECES, 1]);
        assert!(parts(&[], 5).is_empty());
    }
}
