//! Reading compressed pages.

use std::{
    fs::File,
    io::ErrorKind,
    ops::Range,
    os::unix::fs::FileExt,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use super::{MAX_BLOCK_PAGES, ZSTD};
use crate::{
    catalog::ImageKind,
    dir::ImageDir,
    error::{Cause, Error, Result},
    pagemap::PAGE_SIZE,
    pb,
};

/// Where the blocks of a file are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocks {
    /// Bytes of a whole block when unpacked.
    block: u64,
    /// Bytes of all pages.
    len: u64,
    /// Where each block begins, and where the last one ends.
    starts: Vec<u64>,
    /// The same in bytes when unpacked, where not all but the last are whole.
    firsts: Option<Vec<u64>>,
}

impl Blocks {
    /// Takes what an image says, if it makes sense.
    pub fn new(entry: &pb::RcriuBlocksEntry) -> Result<Self, String> {
        if entry.method != ZSTD {
            return Err(format!("method {} of packing is not known", entry.method));
        }
        if entry.block == 0 || entry.block > MAX_BLOCK_PAGES {
            return Err(format!("blocks of {} pages: 1 to {MAX_BLOCK_PAGES} can be read", entry.block));
        }
        let firsts = firsts(entry)?;
        // No more than the blocks that are listed: cannot overflow.
        let (block, len) = (u64::from(entry.block) * PAGE_SIZE, entry.pages * PAGE_SIZE);
        let mut blocks = Self { block, len, starts: Vec::with_capacity(entry.length.len() + 1), firsts };
        let mut at = 0u64;
        for (n, &length) in entry.length.iter().enumerate() {
            blocks.starts.push(at);
            let pages = blocks.pages(n as u64);
            let whole = pages.end - pages.start;
            if u64::from(length) > whole {
                return Err(format!("block {n} of {whole} bytes takes {length}"));
            }
            at += u64::from(length);
        }
        blocks.starts.push(at);
        Ok(blocks)
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.starts.len() as u64 - 1
    }

    /// Bytes of all pages.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes that all blocks take.
    pub fn packed(&self) -> u64 {
        self.starts.last().copied().unwrap_or(0)
    }

    /// Which pages a block has, as bytes of the pages file it stands for.
    pub fn pages(&self, block: u64) -> Range<u64> {
        if let Some(firsts) = &self.firsts {
            return firsts[block as usize]..firsts[block as usize + 1];
        }
        let start = (block * self.block).min(self.len);
        start..(start + self.block).min(self.len)
    }

    /// The block that has the byte at `at`, which must be before the end.
    fn with(&self, at: u64) -> u64 {
        match &self.firsts {
            Some(firsts) => firsts.partition_point(|first| *first <= at) as u64 - 1,
            None => at / self.block,
        }
    }

    /// The bytes it takes.
    fn bytes(&self, block: u64) -> Range<u64> {
        self.starts[block as usize]..self.starts[block as usize + 1]
    }

    /// Which pages the given bytes of the file of blocks are needed for. Blocks of zeroes take no bytes: several may
    /// begin at one place, also behind the last byte.
    pub fn pages_of(&self, bytes: &Range<u64>) -> Range<u64> {
        let Some(end) = self.count().checked_sub(1) else { return 0..0 };
        let first = (self.starts.partition_point(|s| *s <= bytes.start).saturating_sub(1) as u64).min(end);
        let last =
            (self.starts.partition_point(|s| *s < bytes.end).saturating_sub(1) as u64).clamp(first, end);
        self.pages(first).start..self.pages(last).end
    }
}

/// Where each block begins when unpacked, and where the last one ends; `None` if all but the last are whole.
fn firsts(entry: &pb::RcriuBlocksEntry) -> Result<Option<Vec<u64>>, String> {
    let listed = entry.length.len() as u64;
    if entry.count.is_empty() {
        let blocks = entry.pages.div_ceil(entry.block.into());
        return match blocks == listed {
            true => Ok(None),
            false => Err(format!("{} pages take {blocks} blocks, there are {listed}", entry.pages)),
        };
    }
    if entry.count.len() as u64 != listed {
        return Err(format!("{listed} blocks, and pages of {} blocks", entry.count.len()));
    }
    let mut firsts = Vec::with_capacity(entry.count.len() + 1);
    let mut at = 0;
    for (n, &pages) in entry.count.iter().enumerate() {
        if pages == 0 || pages > entry.block {
            return Err(format!("block {n} has {pages} pages: 1 to {} can be in it", entry.block));
        }
        firsts.push(at);
        at += u64::from(pages) * PAGE_SIZE;
    }
    firsts.push(at);
    if entry.count.iter().all(|pages| *pages < entry.block) {
        return Err(format!("no block has {} pages, which the largest should have", entry.block));
    }
    if at / PAGE_SIZE != entry.pages {
        return Err(format!("the blocks have {} pages instead of {}", at / PAGE_SIZE, entry.pages));
    }
    Ok(Some(firsts))
}

