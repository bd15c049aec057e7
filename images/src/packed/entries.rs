//! Blocks that the entries of a pagemap list, in a pages file: how CRIU after 4.2 stores compressed memory.
//!
//! ```text
//! pagemap-42.img   |entry: sizes 9 0 7   |entry    |entry: sizes 4096 5 | ...
//! pages-7.img      |9 bytes |7 bytes|    |page|page|4096 bytes|5 bytes|
//!                  each block of pages packed    as they are, at the start of a page where the entry says so
//! ```
//!
//! Blocks of zeros take no bytes; a block that takes as many bytes as its pages have stands there as it is.
//!
//! A list holds four bytes for each block, and for every [`MARK`]th where it begins: memory that is compressed page by
//! page has very many.

use std::ops::Range;

use super::{BLOCK, MAX_BLOCK_PAGES};
use crate::pagemap::PAGE_SIZE;

/// Blocks from one of which the start is known to the next.
const MARK: usize = 64;

/// The list of one entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sizes {
    /// Bytes of a whole block when unpacked.
    per: u64,
    /// Bytes that each block takes.
    sizes: Vec<u32>,
}

impl Sizes {
    /// Takes what an entry of `pages` pages says, if it makes sense: pages in a block, bytes that each takes, and their
    /// sum, where it is told.
    pub fn new(pages: u64, per: u32, sizes: Vec<u32>, total: Option<u64>) -> Result<Self, String> {
        if per == 0 || per > MAX_BLOCK_PAGES {
            return Err(format!("compressed blocks of {per} pages: 1 to {MAX_BLOCK_PAGES} can be read"));
        }
        let (listed, blocks) = (sizes.len() as u64, pages.div_ceil(per.into()));
        if listed != blocks {
            return Err(format!("{pages} pages take {blocks} compressed blocks, there are {listed}"));
        }
        let per = u64::from(per) * PAGE_SIZE;
        let mut sum = 0;
        for (n, &size) in sizes.iter().enumerate() {
            // No more pages than so many blocks have: cannot overflow.
            let whole = (pages * PAGE_SIZE - n as u64 * per).min(per);
            if u64::from(size) > whole {
                return Err(format!("compressed block {n} of {whole} bytes takes {size}"));
            }
            sum += u64::from(size);
        }
        match total {
            Some(total) if total != sum => {
                Err(format!("the compressed blocks take {sum} bytes, the entry says {total}"))
            }
            _ => Ok(Self { per, sizes }),
        }
    }
}

/// Pages of one entry, or of several that stand there as they are.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Extent {
    /// Where its pages would be in a plain pages file, and how many bytes they have.
    first: u64,
    len: u64,
    /// Number of its first block.
    block: u64,
    /// Bytes of a whole block when unpacked.
    per: u64,
    /// Where it begins in the file.
    at: u64,
    /// Place of its first size and of its first mark; `None` if the pages stand there as they are.
    listed: Option<(usize, usize)>,
}

impl Extent {
    fn blocks(&self) -> u64 {
        self.len.div_ceil(self.per)
    }
}

/// The blocks of all entries of a pagemap.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Entries {
    extents: Vec<Extent>,
    /// Bytes that the blocks of all lists take.
    sizes: Vec<u32>,
    /// Where every [`MARK`]th block of a list begins.
    marks: Vec<u64>,
    /// Where the last one ends.
    end: u64,
}

