//! Memory files in huge pages: such a file is read like others, but written only through a mapping.

use std::{fs::File, os::fd::AsFd};

use rcriu_images::{ImageDir, ImageKind, pagemap::PageReader, pb};

use crate::{
    error::{Error, Result, SysContext},
    mm::{hugetlb, stored::stored},
    sys::map::{Mapping, Region},
};

/// How anonymous memory in huge pages is called in images: it has no other name.
const ANONYMOUS: [&[u8]; 2] = [b"/anon_hugepage", b"anon_hugepage"];
/// Size of huge pages where images do not say it.
const DEFAULT: u64 = 2 << 20;
const READ_WRITE: u32 = (libc::PROT_READ | libc::PROT_WRITE) as u32;

/// Whether an inode of this name is anonymous memory.
pub(super) fn is_anonymous(name: &[u8]) -> bool {
    ANONYMOUS.contains(&name)
}

/// Shared anonymous memory in huge pages as a file.
pub(super) fn anonymous(size: u64, huge: u32) -> Result<File> {
    let flags =
        (libc::MAP_SHARED | libc::MAP_ANONYMOUS) as u32 | hugetlb::MAP_HUGETLB | huge & hugetlb::SIZE_MASK;
    let region = Region::anywhere(size, Mapping { prot: READ_WRITE, flags, file: None })?;
    let path = format!("/proc/self/map_files/{:x}-{:x}", region.start(), region.end());
    let file = File::options().read(true).write(true).open(path).call("open(map_files)");
    region.unmap()?;
    file
}

/// Huge pages cannot be written to, only mapped.
///
/// # Errors
/// ENOMEM of mmap if the pool is empty.
pub(super) fn fill(file: &File, inode: &pb::MemfdInodeEntry, flags: u32, images: &ImageDir) -> Result<()> {
    let page = hugetlb::said_size(flags).unwrap_or(DEFAULT);
    let Some(pages) = PageReader::open(images, ImageKind::ShmemPagemap, inode.shmid.into())? else {
        return Ok(());
    };
    let end = inode.size - inode.size % page;
    if pages.pagemap(0).and_then(|m| m.regions.last()).is_some_and(|last| last.end() > end) {
        return Err(Error::image("there are pages behind its end"));
    }
    let mut mapped: Option<(u64, Region)> = None;
    for run in pages.runs(0, end) {
        let Some(content) = stored(&pages, &run)? else { continue };
        let mut done = 0;
        while done < run.len {
            crate::interrupt::check()?;
            let at = run.vaddr + done;
            let base = at - at % page;
            if mapped.as_ref().is_none_or(|(start, _)| *start != base) {
                mapped.take().map_or(Ok(()), |(_, old)| old.unmap())?;
                let what = Mapping {
                    prot: READ_WRITE,
                    flags: libc::MAP_SHARED as u32,
                    file: Some((file.as_fd(), base)),
                };
                mapped = Some((base, Region::anywhere(page, what)?));
            }
            let Some((_, region)) = &mapped else { return Err(Error::bug("nothing is mapped")) };
            let len = (run.len - done).min(base + page - at);
            content.read_into(region, done, region.start() + (at - base), len)?;
            done += len;
        }
    }
    mapped.map_or(Ok(()), |(_, old)| old.unmap())
}
