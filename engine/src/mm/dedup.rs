//! Freeing pages in images: what a newer set holds again, and what has been restored.
//!
//! Files keep their length; what is freed reads as zero and takes no space on the disk. A set whose pages were
//! freed can only be restored as the parent of the one that has them, or not again.

use std::{fs::File, ops::Range};

use nix::fcntl::{FallocateFlags, fallocate};
use rcriu_images::{
    ImageDir, ImageKind,
    pagemap::{PAGE_SIZE, PageReader, Pagemap, Place, Run, Source, Stored},
    sums::Sums,
};

use crate::{
    error::{Context, Error, Result, SysContext},
    interrupt,
};

/// Frees in the parents of `images` the pages that `images` has itself. Gives the number of pages.
///
/// # Errors
/// There is no parent; images that cannot be read or written to.
pub fn parents(images: &ImageDir) -> Result<u64> {
    let chain = images.chain()?;
    let [own, parents @ ..] = chain.as_slice() else { return Err(Error::bug("a chain without images")) };
    if parents.is_empty() {
        return Err(Error::image("Can't enter previous snapshot folder: the images have no parent")
            .remedy("give the images of an incremental dump"));
    }
    check(images)?;
    // What is about to go is no longer compared; done twice, this comes to the same.
    for (level, parent) in parents.iter().enumerate() {
        let Some(mut sums) = Sums::read(parent)? else { continue };
        superseded(own, parents, |at, old, from, to| {
            if at == level {
                let page = |byte: u64| byte / PAGE_SIZE;
                sums.free(old.pages_id.into(), page(from)..page(to));
            }
            Ok(())
        })?;
        sums.replace(parent)?;
    }
    for (kind, id) in own.images()? {
        match kind {
            ImageKind::Pagemap => log::info!("pid={id}"),
            ImageKind::ShmemPagemap => log::info!("shmid={id}"),
            _ => {}
        }
    }
    let mut open: Option<(usize, u32, File)> = None;
    let mut holes = Holes::default();
    superseded(own, parents, |at, old, from, to| {
        let now = (at, old.pages_id);
        if open.as_ref().is_none_or(|(at, id, _)| (*at, *id) != now) {
            if let Some((.., file)) = open.take() {
                holes.punch(&file)?;
            }
            let file = parents[at].open_raw_rw(ImageKind::Pages, old.pages_id.into())?;
            open = file.map(|file| (at, old.pages_id, file));
        }
        open.as_ref().map_or(Ok(()), |(.., file)| holes.add(file, from, to - from))
    })?;
    if let Some((.., file)) = open {
        holes.punch(&file)?;
    }
    log::info!("Deduplicated");
    Ok(holes.bytes / PAGE_SIZE)
}

/// Fails if pages of the images or their parents are compressed.
pub fn check(images: &ImageDir) -> Result<()> {
    for dir in images.chain()? {
        if any_packed(&dir)? {
            let path = dir.path().display();
            return Err(Error::unsupported(format!(
                "pages in {path} are compressed: single ones cannot be freed"
            ))
            .remedy("leave deduplication out, or dump without --compress"));
        }
    }
    Ok(())
}