impl Entries {
    /// Appends the pages of an entry that stores `pages` of them; `aligned` ones begin at the start of a page of the
    /// file. Of nothing nothing is kept.
    pub fn add(&mut self, pages: u64, aligned: bool, list: Option<Sizes>) -> Result<(), String> {
        const LONG: &str = "the pages file would be longer than any file";
        if pages == 0 {
            return Ok(());
        }
        let at = if aligned { self.end.checked_next_multiple_of(PAGE_SIZE).ok_or(LONG)? } else { self.end };
        let (first, len) = (self.len(), pages * PAGE_SIZE);
        let block = self.count();
        let Some(Sizes { per, sizes }) = list else {
            self.end = at.checked_add(len).ok_or(LONG)?;
            match self.extents.last_mut() {
                Some(last) if last.listed.is_none() && last.at + last.len == at => last.len += len,
                _ => self.extents.push(Extent { first, len, block, per: BLOCK as u64, at, listed: None }),
            }
            return Ok(());
        };
        self.extents.push(Extent {
            first,
            len,
            block,
            per,
            at,
            listed: Some((self.sizes.len(), self.marks.len())),
        });
        let mut end = at;
        for part in sizes.chunks(MARK) {
            self.marks.push(end);
            let bytes: u64 = part.iter().map(|size| u64::from(*size)).sum();
            end = end.checked_add(bytes).ok_or(LONG)?;
        }
        self.sizes.extend(sizes);
        self.end = end;
        Ok(())
    }

    /// Bytes of all pages.
    pub fn len(&self) -> u64 {
        self.extents.last().map_or(0, |last| last.first + last.len)
    }

    /// How many blocks there are.
    pub fn count(&self) -> u64 {
        self.extents.last().map_or(0, |last| last.block + last.blocks())
    }

    /// Bytes that the file must have.
    pub fn packed(&self) -> u64 {
        self.end
    }

    /// What a block holds, as bytes of a plain pages file.
    pub fn pages(&self, block: u64) -> Range<u64> {
        let extent = self.of(block);
        let start = (block - extent.block) * extent.per;
        extent.first + start..extent.first + (start + extent.per).min(extent.len)
    }

    /// The block that has the byte at `at` of a plain pages file, which must be before the end.
    pub fn with(&self, at: u64) -> u64 {
        let extent = &self.extents[self.extents.partition_point(|e| e.first <= at) - 1];
        extent.block + (at - extent.first) / extent.per
    }

    /// The bytes that it takes.
    pub fn bytes(&self, block: u64) -> Range<u64> {
        let extent = self.of(block);
        let n = block - extent.block;
        let Some((sizes, marks)) = extent.listed else {
            let start = n * extent.per;
            return extent.at + start..extent.at + (start + extent.per).min(extent.len);
        };
        let n = n as usize;
        let known = n - n % MARK;
        let between = self.sizes[sizes + known..sizes + n].iter().map(|size| u64::from(*size)).sum::<u64>();
        let start = self.marks[marks + n / MARK] + between;
        start..start + u64::from(self.sizes[sizes + n])
    }

