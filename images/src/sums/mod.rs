//! Sums over all files of a set: what was changed after the dump is found, down to the page of a task.
//!
//! ```text
//! rcriu-sums.img   name size sum sum sum ... | name size sum ... | ... | rcriu-sums.img size sum
//!                            |   |                                        of all entries before it
//! core-42.img      |4096 bytes|4096 bytes| ...
//! pages-1.img      |page|page|page| ...
//! ```
//!
//! Each 4096 bytes of each file have a sum of their own (CRC-32). So the sum of a page can be looked up whoever
//! reads it and in whatever order, freeing a page in an older set changes one sum, and the sums take a thousandth of
//! the space of the pages. The inventory says that there are sums, and the sums have one for the inventory of
//! the parent: none of the files can be left out or taken from another set.
//!
//! These sums tell accidents. They are no protection against somebody who changes images on purpose and makes
//! new sums.

mod known;
mod verify;
mod work;

use std::{
    collections::BTreeMap,
    io::{Cursor, Read},
    ops::Range,
};

use prost::Message;

pub use self::{
    known::Known,
    verify::{Damage, Fault, as_error, of_folder, places, verify},
    work::Sweep,
};
use crate::{
    catalog::{Head, ImageKind},
    dir::{ImageDir, PARENT_LINK},
    error::{Cause, Error, Result},
    frame::{EntryReader, append_entry, header_bytes},
    pagemap::PAGE_SIZE,
    pb,
};

/// Bytes that have a sum of their own.
pub const BLOCK: u64 = 4096;

/// Sums in one entry at most.
const PER_ENTRY: usize = 1 << 20;

/// Sums of one file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FileSums {
    /// Length in bytes.
    pub size: u64,
    /// One for each [`BLOCK`] bytes; fewer if the rest is not to be compared.
    pub blocks: Vec<u32>,
}

impl FileSums {
    /// Of a file with this content.
    pub fn of(bytes: &[u8]) -> Self {
        Self { size: bytes.len() as u64, blocks: bytes.chunks(BLOCK as usize).map(sum).collect() }
    }
}

/// The sum of the bytes of a block.
pub fn sum(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}

/// Sums of a set, by file name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sums {
    pub files: BTreeMap<String, FileSums>,
    /// Of the inventory of the parent images, if the set has a parent.
    pub parent: Option<FileSums>,
}

/// Whether a file of this kind belongs to a set, and has sums. Statistics and caches do not.
fn has_sums(kind: ImageKind) -> bool {
    kind != ImageKind::RcriuSums && kind.row().head != Head::Service
}

fn own_name() -> String {
    ImageKind::RcriuSums.file_name(0)
}

impl Sums {
    /// Reads `rcriu-sums.img`; `None` if there is none.
    ///
    /// # Errors
    /// One that is damaged anywhere: none of its sums is to be trusted then.
    pub fn read(dir: &ImageDir) -> Result<Option<Self>> {
        let Some(mut file) = dir.open_raw(ImageKind::RcriuSums, 0)? else { return Ok(None) };
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(|e| Error::sys(own_name(), "read", e))?;
        Self::parse(&bytes).map(Some)
    }

    /// Reads the content of such a file.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let mut reader = EntryReader::new(Cursor::new(bytes), own_name(), Some(bytes.len() as u64));
        reader.header(ImageKind::RcriuSums)?;
        let mut sums = Self::default();
        loop {
            let before = &bytes[..reader.offset() as usize];
            let Some(entry) = reader.next::<pb::RcriuSumsEntry>()? else {
                return Err(reader.bad("it ends before its own sum: it is damaged or truncated"));
            };
            if entry.name == own_name() {
                // Compared as bytes: nothing in this entry may differ.
                return if bytes[before.len()..] == seal(before) {
                    Ok(sums)
                } else {
                    Err(Error::invalid(own_name(), "its own sum is another: it is damaged"))
                };
            }
            sums.take(entry).map_err(|why| reader.bad(why))?;
        }
    }

    fn take(&mut self, entry: pb::RcriuSumsEntry) -> Result<(), String> {
        let file = if entry.name == PARENT_LINK {
            self.parent.get_or_insert_default()
        } else {
            self.files.entry(entry.name.clone()).or_default()
        };
        file.size = entry.size;
        file.blocks.extend(entry.sum);
        let most = entry.size.div_ceil(BLOCK);
        if file.blocks.len() as u64 > most {
            return Err(format!("{} has more sums than its {} bytes need", entry.name, entry.size));
        }
        Ok(())
    }

    /// The content of `rcriu-sums.img`.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = header_bytes(ImageKind::RcriuSums);
        let parent = self.parent.iter().map(|sums| (PARENT_LINK, sums));
        for (name, file) in self.files.iter().map(|(name, sums)| (name.as_str(), sums)).chain(parent) {
            let mut parts = file.blocks.chunks(PER_ENTRY);
            let mut part = parts.next().unwrap_or(&[]);
            loop {
                let entry = pb::RcriuSumsEntry { name: name.to_owned(), size: file.size, sum: part.to_vec() };
                append_entry(&entry, &mut bytes);
                match parts.next() {
                    Some(next) => part = next,
                    None => break,
                }
            }
        }
        let end = seal(&bytes);
        bytes.extend(end);
        bytes
    }

    /// Puts the sums in the place of those of the folder, in one step.
    pub fn replace(&self, dir: &ImageDir) -> Result<()> {
        dir.replace(&own_name(), &self.to_bytes())
    }

    /// Takes note that pages of `pages-ID` are freed: they read as zero. Takes them as numbers of pages.
    pub fn free(&mut self, id: u64, pages: Range<u64>) {
        let Some(file) = self.files.get_mut(&ImageKind::Pages.file_name(id)) else { return };
        let most = file.blocks.len() as u64;
        let (from, to) = (pages.start.min(most), pages.end.min(most));
        file.blocks[from as usize..to.max(from) as usize].fill(sum(&[0; PAGE_SIZE as usize]));
    }

    /// From here on, pages are no longer compared: they go as they are used.
    pub fn forget_pages(&mut self) {
        for (name, file) in &mut self.files {
            if matches!(ImageKind::from_file_name(name), Some((ImageKind::Pages, _))) {
                file.blocks.clear();
            }
        }
    }

    /// Writes `rcriu-sums.img`.
    pub fn write(&self, dir: &ImageDir) -> Result<()> {
        let mut out = dir.writer(ImageKind::RcriuSums, 0);
        // The writer puts the header first.
        out.write_raw(&self.to_bytes()[header_bytes(ImageKind::RcriuSums).len()..])?;
        out.finish()
    }
}

/// The entry about all bytes before it, with which such a file ends.
pub fn seal(before: &[u8]) -> Vec<u8> {
    let entry = pb::RcriuSumsEntry { name: own_name(), size: before.len() as u64, sum: vec![sum(before)] };
    let mut bytes = Vec::with_capacity(entry.encoded_len() + 4);
    append_entry(&entry, &mut bytes);
    bytes
}

/// The bytes of an image of one entry, for its sums before it is written.
pub fn image_of_one(kind: ImageKind, entry: &impl Message) -> Vec<u8> {
    let mut bytes = header_bytes(kind);
    append_entry(entry, &mut bytes);
    bytes
}

/// That sums the inventory speaks of are not there.
fn missing() -> Error {
    Error::new(own_name(), Cause::Missing)
}

#[cfg(test)]
mod tests;
