//! Pagemaps: which pages of a task or of a shared memory object are stored, and where.
//!
//! ```text
//! pagemap-42.img   head (number of the pages file) | region | region | ...
//!                                                     |        |
//!                                 present: next pages v        | in parent: the same address
//! pages-7.img      |page|page|page|...                         v in parent/pagemap-42.img
//! ```
//! Regions ascend; each present one takes the next pages of the pages file. What no region covers is
//! not in the images at all: never touched, or to be mapped from its file.
//!
//! CRIU after 4.2 may have packed the pages: see `later.rs`. A page then has the number, and the offset, that it would
//! have in a plain pages file.

mod addressed;
pub(crate) mod later;
mod reader;

use std::{io::Read, sync::Arc};

pub use self::{
    later::PE_PAYLOAD_ALIGNED,
    reader::{PageReader, Run, Source, Stored},
};
use crate::{
    catalog::ImageKind,
    dir::{ImageDir, ImageWriter},
    error::{Error, Result},
    frame::EntryReader,
    packed::{Blocks, entries::Entries},
    pb,
};

/// Size in bytes of a page in images of x86_64.
pub const PAGE_SIZE: u64 = 4096;

/// `pagemap_entry.flags`: the pages are in the parent images.
pub const PE_PARENT: u32 = 1;
/// The pages may be filled on demand after the restore.
pub const PE_LAZY: u32 = 2;
/// The pages are in the pages file of this set.
pub const PE_PRESENT: u32 = 4;

/// Where the pages of a region are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    /// In the pages file, from this page of it on.
    Present { first: u64 },
    /// In the parent images, at the same address.
    Parent,
    /// Nowhere on disk: with the server that answers page faults.
    Lazy,
}

/// Consecutive pages with one answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Address of the first page; for shared memory its offset in the object.
    pub vaddr: u64,
    /// How many, at least one.
    pub pages: u64,
    pub place: Place,
    /// May be filled on demand even if stored.
    pub lazy: bool,
}

impl Region {
    /// First address after the region.
    pub fn end(&self) -> u64 {
        // Checked when the region was read.
        self.vaddr.saturating_add(self.pages.saturating_mul(PAGE_SIZE))
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.end() - self.vaddr
    }

    /// Never true of a region that was read.
    pub fn is_empty(&self) -> bool {
        self.pages == 0
    }

    /// Reads the entry in today's and in the older form (`in_parent`, 32 bit count, no flags). `first`
    /// is the page of the pages file that follows those of the regions before.
    fn from_entry(entry: &pb::PagemapEntry, first: u64) -> Result<Self, String> {
        let pages = entry.nr_pages.unwrap_or(entry.compat_nr_pages.into());
        let vaddr = entry.vaddr;
        if !vaddr.is_multiple_of(PAGE_SIZE) {
            return Err(format!("address {vaddr:#x} is not that of a page"));
        }
        if pages.checked_mul(PAGE_SIZE).and_then(|len| vaddr.checked_add(len)).is_none() {
            return Err(format!("{pages} pages at {vaddr:#x} do not fit the address space"));
        }
        let flags = entry.flags.unwrap_or(if entry.in_parent() { 0 } else { PE_PRESENT });
        let flags = if entry.in_parent() { flags | PE_PARENT } else { flags };
        let unknown = flags & !(PE_PARENT | PE_LAZY | PE_PRESENT | PE_PAYLOAD_ALIGNED);
        if unknown != 0 {
            return Err(format!(
                "flags {unknown:#x} of the pages at {vaddr:#x} are not known; they may change where these are: restore \
                 with the program that wrote it"
            ));
        }
        let place = match (flags & PE_PARENT != 0, flags & PE_PRESENT != 0) {
            (true, false) => Place::Parent,
            (false, true) => Place::Present { first },
            (false, false) if flags & PE_LAZY != 0 => Place::Lazy,
            _ => return Err(format!("flags {flags:#x} do not say where the pages at {vaddr:#x} are")),
        };
        Ok(Self { vaddr, pages, place, lazy: flags & PE_LAZY != 0 })
    }

    /// The entry to write. The 32 bit count is filled for readers that know no other.
    pub fn to_entry(&self) -> pb::PagemapEntry {
        let place = match self.place {
            Place::Present { .. } => PE_PRESENT,
            Place::Parent => PE_PARENT,
            Place::Lazy => PE_LAZY,
        };
        pb::PagemapEntry {
            vaddr: self.vaddr,
            compat_nr_pages: u32::try_from(self.pages).unwrap_or(0),
            in_parent: None,
            flags: Some(place | if self.lazy { PE_LAZY } else { 0 }),
            nr_pages: Some(self.pages),
            blocks: None,
        }
    }
}