fn any_packed(dir: &ImageDir) -> Result<bool> {
    let images = dir.images()?;
    if images.iter().any(|(kind, _)| *kind == ImageKind::RcriuPages) {
        return Ok(true);
    }
    let is_pagemap = |kind| matches!(kind, ImageKind::Pagemap | ImageKind::ShmemPagemap);
    for (kind, id) in images.into_iter().filter(|(kind, _)| is_pagemap(*kind)) {
        if Pagemap::read(dir, kind, id)?.is_some_and(|map| map.blocks.is_some()) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Calls `found(which parent, its pagemap, from, to)` for each range of bytes in a pages file of a parent that
/// holds pages which `own` stores too.
fn superseded(
    own: &ImageDir,
    parents: &[ImageDir],
    mut found: impl FnMut(usize, &Pagemap, u64, u64) -> Result<()>,
) -> Result<()> {
    for (kind, id) in own.images()? {
        if !matches!(kind, ImageKind::Pagemap | ImageKind::ShmemPagemap) {
            continue;
        }
        let Some(new) = Pagemap::read(own, kind, id)? else { continue };
        for (at, parent) in parents.iter().enumerate() {
            interrupt::check()?;
            let Some(old) = Pagemap::read(parent, kind, id)? else { break };
            for region in new.regions.iter().filter(|r| matches!(r.place, Place::Present { .. })) {
                for before in old.from(region.vaddr).iter().take_while(|r| r.vaddr < region.end()) {
                    let Place::Present { first } = before.place else { continue };
                    let from = region.vaddr.max(before.vaddr);
                    let to = region.end().min(before.end());
                    let start = first * PAGE_SIZE + (from - before.vaddr);
                    found(at, &old, start, start + (to - from)).during(|| kind.file_name(id))?;
                }
            }
        }
    }
    Ok(())
}

/// Ranges to be freed, gathered as long as they follow each other.
#[derive(Default)]
struct Holes {
    open: Range<u64>,
    bytes: u64,
}

impl Holes {
    fn add(&mut self, file: &File, at: u64, len: u64) -> Result<()> {
        if self.open.end != at {
            self.punch(file)?;
            self.open = at..at;
        }
        self.open.end += len;
        Ok(())
    }

    fn punch(&mut self, file: &File) -> Result<()> {
        let Range { start, end } = self.open;
        if start == end {
            return Ok(());
        }
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (at, len) = (start.cast_signed(), (end - start).cast_signed());
        fallocate(file, flags, at, len).call("fallocate(FALLOC_FL_PUNCH_HOLE)").map_err(|e| {
            if e.errno() == Some(libc::EOPNOTSUPP) {
                e.remedy("the file system of the images cannot free parts of files")
            } else {
                e
            }
        })?;
        self.bytes += end - start;
        self.open = end..end;
        Ok(())
    }

    fn finish(mut self, file: &File) -> Result<u64> {
        self.punch(file)?;
        Ok(self.bytes / PAGE_SIZE)
    }
}

/// Page files of one pagemap and its parents, from which pages go as soon as they are in memory.
#[derive(Debug)]
pub struct Restored {
    levels: Vec<Option<File>>,
}

impl Restored {
    /// Of what `pages` reads, the pagemap `kind` of `id` in `dir`.
    pub fn open(dir: &ImageDir, pages: &PageReader) -> Result<Restored> {
        let mut levels = Vec::new();
        for (level, dir) in dir.chain()?.iter().enumerate().take(pages.levels()) {
            if matches!(pages.stored(level), Some(Stored::Packed(_))) {
                return Err(Error::bug("single pages of compressed ones cannot be freed"));
            }
            let id = pages.pagemap(level).map_or(0, |map| map.pages_id);
            levels.push(dir.open_raw_rw(ImageKind::Pages, id.into())?);
        }
        Ok(Restored { levels })
    }

    /// Frees what was read.
    pub fn free(&self, runs: &[Run]) -> Result<()> {
        for (level, file) in self.levels.iter().enumerate() {
            let Some(file) = file else { continue };
            let mut holes = Holes::default();
            for run in runs {
                match run.source {
                    Source::Stored { level: of, offset } if of == level => {
                        holes.add(file, offset, run.len)?
                    }
                    _ => {}
                }
            }
            holes.finish(file)?;
        }
        Ok(())
    }
}

/// From here on pages of `images` and its parents may go as they are restored: their sums are no longer compared.
pub fn begin(images: &ImageDir) -> Result<()> {
    for dir in images.chain()? {
        if let Some(mut sums) = Sums::read(&dir)? {
            sums.forget_pages();
            sums.replace(&dir)?;
        }
    }
    Ok(())
}

/// Frees all pages of shared memory in `images` and its parents, after they have been read.
pub fn shared(images: &ImageDir) -> Result<()> {
    for (kind, id) in images.images()?.into_iter().filter(|(kind, _)| *kind == ImageKind::ShmemPagemap) {
        let Some(pages) = PageReader::open(images, kind, id)? else { continue };
        let end = pages.pagemap(0).and_then(|map| map.regions.last()).map_or(0, |last| last.end());
        Restored::open(images, &pages)?.free(&pages.runs(0, end)).during(|| kind.file_name(id))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use rcriu_images::pagemap::{PagemapWriter, Region};

    use super::*;

    const PAGE: usize = PAGE_SIZE as usize;

    /// A set with `regions` (address in pages, pages, stored), stored pages full of `byte`.
    fn set(path: &std::path::Path, regions: &[(u64, u64, bool)], byte: u8) -> ImageDir {
        std::fs::create_dir(path).unwrap();
        let dir = ImageDir::open(path).unwrap();
        let mut out = PagemapWriter::create(&dir, ImageKind::Pagemap, 5, 1).unwrap();
        let mut stored = 0;
        for (at, pages, present) in regions {
            let place = if *present { Place::Present { first: stored } } else { Place::Parent };
            out.add(&Region { vaddr: at * PAGE_SIZE, pages: *pages, place, lazy: false }).unwrap();
            stored += if *present { *pages } else { 0 };
        }
        out.finish().unwrap();
        std::fs::write(path.join("pages-1.img"), vec![byte; stored as usize * PAGE]).unwrap();
        dir
    }

    fn content(path: &std::path::Path) -> Vec<u8> {
        std::fs::read(path.join("pages-1.img")).unwrap().chunks(PAGE).map(|p| p[0]).collect()
    }

    #[test]
    fn pages_that_are_stored_again_go_from_all_parents() {
        let tmp = tempfile::tempdir().unwrap();
        let path = |n: &str| tmp.path().join(n);
        set(&path("a"), &[(0, 8, true), (16, 2, true)], b'a');
        let b = set(&path("b"), &[(0, 2, false), (2, 3, true), (5, 3, false)], b'b');
        b.link_parent("../a".as_ref()).unwrap();
        let c = set(&path("c"), &[(0, 1, false), (1, 2, true), (3, 4, false), (16, 1, true)], b'c');
        c.link_parent("../b".as_ref()).unwrap();
        assert_eq!(parents(&c).unwrap(), 1 + 3);
        assert_eq!(content(&path("b")), [0, b'b', b'b']);
        let a = [b'a', 0, 0, b'a', b'a', b'a', b'a', b'a', 0, b'a'];
        assert_eq!(content(&path("a")), a);
        assert_eq!(content(&path("c")), [b'c'; 3]);
        let size = path("a").join("pages-1.img").metadata().unwrap();
        assert_eq!(size.len(), 10 * PAGE_SIZE);
        assert!(size.blocks() * 512 < 10 * PAGE_SIZE, "no space was freed");
        assert!(parents(&ImageDir::open(path("a")).unwrap()).unwrap_err().to_string().contains("no parent"));
    }

    #[test]
    fn what_was_restored_goes_from_where_it_was() {
        let tmp = tempfile::tempdir().unwrap();
        let path = |n: &str| tmp.path().join(n);
        set(&path("a"), &[(0, 4, true)], b'a');
        let b = set(&path("b"), &[(0, 2, false), (2, 2, true)], b'b');
        b.link_parent("../a".as_ref()).unwrap();
        let pages = PageReader::open(&b, ImageKind::Pagemap, 5).unwrap().unwrap();
        let restored = Restored::open(&b, &pages).unwrap();
        restored.free(&pages.runs(PAGE_SIZE, 3 * PAGE_SIZE)).unwrap();
        assert_eq!(content(&path("a")), [b'a', 0, b'a', b'a']);
        assert_eq!(content(&path("b")), [0, b'b']);
    }
}
