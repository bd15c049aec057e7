//! Where the blocks of a file of compressed pages are.

use std::ops::Range;

use super::{MAX_BLOCK_PAGES, ZSTD, entries::Entries};
use crate::{pagemap::PAGE_SIZE, pb};

/// How blocks are packed that are neither zeros nor stand there as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// A frame of zstd.
    Zstd,
    /// LZ4 in its block format.
    Lz4,
}

/// The blocks of a file, by their numbers from 0 on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocks {
    /// Bytes of all pages.
    len: u64,
    list: List,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum List {
    /// One after the other, as `rcriu-blocks` images list them.
    Index {
        /// Bytes of a whole block when unpacked.
        block: u64,
        /// Where each block begins, and where the last one ends.
        starts: Vec<u64>,
        /// The same in bytes when unpacked, where not all but the last are whole.
        firsts: Option<Vec<u64>>,
    },
    /// As the entries of a pagemap list them.
    Entries(Entries),
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
        let mut starts = Vec::with_capacity(entry.length.len() + 1);
        let mut at = 0u64;
        for (n, &length) in entry.length.iter().enumerate() {
            starts.push(at);
            let pages = pages(n as u64, block, len, firsts.as_deref());
            let whole = pages.end - pages.start;
            if u64::from(length) > whole {
                return Err(format!("block {n} of {whole} bytes takes {length}"));
            }
            at += u64::from(length);
        }
        starts.push(at);
        Ok(Self { len, list: List::Index { block, starts, firsts } })
    }

    /// Those of a pagemap.
    pub(crate) fn of_entries(entries: Entries) -> Self {
        Self { len: entries.len(), list: List::Entries(entries) }
    }

    /// How they are packed.
    pub fn method(&self) -> Method {
        match &self.list {
            List::Index { .. } => Method::Zstd,
            List::Entries(_) => Method::Lz4,
        }
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        match &self.list {
            List::Index { starts, .. } => starts.len() as u64 - 1,
            List::Entries(entries) => entries.count(),
        }
    }

    /// Bytes of all pages.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes that the file must have.
    pub fn packed(&self) -> u64 {
        match &self.list {
            List::Index { starts, .. } => starts.last().copied().unwrap_or(0),
            List::Entries(entries) => entries.packed(),
        }
    }

    /// Which pages a block has, as bytes of the pages file it stands for.
    pub fn pages(&self, block: u64) -> Range<u64> {
        match &self.list {
            List::Index { block: whole, firsts, .. } => pages(block, *whole, self.len, firsts.as_deref()),
            List::Entries(entries) => entries.pages(block),
        }
    }

    /// The block that has the byte at `at`, which must be before the end.
    pub(super) fn with(&self, at: u64) -> u64 {
        match &self.list {
            List::Index { firsts: Some(firsts), .. } => {
                firsts.partition_point(|first| *first <= at) as u64 - 1
            }
            List::Index { block, .. } => at / block,
            List::Entries(entries) => entries.with(at),
        }
    }

    /// The bytes it takes.
    pub(super) fn bytes(&self, block: u64) -> Range<u64> {
        match &self.list {
            List::Index { starts, .. } => starts[block as usize]..starts[block as usize + 1],
            List::Entries(entries) => entries.bytes(block),
        }
    }

    /// Where it is best to stop reading that begins at `offset` and gets at most `most` bytes: at the end of a block,
    /// if one ends there.
    pub fn stop(&self, offset: u64, most: u64) -> u64 {
        let end = offset.saturating_add(most);
        if end >= self.len || most == 0 {
            return end;
        }
        let start = self.pages(self.with(end)).start;
        if start > offset { start } else { end }
    }

    /// Which pages the given bytes of the file of blocks are needed for. Blocks of zeroes take no bytes: several may
    /// begin at one place, also behind the last byte.
    pub fn pages_of(&self, bytes: &Range<u64>) -> Range<u64> {
        let Some(end) = self.count().checked_sub(1) else { return 0..0 };
        let first = self.first_not(|start| start <= bytes.start).saturating_sub(1).min(end);
        let last = self.first_not(|start| start < bytes.end).saturating_sub(1).clamp(first, end);
        self.pages(first).start..self.pages(last).end
    }

    /// The first block whose start is not as `is` says, which those before it are.
    fn first_not(&self, is: impl Fn(u64) -> bool) -> u64 {
        let (mut from, mut to) = (0, self.count());
        while from < to {
            let middle = from + (to - from) / 2;
            match is(self.bytes(middle).start) {
                true => from = middle + 1,
                false => to = middle,
            }
        }
        from
    }
}

/// The pages of a block of an index.
fn pages(block: u64, whole: u64, len: u64, firsts: Option<&[u64]>) -> Range<u64> {
    if let Some(firsts) = firsts {
        return firsts[block as usize]..firsts[block as usize + 1];
    }
    let start = (block * whole).min(len);
    start..(start + whole).min(len)
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