/// One pagemap image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pagemap {
    /// Number of the pages file.
    pub pages_id: u32,
    /// In ascending order, not overlapping, none empty.
    pub regions: Vec<Region>,
    /// Pages the pages file must hold.
    pub stored: u64,
    /// Where they are in it, if some of them are compressed there.
    pub blocks: Option<Arc<Blocks>>,
}

impl Pagemap {
    /// Reads `pagemap-ID` or `pagemap-shmem-ID`; `None` if there is none.
    ///
    /// # Errors
    /// Besides framing: regions out of order, overlapping, past the end of the address space, or
    /// without a place; blocks that make no sense.
    pub fn read(dir: &ImageDir, kind: ImageKind, id: u64) -> Result<Option<Self>> {
        dir.reader(kind, id)?.map(|mut reader| Self::read_from(&mut reader)).transpose()
    }

    /// Reads from behind the header.
    pub fn read_from<R: Read>(reader: &mut EntryReader<R>) -> Result<Self> {
        let head: pb::PagemapHead = reader.one()?;
        let mut map = Self { pages_id: head.pages_id, regions: Vec::new(), stored: 0, blocks: None };
        let mut end = 0;
        // From the first entry on that has blocks: before it pages stand where they always do.
        let mut entries: Option<Entries> = None;
        while let Some((entry, sizes)) = later::next(reader)? {
            let region = Region::from_entry(&entry, map.stored).map_err(|why| reader.bad(why))?;
            if region.vaddr < end {
                return Err(reader.bad(format!(
                    "pages at {:#x} do not ascend: those before end at {end:#x}",
                    region.vaddr
                )));
            }
            if region.pages == 0 {
                continue;
            }
            end = region.end();
            let aligned = entry.flags() & PE_PAYLOAD_ALIGNED != 0;
            if let Place::Present { .. } = region.place {
                if entries.is_some() || sizes.is_some() {
                    let mut all = entries.take().unwrap_or_default();
                    let before = if all.count() == 0 { map.stored } else { 0 };
                    let added =
                        all.add(before, false, None).and_then(|()| all.add(region.pages, aligned, sizes));
                    added.map_err(|why| reader.bad(why))?;
                    entries = Some(all);
                }
                // Regions do not overlap, so the sum stays below the size of the address space.
                map.stored += region.pages;
            } else if aligned || sizes.is_some() {
                let text = format!(
                    "pages at {:#x} are not stored here, and said to be so in a special way",
                    region.vaddr
                );
                return Err(reader.bad(text));
            }
            map.regions.push(region);
        }
        map.blocks = entries.map(|all| Arc::new(Blocks::of_entries(all)));
        Ok(map)
    }

    /// The region that holds `vaddr`.
    pub fn find(&self, vaddr: u64) -> Option<&Region> {
        self.from(vaddr).first().filter(|r| r.vaddr <= vaddr)
    }

    /// The regions that end after `vaddr`.
    pub fn from(&self, vaddr: u64) -> &[Region] {
        &self.regions[self.regions.partition_point(|r| r.end() <= vaddr)..]
    }
}

/// Writes a pagemap, region by region.
#[derive(Debug)]
pub struct PagemapWriter {
    out: ImageWriter,
    end: u64,
}

impl PagemapWriter {
    /// Begins the pagemap of `id`, whose pages are in `pages-PAGES_ID`.
    pub fn create(dir: &ImageDir, kind: ImageKind, id: u64, pages_id: u32) -> Result<Self> {
        let mut out = dir.writer(kind, id);
        out.write(&pb::PagemapHead { pages_id })?;
        Ok(Self { out, end: 0 })
    }

    /// Appends a region; regions must come in ascending order. `first` of a present place is not
    /// written: it follows from the order.
    pub fn add(&mut self, region: &Region) -> Result<()> {
        if region.vaddr < self.end {
            let name = self.out.name().to_owned();
            return Err(Error::invalid(name, format!("pages at {:#x} written out of order", region.vaddr)));
        }
        self.end = region.end();
        self.out.write(&region.to_entry())
    }

    /// Completes the image.
    pub fn finish(self) -> Result<()> {
        self.out.finish()
    }
}

#[cfg(test)]
mod tests;
