//! Where the content of a run of memory stands in the images, and reading it.

use rcriu_images::packed::{Packed, Unpacker};
use rcriu_images::pagemap::{PageReader, Run, Source, Stored};

use crate::error::{Error, Result};
use crate::sys::map::Region;

/// Bytes unpacked at a time at most: a block as they are written here.
const STEP: u64 = 256 << 10;

/// The stored content of a run.
#[derive(Clone, Copy)]
pub(crate) struct Content<'a> {
    pages: &'a PageReader,
    level: usize,
    offset: u64,
}

/// The content of a run of shared memory; `None` for one that has none.
///
/// # Errors
/// Pages that the images promise and do not have.
pub(crate) fn stored<'a>(pages: &'a PageReader, run: &Run) -> Result<Option<Content<'a>>> {
    match run.source {
        Source::Absent => Ok(None),
        Source::Stored { level, offset } => Ok(Some(Content { pages, level, offset })),
        Source::Lazy | Source::Missing => {
            Err(Error::image(format!("page {:#x} is not in the images", run.vaddr)))
        }
    }
}

impl Content<'_> {
    /// Reads the bytes from `from` on.
    pub fn read(&self, buf: &mut [u8], from: u64) -> Result<()> {
        Ok(self.pages.read_stored(self.level, buf, self.offset + from)?)
    }

    /// Reads `len` bytes from `from` on into memory at `at`, which must be writable.
    pub fn read_into(&self, region: &Region, from: u64, at: u64, len: u64) -> Result<()> {
        let offset = self.offset + from;
        match self.pages.stored(self.level) {
            Some(Stored::Packed(packed)) => {
                Unpacking::new(packed).read(region, offset, &[(at, len)]).map(drop)
            }
            Some(Stored::Plain(file)) if region.read_file(file, offset, &[(at, len)])? == len => Ok(()),
            _ => Err(Error::image("its file of pages is too short")),
        }
    }
}

/// Compressed pages on their way into memory. Each thread has its own.
pub(crate) struct Unpacking<'a> {
    packed: &'a Packed,
    with: Unpacker,
    buf: Vec<u8>,
}

impl<'a> Unpacking<'a> {
    pub fn new(packed: &'a Packed) -> Self {
        Unpacking { packed, with: Unpacker::new(), buf: vec![0; STEP as usize] }
    }

    /// Reads the pages at `offset` of the pages file they stand for into `pieces` (address and length) of `region`,
    /// which must be writable. Gives the number of bytes.
    pub fn read(&mut self, region: &Region, mut offset: u64, pieces: &[(u64, u64)]) -> Result<u64> {
        let before = offset;
        for &(mut at, mut len) in pieces {
            while len > 0 {
                crate::interrupt::check()?;
                // Whole blocks, where there are some.
                let part = self.packed.blocks.stop(offset, STEP.min(len)) - offset;
                let bytes = &mut self.buf[..part as usize];
                self.packed.read_with(&mut self.with, bytes, offset)?;
                region.write(at, bytes)?;
                (offset, at, len) = (offset + part, at + part, len - part);
            }
        }
        Ok(offset - before)
    }
}
