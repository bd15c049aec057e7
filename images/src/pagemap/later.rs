//! Entries of pagemaps as CRIU writes them after 4.2, whose pages may be stored in blocks that LZ4 has packed.
//!
//! The public facts that this reading rests on:
//!
//! | fact | source |
//! |---|---|
//! | `inventory_entry`: 15 `compress`, 16 bytes of a block (for information); `img_version` 3 for a set with compressed pages or on parents with such | [1], [2], [3] |
//! | `compress`: 0 none; at first 1 by single pages and 2 by regions, later only 1; both are blocks with a number of pages in each | [1], [3], [4] |
//! | first form of `pagemap_entry`: 6 `compressed_size` (repeated, packed or not), 7 `total_compressed_size`, 8 `region_pages` (absent or 0: one page) | [2], [5] |
//! | later form: 6 `blocks`, a message of 1 `block_sizes` (packed), 2 `total_payload_size`, 3 `pages_per_block`, the last two required | [6], [7] |
//! | size 0: zeros without bytes in the file; the size of the pages themselves: they stand there as they are; else an LZ4 block without a frame | [6], [8] |
//! | the last block of an entry has the pages that are left; blocks have 4 MiB at most; none is larger than its pages | [6], [8], [9] |
//! | blocks follow each other without padding; an entry with flag 8 (`PE_PAYLOAD_ALIGNED`) begins at the next page of the file; so do entries without blocks that have it | [6], [8], [10] |
//! | only entries that are present have blocks or that flag; those without blocks stand there as always | [8], [9] |
//! | pagemaps of tasks and of shared memory are alike; offsets restart with each pages file | [8], [9] |
//!
//! 1. <https://github.com/checkpoint-restore/criu/pull/2895>
//! 2. <https://github.com/checkpoint-restore/go-criu/pull/259> at 6e8b7d2d: `crit/images/{inventory,pagemap}.proto`
//! 3. the same pull request: `crit/compression.go`, of 6e8b7d2d and of 43c33c8c
//! 4. <https://github.com/avagin/criu>: `images/inventory.proto` at d61d45e2; <https://github.com/sparksq/criu>:
//!    `criu/include/compression.h` at ec97f536
//! 5. <https://github.com/dfeigin-nv/criu>: `images/pagemap.proto` at 8d12e15b (the list is not packed there)
//! 6. go-criu, pull request 259: `crit/images/pagemap.proto` at 7d5c3566
//! 7. <https://github.com/checkpoint-restore/criu/pull/3115>; <https://github.com/avagin/criu>: `images/pagemap.proto`
//!    at e8c166f9
//! 8. go-criu, pull request 259: `crit/memory_layout.go`, of both forms
//! 9. <https://github.com/checkpoint-restore/criu/pull/2895>: `criu/include/compression.h` at 11345e3d, and
//!    the checks in `criu/pagemap.c`
//! 10. the same: `PE_PAYLOAD_ALIGNED` in `criu/include/pagemap.h`
//!
//! Number 6 means two things. An entry of the first form has a field 7 or 8, or a number for field 6, which the later
//! form never has; what is left must be a message of the later form, all of whose numbers agree with each other. A
//! fork (`sparksq/criu`) pads blocks and says so in field 4 of `blocks`: such sets are refused, as every field is that
//! is not known and may change where pages are.

use std::io::Read;

use crate::{
    catalog::ImageKind,
    dir::ImageDir,
    error::{Cause, Error, Result},
    frame::EntryReader,
    magic,
    packed::entries::Sizes,
    pb,
    wire::{Cursor, WireValue},
};

/// `pagemap_entry.flags`: what is stored of the entry begins at the start of a page of the file.
pub const PE_PAYLOAD_ALIGNED: u32 = 8;

/// `inventory_entry.compress`: the largest number that has a meaning.
const MODES: u32 = 2;

/// Whether an encoded entry has the first form.
pub(crate) fn is_first_form(entry: &[u8]) -> bool {
    let mut cursor = Cursor::new(entry);
    while let Ok(Some((number, value))) = cursor.field() {
        if matches!((number, value), (7 | 8, _) | (6, WireValue::Varint(_))) {
            return true;
        }
    }
    false
}

/// An entry, and the blocks that its pages are stored in; these are not among its fields then.
pub(super) type Parts = (pb::PagemapEntry, Option<Sizes>);

/// Reads the next entry of any form.
pub(super) fn next<R: Read>(reader: &mut EntryReader<R>) -> Result<Option<Parts>> {
    let Some(bytes) = reader.next_bytes()? else { return Ok(None) };
    let parts = if is_first_form(bytes) { first_form(reader)? } else { later_form(reader)? };
    let (entry, list) = parts;
    let pages = entry.nr_pages.unwrap_or(entry.compat_nr_pages.into());
    let sizes = list.map(|List { per, sizes, total }| Sizes::new(pages, per, sizes, total));
    Ok(Some((entry, sizes.transpose().map_err(|why| reader.bad(why))?)))
}

/// What an entry says of its blocks.
struct List {
    per: u32,
    sizes: Vec<u32>,
    total: Option<u64>,
}

fn first_form<R: Read>(reader: &mut EntryReader<R>) -> Result<(pb::PagemapEntry, Option<List>)> {
    let entry: pb::PagemapRegionEntry = reader.current()?;
    let list = List {
        per: entry.region_pages.filter(|pages| *pages > 0).unwrap_or(1),
        sizes: entry.compressed_size,
        total: entry.total_compressed_size,
    };
    let pb::PagemapRegionEntry { vaddr, compat_nr_pages, in_parent, flags, nr_pages, .. } = entry;
    let entry = pb::PagemapEntry { vaddr, compat_nr_pages, in_parent, flags, nr_pages, blocks: None };
    Ok((entry, Some(list)))
}

fn later_form<R: Read>(reader: &mut EntryReader<R>) -> Result<(pb::PagemapEntry, Option<List>)> {
    let mut entry: pb::PagemapEntry = reader.current().map_err(|e| match e.cause() {
        Cause::Decode(why) => {
            reader.bad(format!("{why}; if its pages are compressed, it is in a way that is not known"))
        }
        _ => e,
    })?;
    let list = entry.blocks.take().map(|blocks| List {
        per: blocks.pages_per_block,
        sizes: blocks.block_sizes,
        total: Some(blocks.total_payload_size),
    });
    Ok((entry, list))
}

/// Whether what the inventory says of compression makes sense.
pub(crate) fn check_mode(inventory: &pb::InventoryEntry) -> Result<(), String> {
    let version = inventory.img_version;
    match inventory.compress() {
        0 => Ok(()),
        mode if mode > MODES => Err(format!(
            "compression {mode} is not known, 1 and {MODES} are: restore with the program that wrote it"
        )),
        mode if version != magic::IMAGES_V1_2 => {
            Err(format!("compression {mode} contradicts image version {version}"))
        }
        _ => Ok(()),
    }
}

/// Compares the inventory of a folder with a pagemap that has blocks. Where a page server has written, there need not be
/// an inventory.
pub(super) fn check_inventory(dir: &ImageDir) -> Result<()> {
    let Some(inventory) = dir.read_opt::<pb::InventoryEntry>(ImageKind::Inventory, 0)? else {
        return Ok(());
    };
    let refuse = |why| Err(Error::invalid(ImageKind::Inventory.file_name(0), why));
    match check_mode(&inventory) {
        Err(why) => refuse(why),
        Ok(()) if inventory.compress() == 0 => {
            refuse("it says that no pages are compressed, a pagemap says that some are".into())
        }
        Ok(()) => Ok(()),
    }
}

#[cfg(test)]
mod tests;
