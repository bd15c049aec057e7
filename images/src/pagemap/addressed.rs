//! Memory of sets from before there were pagemaps: every page has its address before it.
//!
//! ```text
//! pages-42.img   MAGIC | address page | address page | ...
//! ```

use std::{fs::File, io::ErrorKind, os::unix::fs::FileExt};

use super::{PAGE_SIZE, Pagemap, Place, Region};
use crate::{
    catalog::ImageKind,
    dir::ImageDir,
    error::{Error, Result},
    magic,
};

/// Length in bytes of the address before a page.
pub(super) const ADDRESS: u64 = 8;

/// The image that takes the place of a pagemap.
pub(super) fn kind_of(pagemap: ImageKind) -> ImageKind {
    match pagemap {
        ImageKind::ShmemPagemap => ImageKind::ShmPagesOld,
        _ => ImageKind::PagesOld,
    }
}

/// Makes a pagemap of the addresses in such a file; also gives the file and the length of its header.
/// `None` if there is no such file.
pub(super) fn read(dir: &ImageDir, kind: ImageKind, id: u64) -> Result<Option<(Pagemap, File, u64)>> {
    let kind = kind_of(kind);
    let name = kind.file_name(id);
    let Some(file) = dir.open_raw(kind, id)? else { return Ok(None) };
    let Some(head) = header_len(&file, &name)? else { return Ok(None) };
    let size = file.metadata().map_err(|e| Error::sys(&name, "fstat", e))?.len();
    let body = size.saturating_sub(head);
    let record = ADDRESS + PAGE_SIZE;
    if !body.is_multiple_of(record) {
        let (pages, rest) = (body / record, body % record);
        return Err(Error::invalid(name, format!("truncated: {rest} bytes follow {pages} whole pages")));
    }
    let mut map = Pagemap { pages_id: 0, regions: Vec::new(), stored: body / record, blocks: None };
    for page in 0..map.stored {
        let mut address = [0; ADDRESS as usize];
        file.read_exact_at(&mut address, head + page * record).map_err(|e| Error::sys(&name, "pread", e))?;
        let vaddr = u64::from_le_bytes(address);
        let end = map.regions.last().map_or(0, Region::end);
        match map.regions.last_mut() {
            _ if !vaddr.is_multiple_of(PAGE_SIZE) || vaddr > u64::MAX - PAGE_SIZE || vaddr < end => {
                return Err(Error::invalid(
                    name,
                    format!("address {vaddr:#x} of page {page} does not ascend by pages"),
                ));
            }
            Some(last) if vaddr == end => last.pages += 1,
            _ => map.regions.push(Region {
                vaddr,
                pages: 1,
                place: Place::Present { first: page },
                lazy: false,
            }),
        }
    }
    Ok(Some((map, file, head)))
}

/// Length of the header; `None` if the file opens otherwise. It then is today's pages file of another
/// task, whose number happens to be this one.
fn header_len(file: &File, name: &str) -> Result<Option<u64>> {
    let mut words = [0; 8];
    let mut got = 0;
    while got < words.len() {
        match file.read_at(&mut words[got..], got as u64) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::sys(name, "pread", e)),
        }
    }
    let word = |at: usize| words[at..at + 4].iter().rev().fold(0, |n, &b| n << 8 | u32::from(b));
    Ok(match (word(0), word(4)) {
        (magic::PAGEMAP, _) => Some(4),
        (magic::IMG_COMMON, magic::PAGEMAP) => Some(8),
        _ => None,
    })
}