    /// The extent that has it.
    fn of(&self, block: u64) -> &Extent {
        &self.extents[self.extents.partition_point(|e| e.block <= block) - 1]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::packed::{Blocks, Method};

    #[test]
    fn lists_that_make_no_sense_are_refused() {
        let new = |pages, per, sizes: &[u32], total| Sizes::new(pages, per, sizes.to_vec(), total);
        for fine in [
            new(3, 1, &[9, 0, 4096], Some(4105)),
            new(3, 2, &[8192, 4096], None),
            new(3, 1024, &[12_288], None),
            new(0, 1, &[], Some(0)),
        ] {
            assert!(fine.is_ok(), "{fine:?}");
        }
        for (bad, why) in [
            (new(1, 0, &[9], None), "compressed blocks of 0 pages: 1 to 1024 can be read"),
            (new(1, 1025, &[9], None), "compressed blocks of 1025 pages: 1 to 1024 can be read"),
            (new(1, u32::MAX, &[9], None), "compressed blocks of 4294967295 pages: 1 to 1024 can be read"),
            (new(3, 2, &[9], None), "3 pages take 2 compressed blocks, there are 1"),
            (
                new(1 << 52, 1, &[9; 4], None),
                "4503599627370496 pages take 4503599627370496 compressed blocks, there are 4",
            ),
            (new(1, 1, &[], Some(0)), "1 pages take 1 compressed blocks, there are 0"),
            (new(1, 1, &[4097], None), "compressed block 0 of 4096 bytes takes 4097"),
            (new(3, 2, &[0, 4097], None), "compressed block 1 of 4096 bytes takes 4097"),
            (new(2, 1, &[5, 6], Some(12)), "the compressed blocks take 11 bytes, the entry says 12"),
        ] {
            assert_eq!(bad.unwrap_err(), why);
        }
    }

    #[test]
    fn files_longer_than_any_are_refused() {
        let mut entries = Entries::default();
        entries.add(1, false, Some(Sizes::new(1, 1, vec![5], None).unwrap())).unwrap();
        let most = u64::MAX / PAGE_SIZE;
        assert!(entries.add(most - 1, false, None).is_ok());
        assert!(entries.add(1, true, None).unwrap_err().contains("longer than any file"));
    }

    /// An entry: pages, whether aligned, and the list: pages in a block, and quarters of them that each takes.
    type Made = (u64, bool, Option<(u32, Vec<u32>)>);

    fn some() -> impl Strategy<Value = Vec<Made>> {
        let list = prop::option::of((1u32..70, prop::collection::vec(0u32..5, 400)));
        prop::collection::vec((1u64..400, any::<bool>(), list), 1..8)
    }

    proptest! {
        /// Every block is where one finds it by adding up.
        #[test]
        fn blocks_are_where_they_are(some in some()) {
            let mut entries = Entries::default();
            // What each page is in: pages and bytes of its block.
            let mut want: Vec<(Range<u64>, Range<u64>)> = Vec::new();
            let (mut page, mut at) = (0u64, 0u64);
            for (pages, aligned, list) in some {
                let list = list.map(|(per, mut sizes)| {
                    sizes.truncate(pages.div_ceil(per.into()) as usize);
                    let last = sizes.len() - 1;
                    for (n, size) in sizes.iter_mut().enumerate() {
                        let whole = if n == last { pages - n as u64 * u64::from(per) } else { per.into() };
                        *size = *size * whole as u32 * PAGE_SIZE as u32 / 4;
                    }
                    (per, sizes)
                });
                let sizes = list.clone().map(|(per, sizes)| {
                    let total = sizes.iter().map(|s| u64::from(*s)).sum();
                    Sizes::new(pages, per, sizes, Some(total)).unwrap()
                });
                entries.add(pages, aligned, sizes).unwrap();
                if aligned {
                    at = at.next_multiple_of(PAGE_SIZE);
                }
                match list {
                    None => {
                        for _ in 0..pages {
                            want.push((page * PAGE_SIZE..(page + 1) * PAGE_SIZE, at..at + PAGE_SIZE));
                            (page, at) = (page + 1, at + PAGE_SIZE);
                        }
                    }
                    Some((per, sizes)) => {
                        let end = page + pages;
                        for size in sizes {
                            let block = page..end.min(page + u64::from(per));
                            for _ in block.clone() {
                                let bytes = at..at + u64::from(size);
                                want.push((block.start * PAGE_SIZE..block.end * PAGE_SIZE, bytes));
                            }
                            (page, at) = (block.end, at + u64::from(size));
                        }
                    }
                }
            }
            let blocks = Blocks::of_entries(entries);
            prop_assert_eq!((blocks.len(), blocks.packed()), (page * PAGE_SIZE, at));
            prop_assert_eq!(blocks.method(), Method::Lz4);
            let mut seen = 0;
            for (n, (pages, bytes)) in want.iter().enumerate() {
                let byte = n as u64 * PAGE_SIZE + 17;
                let block = blocks.with(byte);
                seen = seen.max(block + 1);
                let (p, b) = (blocks.pages(block), blocks.bytes(block));
                prop_assert!(p.contains(&byte));
                match pages.end - pages.start == bytes.end - bytes.start {
                    // Neighbours that stand there as they are may be in one block.
                    true => prop_assert_eq!(bytes.start - b.start, pages.start.saturating_sub(p.start)),
                    false => prop_assert_eq!((&p, &b), (pages, bytes)),
                }
                prop_assert!(blocks.stop(byte, 3 * PAGE_SIZE) > byte);
                if !bytes.is_empty() {
                    let near = blocks.pages_of(&(bytes.start..bytes.start + 1));
                    prop_assert!(near.contains(&pages.start), "{near:?} {pages:?}");
                }
            }
            prop_assert_eq!(seen, blocks.count());
        }
    }
}
