//! Writing compressed pages: blocks are packed by several threads while the caller brings the next ones.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, Sender, channel},
    },
    thread::{self, JoinHandle},
};

use super::{BLOCK, BLOCK_PAGES, ZSTD};
use crate::{
    catalog::ImageKind,
    dir::{ImageDir, ImageWriter},
    error::{Error, Result},
    pagemap::PAGE_SIZE,
    pb,
};

/// Blocks handed over at a time.
const PER_JOB: usize = 4;
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
    pages: u64,
    lengths: Vec<u32>,
    /// What is not whole yet.
    open: Vec<u8>,
    crew: Option<Crew>,
}

impl PackedWriter {
    /// Begins the compressed pages that stand for `pages-ID`.
    pub fn create(dir: &ImageDir, id: u64, level: i32) -> Self {
        Self {
            plain: dir.writer(ImageKind::Pages, id),
            out: dir.writer(ImageKind::RcriuPages, id),
            index: dir.writer(ImageKind::RcriuBlocks, id),
            level,
            pages: 0,
            lengths: Vec::new(),
            open: Vec::new(),
            crew: None,
        }
    }

    /// Appends whole pages.
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        self.pages += bytes.len() as u64 / PAGE_SIZE;
        while !bytes.is_empty() {
            let part = bytes.len().min(PER_JOB * BLOCK - self.open.len());
            self.open.extend_from_slice(&bytes[..part]);
            bytes = &bytes[part..];
            if self.open.len() == PER_JOB * BLOCK {
                self.hand_over()?;
            }
        }
        Ok(())
    }

    fn hand_over(&mut self) -> Result<()> {
        let name = self.out.name().to_owned();
        let crew = match &mut self.crew {
            Some(crew) => crew,
            none => none.insert(Crew::start(self.level).map_err(|e| Error::sys(&name, "pthread_create", e))?),
        };
        let raw = std::mem::replace(&mut self.open, crew.spare.pop().unwrap_or_default());
        crew.give(raw);
        while crew.waiting() > crew.threads.len() * WAITING {
            let done = crew.take(&name)?;
            put(&mut self.out, &mut self.lengths, &done)?;
            crew.reuse(done);
        }
        Ok(())
    }

    /// Completes the images.
    pub fn finish(mut self) -> Result<()> {
        let name = self.out.name().to_owned();
        if let Some(mut crew) = self.crew.take() {
            while crew.waiting() > 0 {
                let done = crew.take(&name)?;
                put(&mut self.out, &mut self.lengths, &done)?;
            }
        }
        if !self.open.is_empty() {
            let mut packer = Packer::new(self.level).map_err(|e| Error::sys(&name, "ZSTD_createCCtx", e))?;
            let done = packer.pack(std::mem::take(&mut self.open), Vec::new());
            put(&mut self.out, &mut self.lengths, &done)?;
        }
        self.plain.finish()?;
        if self.pages > 0 {
            // Also where all of them are zeros and take no bytes.
            self.out.as_file()?;
            self.index.write(&pb::RcriuBlocksEntry {
                method: ZSTD,
                block: BLOCK_PAGES,
                pages: self.pages,
                length: self.lengths,
            })?;
        }
        self.out.finish()?;
        self.index.finish()
    }
}

/// Writes blocks that were packed.
fn put(out: &mut ImageWriter, lengths: &mut Vec<u32>, done: &Done) -> Result<()> {
    let mut at = 0;
    for (block, raw) in done.blocks.iter().zip(done.raw.chunks(BLOCK)) {
        let bytes = match *block {
            Block::Zero => &[][..],
            Block::Raw => raw,
            Block::Packed(len) => {
                at += len;
                &done.packed[at - len..at]
            }
        };
        out.write_raw(bytes)?;
        lengths.push(bytes.len() as u32);
    }
    Ok(())
}

/// How a block is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Block {
    Zero,
    Raw,
    /// As so many of the packed bytes.
    Packed(usize),
}

