//! Writing compressed pages: blocks are packed by several threads while the caller brings the next ones.

use std::sync::Arc;

use super::{
    BLOCK, BLOCK_PAGES, Memory, Piece, Run, Unread, ZSTD,
    crew::Crew,
    packer::{Done, Packer, Work},
};
use crate::{
    catalog::ImageKind,
    dir::{ImageDir, ImageWriter},
    error::{Error, Result},
    pagemap::PAGE_SIZE,
    pb,
};

/// Bytes handed over at a time.
const JOB: usize = 4 * BLOCK;
/// Jobs on their way at most, for each thread: what bounds the memory.
const WAITING: usize = 3;

/// Takes pages in order and writes them packed.
///
/// Threads are there only while there is much to pack, and have ended when [`finish`](PackedWriter::finish)
/// returns, or the writer is dropped.
#[derive(Debug)]
pub struct PackedWriter {
    /// Where the pages would be uncompressed: a stale file of that name must go.
    plain: ImageWriter,
    out: ImageWriter,
    index: ImageWriter,
    level: i32,
    /// Bytes that each block takes, and its pages.
    blocks: Vec<(u32, u32)>,
    /// What is not whole yet.
    open: Vec<u8>,
    crew: Option<Crew>,
    /// What was found where memory was read here, for each job in order.
    fetched: Vec<Vec<Run>>,
    unread: Option<Unread>,
}

impl PackedWriter {
    /// Begins the compressed pages that stand for `pages-ID`.
    pub fn create(dir: &ImageDir, id: u64, level: i32) -> Self {
        Self {
            plain: dir.writer(ImageKind::Pages, id),
            out: dir.writer(ImageKind::RcriuPages, id),
            index: dir.writer(ImageKind::RcriuBlocks, id),
            level,
            blocks: Vec::new(),
            open: Vec::new(),
            crew: None,
            fetched: Vec::new(),
            unread: None,
        }
    }

    /// Appends whole pages.
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let part = bytes.len().min(JOB - self.open.len());
            self.open.extend_from_slice(&bytes[..part]);
            bytes = &bytes[part..];
            if self.open.len() == JOB {
                self.hand_over()?;
            }
        }
        Ok(())
    }

    /// Whether so many bytes of memory are worth to be [`fetch`](PackedWriter::fetch)ed.
    pub fn fetches(&self, bytes: u64) -> bool {
        self.crew.is_some() || bytes >= JOB as u64
    }

    /// Appends pages that those who pack them read themselves: while they are in the cache of a processor, and
    /// without a copy for the way. Gives the number of jobs; each answers in [`fetched`](PackedWriter::fetched).
    ///
    /// # Errors
    /// Images that cannot be written; memory that cannot be read, now or by a job of before, which
    /// [`unread`](PackedWriter::unread) tells.
    pub fn fetch(&mut self, memory: &Arc<dyn Memory>, pieces: &[Piece]) -> Result<usize> {
        if !self.open.is_empty() {
            self.hand_over()?;
        }
        let jobs = jobs(pieces);
        let count = jobs.len();
        for pieces in jobs {
            self.give(Work::Memory(Arc::clone(memory), pieces))?;
        }
        Ok(count)
    }

    /// What the next jobs have found, in order; empty where all was zero.
    pub fn fetched(&mut self) -> Vec<Vec<Run>> {
        std::mem::take(&mut self.fetched)
    }

    /// Why memory could not be read.
    pub fn unread(&mut self) -> Option<Unread> {
        self.unread.take()
    }

    fn hand_over(&mut self) -> Result<()> {
        let spare = self.crew.as_mut().and_then(|crew| crew.spare.pop());
        let raw = std::mem::replace(&mut self.open, spare.unwrap_or_default());
        self.give(Work::Bytes(raw))
    }

    fn give(&mut self, work: Work) -> Result<()> {
        let (name, level) = (self.out.name().to_owned(), self.level);
        let crew = match &mut self.crew {
            Some(crew) => crew,
            none => none.insert(Crew::start(level).map_err(|e| Error::sys(&name, "pthread_create", e))?),
        };
        crew.give(work);
        let most = crew.size() * WAITING;
        self.take(most)
    }

    /// Writes what was packed until no more than `most` jobs are on their way.
    fn take(&mut self, most: usize) -> Result<()> {
        while let Some(crew) = self.crew.as_mut().filter(|crew| crew.waiting() > most) {
            let done = crew.take(self.out.name())?;
            self.put(&done)?;
            if let Some(unread) = done.unread {
                let why = std::io::Error::from_raw_os_error(unread.errno);
                let error = Error::sys(self.out.name(), "reading memory", why);
                self.unread.get_or_insert(unread);
                return Err(error);
            }
            self.fetched.extend(done.runs);
            if let Some(crew) = &mut self.crew {
                crew.reuse(done.raw, done.packed);
            }
        }
        Ok(())
    }

    /// Writes blocks that were packed.
    fn put(&mut self, done: &Done) -> Result<()> {
        self.blocks.extend_from_slice(&done.blocks);
        if done.packed.is_empty() { Ok(()) } else { self.out.write_raw(&done.packed) }
    }

    /// Waits until all jobs are done.
    pub fn drain(&mut self) -> Result<()> {
        self.take(0)
    }

    /// Completes the images.
    pub fn finish(mut self) -> Result<()> {
        self.drain()?;
        if !self.open.is_empty() {
            let mut packer =
                Packer::new(self.level).map_err(|e| Error::sys(self.out.name(), "ZSTD_createCCtx", e))?;
            let done = packer.pack(Work::Bytes(std::mem::take(&mut self.open)), Vec::new());
            self.put(&done)?;
        }
        self.plain.finish()?;
        if !self.blocks.is_empty() {
            // Also where all of them are zeros and take no bytes.
            self.out.as_file()?;
            let whole = self.blocks.iter().rev().skip(1).all(|(_, pages)| *pages == BLOCK_PAGES);
            let most = self.blocks.iter().map(|(_, pages)| *pages).max().unwrap_or(0);
            self.index.write(&pb::RcriuBlocksEntry {
                method: ZSTD,
                block: if whole { BLOCK_PAGES } else { most },
                pages: self.blocks.iter().map(|(_, pages)| u64::from(*pages)).sum(),
                length: self.blocks.iter().map(|(len, _)| *len).collect(),
                count: if whole { Vec::new() } else { self.blocks.iter().map(|(_, pages)| *pages).collect() },
            })?;
        }
        self.out.finish()?;
        self.index.finish()
    }
}

/// Cuts pieces into jobs.
fn jobs(pieces: &[Piece]) -> Vec<Vec<Piece>> {
    let (mut all, mut room) = (Vec::new(), 0);
    for piece in pieces {
        let (mut start, mut left) = (piece.start, piece.len);
        while left > 0 {
            if room == 0 {
                all.push(Vec::new());
                room = JOB as u64;
            }
            let len = left.min(room);
            all.last_mut()
                .into_iter()
                .for_each(|job: &mut Vec<Piece>| job.push(Piece { start, len, ..*piece }));
            (start, left, room) = (start + len, left - len, room - len);
        }
    }
    all
}

const _: () = assert!(JOB.is_multiple_of(BLOCK) && BLOCK.is_multiple_of(PAGE_SIZE as usize));
