//! Reading compressed pages.

use std::{
    fs::File,
    io::ErrorKind,
    ops::Range,
    os::unix::fs::FileExt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use super::{
    BLOCK,
    blocks::{Blocks, Method},
};
use crate::{
    catalog::ImageKind,
    dir::ImageDir,
    error::{Cause, Error, Result},
    pb,
};

/// Packed bytes that are read at once: those of several blocks, where they are small.
const GATHERED: u64 = BLOCK as u64;

/// What unpacking needs; each thread has its own.
#[derive(Default)]
pub struct Unpacker {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
    packed: Vec<u8>,
    /// The last block of which only a part was wanted.
    block: Vec<u8>,
    which: Option<u64>,
}

impl std::fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unpacker").field("which", &self.which).finish_non_exhaustive()
    }
}

impl Unpacker {
    pub fn new() -> Self {
        Self::default()
    }

    /// Unpacks a block, which must fill `out`.
    pub fn unpack(&mut self, method: Method, packed: &[u8], out: &mut [u8]) -> Result<(), String> {
        let unpacked = match (packed.len(), method) {
            (0, _) => {
                out.fill(0);
                Ok(out.len())
            }
            (n, _) if n == out.len() => {
                out.copy_from_slice(packed);
                Ok(n)
            }
            (_, Method::Zstd) => self.zstd(packed, out).map_err(|e| e.to_string()),
            (_, Method::Lz4) => lz4_flex::block::decompress_into(packed, out).map_err(|e| e.to_string()),
        };
        match unpacked {
            Ok(n) if n == out.len() => Ok(()),
            Ok(n) => Err(format!("it unpacks to {n} bytes instead of {}", out.len())),
            Err(e) => Err(format!("it cannot be unpacked: {e}")),
        }
    }

    fn zstd(&mut self, packed: &[u8], out: &mut [u8]) -> std::io::Result<usize> {
        let zstd = match &mut self.zstd {
            Some(zstd) => zstd,
            none => none.insert(zstd::bulk::Decompressor::new()?),
        };
        zstd.decompress_to_buffer(packed, out)
    }
}

/// The compressed pages that stand for one pages file.
#[derive(Debug)]
pub struct Packed {
    id: u64,
    file: File,
    name: String,
    pub blocks: Arc<Blocks>,
    unpacker: Mutex<Unpacker>,
}

impl Packed {
    /// Opens those of `pages-ID`; `None` if there are none.
    ///
    /// # Errors
    /// Images that contradict each other.
    pub fn open(dir: &ImageDir, id: u64) -> Result<Option<Self>> {
        let Some(mut reader) = dir.reader(ImageKind::RcriuBlocks, id)? else { return Ok(None) };
        let entry: pb::RcriuBlocksEntry = reader.one()?;
        let blocks = Blocks::new(&entry).map_err(|why| reader.bad(why))?;
        let kind = ImageKind::RcriuPages;
        let Some(packed) = Self::with(dir, kind, id, Arc::new(blocks))? else {
            return Err(Error::new(kind.file_name(id), Cause::Missing));
        };
        match packed.surplus()? {
            0 => Ok(Some(packed)),
            more => Err(Error::invalid(packed.name, format!("{more} bytes belong to no block"))),
        }
    }

    /// Opens `pages-ID`, which holds these blocks; `None` if there is no such file.
    ///
    /// # Errors
    /// One that ends before all of them.
    pub(crate) fn of_pages(dir: &ImageDir, id: u64, blocks: Arc<Blocks>) -> Result<Option<Self>> {
        Self::with(dir, ImageKind::Pages, id, blocks)
    }

    fn with(dir: &ImageDir, kind: ImageKind, id: u64, blocks: Arc<Blocks>) -> Result<Option<Self>> {
        let name = kind.file_name(id);
        let Some(file) = dir.open_raw(kind, id)? else { return Ok(None) };
        let left = file.metadata().map_err(|e| Error::sys(&name, "fstat", e))?.len();
        let want = blocks.packed();
        if left < want {
            return Err(Error::new(name, Cause::Truncated { want, left }));
        }
        Ok(Some(Self { id, file, name, blocks, unpacker: Mutex::default() }))
    }

    /// Bytes of the file that belong to no block.
    ///
    /// # Errors
    /// The length of the file cannot be told.
    pub fn surplus(&self) -> Result<u64> {
        let size = self.file.metadata().map_err(|e| Error::sys(&self.name, "fstat", e))?.len();
        Ok(size.saturating_sub(self.blocks.packed()))
    }