/// Blocks after packing.
#[derive(Debug, Default)]
struct Done {
    raw: Vec<u8>,
    packed: Vec<u8>,
    blocks: Vec<Block>,
}

struct Packer(zstd::bulk::Compressor<'static>);

impl Packer {
    fn new(level: i32) -> std::io::Result<Self> {
        let mut zstd = zstd::bulk::Compressor::new(level)?;
        // Sums are made of the files, if they are wanted; lengths are in the index.
        zstd.include_checksum(false)?;
        Ok(Self(zstd))
    }

    /// Packs the blocks of `raw`, the last of which may be shorter.
    fn pack(&mut self, raw: Vec<u8>, mut packed: Vec<u8>) -> Done {
        packed.resize(raw.len(), 0);
        let (mut at, mut blocks) = (0, Vec::with_capacity(PER_JOB));
        for block in raw.chunks(BLOCK) {
            if block.iter().all(|b| *b == 0) {
                blocks.push(Block::Zero);
                continue;
            }
            // Less than a sixteenth is not worth the unpacking; no room is an error.
            let room = block.len() - block.len() / 16;
            match self.0.compress_to_buffer(block, &mut packed[at..at + room]) {
                Ok(len) => {
                    blocks.push(Block::Packed(len));
                    at += len;
                }
                Err(_) => blocks.push(Block::Raw),
            }
        }
        Done { raw, packed, blocks }
    }
}

type Job = (u64, Vec<u8>, Vec<u8>);

/// Threads that pack.
#[derive(Debug)]
struct Crew {
    jobs: Option<Sender<Job>>,
    done: Receiver<(u64, Done)>,
    threads: Vec<JoinHandle<()>>,
    /// Numbers of the next job, and of the next that is to be written.
    next: u64,
    written: u64,
    /// What was packed out of turn.
    early: BTreeMap<u64, Done>,
    spare: Vec<Vec<u8>>,
    spare_packed: Vec<Vec<u8>>,
}

impl Crew {
    fn start(level: i32) -> std::io::Result<Self> {
        let (jobs, taken) = channel::<Job>();
        let (give, done) = channel();
        let taken = Arc::new(Mutex::new(taken));
        let mut threads = Vec::new();
        for _ in 0..thread::available_parallelism().map_or(1, |n| n.get()) {
            let (taken, give, mut packer) = (Arc::clone(&taken), give.clone(), Packer::new(level)?);
            let work = move || {
                loop {
                    let job = taken.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok((number, raw, packed)) = job else { return };
                    if give.send((number, packer.pack(raw, packed))).is_err() {
                        return;
                    }
                }
            };
            match thread::Builder::new().name("pack".into()).spawn(work) {
                Ok(thread) => threads.push(thread),
                // As many as there may be.
                Err(_) if !threads.is_empty() => break,
                Err(e) => return Err(e),
            }
        }
        Ok(Self {
            jobs: Some(jobs),
            done,
            threads,
            next: 0,
            written: 0,
            early: BTreeMap::new(),
            spare: Vec::new(),
            spare_packed: Vec::new(),
        })
    }

    fn give(&mut self, raw: Vec<u8>) {
        let packed = self.spare_packed.pop().unwrap_or_default();
        if let Some(jobs) = &self.jobs {
            // Threads that are gone are noticed when their answer is waited for.
            let _ = jobs.send((self.next, raw, packed));
        }
        self.next += 1;
    }

    fn waiting(&self) -> usize {
        (self.next - self.written) as usize
    }

    /// The next in order.
    fn take(&mut self, name: &str) -> Result<Done> {
        loop {
            if let Some(done) = self.early.remove(&self.written) {
                self.written += 1;
                return Ok(done);
            }
            match self.done.recv() {
                Ok((number, done)) => _ = self.early.insert(number, done),
                Err(_) => return Err(Error::invalid(name, "a thread that packs pages has died")),
            }
        }
    }

    fn reuse(&mut self, done: Done) {
        let Done { mut raw, packed, .. } = done;
        raw.clear();
        self.spare.push(raw);
        self.spare_packed.push(packed);
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        drop(self.jobs.take());
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