/// What unpacking needs; each thread has its own.
pub struct Unpacker {
    zstd: zstd::bulk::Decompressor<'static>,
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
    pub fn new() -> std::io::Result<Self> {
        let zstd = zstd::bulk::Decompressor::new()?;
        Ok(Self { zstd, packed: Vec::new(), block: Vec::new(), which: None })
    }

    /// Unpacks a block, which must fill `out`.
    pub fn unpack(&mut self, packed: &[u8], out: &mut [u8]) -> Result<(), String> {
        match packed.len() {
            0 => out.fill(0),
            n if n == out.len() => out.copy_from_slice(packed),
            _ => match self.zstd.decompress_to_buffer(packed, out) {
                Ok(n) if n == out.len() => {}
                Ok(n) => return Err(format!("it unpacks to {n} bytes instead of {}", out.len())),
                Err(e) => return Err(format!("it cannot be unpacked: {e}")),
            },
        }
        Ok(())
    }
}

/// The compressed pages that stand for one pages file.
#[derive(Debug)]
pub struct Packed {
    id: u64,
    file: File,
    name: String,
    pub blocks: Blocks,
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
        let name = ImageKind::RcriuPages.file_name(id);
        let Some(file) = dir.open_raw(ImageKind::RcriuPages, id)? else {
            return Err(Error::new(name, Cause::Missing));
        };
        let size = file.metadata().map_err(|e| Error::sys(&name, "fstat", e))?.len();
        if size < blocks.packed() {
            return Err(Error::new(name, Cause::Truncated { want: blocks.packed(), left: size }));
        }
        if size > blocks.packed() {
            return Err(Error::invalid(name, format!("{} bytes belong to no block", size - blocks.packed())));
        }
        let unpacker = Unpacker::new().map_err(|e| Error::sys(&name, "ZSTD_createDCtx", e))?;
        Ok(Some(Self { id, file, name, blocks, unpacker: Mutex::new(unpacker) }))
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
            let (Ok(mut with), mut out) = (Unpacker::new(), Vec::new()) else { return found };
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
        let left = self.blocks.len.saturating_sub(offset);
        if (buf.len() as u64) > left {
            return Err(Error::new(&self.name, Cause::Truncated { want: buf.len() as u64, left }));
        }
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let block = self.blocks.with(at);
            let pages = self.blocks.pages(block);
            let len = (pages.end - at).min(rest.len() as u64);
            let (this, others) = rest.split_at_mut(len as usize);
            if len == pages.end - pages.start {
                self.unpack(with, block, this)?;
            } else {
                if with.which != Some(block) {
                    let mut whole = std::mem::take(&mut with.block);
                    whole.resize((pages.end - pages.start) as usize, 0);
                    with.which = None;
                    let done = self.unpack(with, block, &mut whole);
                    with.block = whole;
                    done?;
                    with.which = Some(block);
                }
                this.copy_from_slice(&with.block[(at - pages.start) as usize..][..len as usize]);
            }
            at += len;
            rest = others;
        }
        Ok(())
    }

    fn unpack(&self, with: &mut Unpacker, block: u64, out: &mut [u8]) -> Result<()> {
        let bytes = self.blocks.bytes(block);
        let mut packed = std::mem::take(&mut with.packed);
        packed.resize((bytes.end - bytes.start) as usize, 0);
        let read = self.file.read_exact_at(&mut packed, bytes.start).map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof => Error::invalid(&self.name, "it became shorter while it was read"),
            _ => Error::sys(&self.name, "pread", e),
        });
        let done = read.and_then(|()| {
            with.unpack(&packed, out).map_err(|why| {
                Error::invalid(&self.name, format!("block {block} at {:#x}: {why}", bytes.start))
            })
        });
        with.packed = packed;
        done
    }
}