    /// Number of the pages file that they stand for.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Unpacks all blocks, by all processors, and gives those that cannot be: which pages, and why.
    pub fn damaged(&self) -> Vec<(Range<u64>, String)> {
        let next = AtomicU64::new(0);
        let run = || {
            let mut found = Vec::new();
            let (mut with, mut out) = (Unpacker::new(), Vec::new());
            loop {
                let block = next.fetch_add(1, Ordering::Relaxed);
                if block >= self.blocks.count() {
                    return found;
                }
                let pages = self.blocks.pages(block);
                out.resize((pages.end - pages.start) as usize, 0);
                if let Err(e) = self.unpack(&mut with, block, &mut out) {
                    found.push((pages, e.cause().to_string()));
                }
            }
        };
        let threads =
            thread::available_parallelism().map_or(1, |n| n.get()).min(self.blocks.count() as usize);
        let mut found = thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(run)).collect();
            let mut found = run();
            found.extend(others.into_iter().filter_map(|other| other.join().ok()).flatten());
            found
        });
        found.sort_by_key(|(pages, _)| pages.start);
        found
    }

    /// File name of the blocks.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Reads the bytes that would be at `offset` of the pages file.
    ///
    /// # Errors
    /// A range behind the last page; blocks that are damaged.
    pub fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut unpacker = self.unpacker.lock().unwrap_or_else(PoisonError::into_inner);
        self.read_with(&mut unpacker, buf, offset)
    }

    /// The same with an unpacker of the caller's, for several threads at once.
    pub fn read_with(&self, with: &mut Unpacker, buf: &mut [u8], offset: u64) -> Result<()> {
        let left = self.blocks.len().saturating_sub(offset);
        if (buf.len() as u64) > left {
            return Err(Error::new(&self.name, Cause::Truncated { want: buf.len() as u64, left }));
        }
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let block = self.blocks.with(at);
            let pages = self.blocks.pages(block);
            let len = (pages.end - at).min(rest.len() as u64);
            if len == pages.end - pages.start {
                let done = self.unpack_some(with, block, rest)?;
                (at, rest) = (at + done as u64, &mut rest[done..]);
                continue;
            }
            if with.which != Some(block) {
                let mut whole = std::mem::take(&mut with.block);
                whole.resize((pages.end - pages.start) as usize, 0);
                with.which = None;
                let done = self.unpack(with, block, &mut whole);
                with.block = whole;
                done?;
                with.which = Some(block);
            }
            let (this, others) = rest.split_at_mut(len as usize);
            this.copy_from_slice(&with.block[(at - pages.start) as usize..][..len as usize]);
            (at, rest) = (at + len, others);
        }
        Ok(())
    }

    fn unpack(&self, with: &mut Unpacker, block: u64, out: &mut [u8]) -> Result<()> {
        self.unpack_some(with, block, out).map(drop)
    }

    /// Unpacks a block, which `out` has room for, and whole ones behind it as far as there is room and their bytes
    /// follow each other in the file; gives the number of bytes in `out`.
    fn unpack_some(&self, with: &mut Unpacker, block: u64, out: &mut [u8]) -> Result<usize> {
        let mut bytes = self.blocks.bytes(block);
        let mut ends = vec![(self.blocks.pages(block), bytes.clone())];
        let first = ends[0].0.start;
        for next in block + 1..self.blocks.count() {
            let (pages, theirs) = (self.blocks.pages(next), self.blocks.bytes(next));
            let fits = pages.end - first <= out.len() as u64 && theirs.end - bytes.start <= GATHERED;
            if !fits || theirs.start != bytes.end {
                break;
            }
            bytes.end = theirs.end;
            ends.push((pages, theirs));
        }
        let mut packed = std::mem::take(&mut with.packed);
        packed.resize((bytes.end - bytes.start) as usize, 0);
        let read = self.file.read_exact_at(&mut packed, bytes.start).map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof => Error::invalid(&self.name, "it became shorter while it was read"),
            _ => Error::sys(&self.name, "pread", e),
        });
        let done = read.and_then(|()| {
            for (n, (pages, theirs)) in ends.iter().enumerate() {
                let packed =
                    &packed[(theirs.start - bytes.start) as usize..(theirs.end - bytes.start) as usize];
                let out = &mut out[(pages.start - first) as usize..(pages.end - first) as usize];
                with.unpack(self.blocks.method(), packed, out).map_err(|why| {
                    let block = block + n as u64;
                    Error::invalid(&self.name, format!("block {block} at {:#x}: {why}", theirs.start))
                })?;
            }
            Ok(ends.last().map_or(0, |(pages, _)| (pages.end - first) as usize))
        });
        with.packed = packed;
        done
    }
}
