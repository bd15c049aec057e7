//! Compressed pages: in place of a pages file, its pages in blocks that are packed each by itself.
//!
//! ```text
//! pagemap-42.img       which pages, in which order: as always
//! pages-7.img          is not there
//! rcriu-pages-7.img    |block   |blo|bloc|block  | ...      each of 64 pages, packed
//! rcriu-blocks-7.img   lengths of the blocks
//! ```
//!
//! Pages keep the numbers and offsets that they would have in a pages file, so whoever looks up pages does not
//! notice; only who reads them does. A page is found without unpacking more than its block. Blocks that do not get
//! smaller stand there as they are, blocks of zeros take no room.
//!
//! The version in the inventory of such a set is one that other readers refuse.
//!
//! Sets of CRIU after 4.2 have blocks too, packed by LZ4, in the pages file itself and listed by the pagemap: see
//! [`pagemap`](crate::pagemap). They are read in the same way, and not written.

mod blocks;
mod crew;
pub(crate) mod entries;
mod packer;
mod reader;
mod writer;

pub use self::{
    blocks::{Blocks, Method},
    reader::{Packed, Unpacker},
    writer::PackedWriter,
};

use crate::pagemap::PAGE_SIZE;

/// Pages in a block of those written here.
pub const BLOCK_PAGES: u32 = 64;
/// Most pages in a block that are taken: what a reader needs memory for.
pub const MAX_BLOCK_PAGES: u32 = 1024;

/// `rcriu_blocks_entry.method`: a frame of zstd.
const ZSTD: u32 = 1;

/// Bytes of a whole block of those written here.
const BLOCK: usize = BLOCK_PAGES as usize * PAGE_SIZE as usize;

/// Consecutive pages of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Address of the first.
    pub start: u64,
    /// Length in bytes, of whole pages.
    pub len: u64,
    /// They may come late in a restore.
    pub lazy: bool,
    /// Pages full of zeros are left out.
    pub skip_zero: bool,
}

/// Consecutive pages that are among those packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    pub vaddr: u64,
    pub pages: u64,
    /// As the [`Piece`] says.
    pub lazy: bool,
}

/// Memory that could not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unread {
    /// Where.
    pub piece: Piece,
    /// Why; see errno(3).
    pub errno: i32,
}

/// Memory that pages are read from, by several threads.
pub trait Memory: Send + Sync {
    /// Fills `buf` with the pieces, one after the other.
    fn read(&self, pieces: &[Piece], buf: &mut [u8]) -> Result<(), Unread>;
}

/// Whether all bytes are 0.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Words first: most pages differ early.
    let (words, tail) = bytes.as_chunks::<8>();
    words.first().is_none_or(|head| *head == [0; 8])
        && words.iter().all(|word| u64::from_ne_bytes(*word) == 0)
        && tail.iter().all(|byte| *byte == 0)
}

/// Levels that zstd knows.
pub fn levels() -> std::ops::RangeInclusive<i32> {
    zstd::compression_level_range()
}

#[cfg(test)]
mod tests;
