//! Content of shared memory: files of the kernel's own tmpfs (memfd, shared anonymous memory), once each.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::FileExt,
    },
    sync::atomic::Ordering,
};

use nix::{
    errno::Errno,
    unistd::{Whence, lseek},
};
use rcriu_images::{ImageKind, pagemap::PAGE_SIZE};

use super::{pages::PageStore, status as st, vma::Vma};
use crate::{
    error::{Context, Result, SysContext},
    interrupt,
};

/// Bytes read at once.
const BATCH: u64 = 4 << 20;

/// Anonymous shared memory met so far, by inode.
///
/// Such memory is dumped as far as any task maps it, which is known when all tasks are.
#[derive(Debug, Default)]
pub struct SharedOut(BTreeMap<u64, Object>);

#[derive(Debug)]
struct Object {
    file: OwnedFd,
    /// End of the furthest mapping.
    size: u64,
}

impl SharedOut {
    /// Numbers of all that was taken note of.
    pub fn numbers(&self) -> BTreeSet<u64> {
        self.0.keys().copied().collect()
    }

    /// Takes note of memory `ino`.
    pub fn add(&mut self, file: OwnedFd, ino: u64) {
        self.0.entry(ino).or_insert(Object { file, size: 0 });
    }

    /// Takes note of what a task maps.
    pub fn mapped(&mut self, vmas: &[Vma]) {
        for vma in vmas.iter().filter(|v| v.is(st::ANON_SHARED) && !v.is(st::SYSVIPC)) {
            if let Some(object) = self.0.get_mut(&vma.entry.shmid) {
                object.size = object.size.max(vma.entry.pgoff + (vma.entry.end - vma.entry.start));
            }
        }
    }

    /// Inodes of all of it.
    pub fn inodes(&self) -> impl Iterator<Item = u64> {
        self.0.keys().copied()
    }

    /// Gives memory `ino` up: somebody else writes it.
    pub fn take(&mut self, ino: u64) -> Option<OwnedFd> {
        self.0.remove(&ino).map(|object| object.file)
    }

    /// Writes all of it.
    pub fn dump(&self, store: &PageStore) -> Result<()> {
        self.0.iter().try_for_each(|(ino, object)| dump(store, &object.file, *ino, object.size))
    }
}

/// Writes `pagemap-shmem-SHMID` and its pages for the first `size` bytes of `file`. Holes and pages full of
/// zeros are left out: absent pages of a new file read as zero.
///
/// `file` may be an O_PATH descriptor: it is opened again for reading.
pub fn dump(store: &PageStore, file: impl AsFd, shmid: u64, size: u64) -> Result<()> {
    dump_with_tail(store, file, shmid, size, &[])
}

/// As [`dump`] for a `size` of whole pages, followed by `tail`, a last page that only a mapping shows whole.
pub fn dump_with_tail(store: &PageStore, file: impl AsFd, shmid: u64, size: u64, tail: &[u8]) -> Result<()> {
    let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    let file = File::open(&path).call("open").during(|| format!("shared memory {shmid}"))?;
    let mut out = store.create(ImageKind::ShmemPagemap, shmid)?;
    copy(&file, size, |at, bytes| out.add_nonzero(at, bytes, false))
        .during(|| format!("shared memory {shmid}"))?;
    out.add_nonzero(size, tail, false)?;
    let written = out.finish()?.written;
    let counts = store.counts();
    counts.shmem_scanned.fetch_add(size.div_ceil(PAGE_SIZE), Ordering::Relaxed);
    counts.shmem_written.fetch_add(written, Ordering::Relaxed);
    Ok(())
}

/// Calls `found(offset, bytes)` for all data below `size`, in whole pages.
fn copy(file: &File, size: u64, mut found: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
    let mut buf = vec![0; BATCH.min(size.next_multiple_of(PAGE_SIZE)) as usize];
    let mut at = 0;
    while at < size {
        let data = match lseek(file, at as i64, Whence::SeekData) {
            Ok(data) => data as u64,
            Err(Errno::ENXIO) => return Ok(()),
            Err(e) => return Err(e).call("lseek(SEEK_DATA)"),
        };
        let hole = lseek(file, data as i64, Whence::SeekHole).call("lseek(SEEK_HOLE)")? as u64;
        at = data / PAGE_SIZE * PAGE_SIZE;
        let end = hole.min(size);
        while at < end {
            interrupt::check()?;
            let len = (end - at).min(BATCH);
            let whole = len.next_multiple_of(PAGE_SIZE);
            let part = &mut buf[..whole as usize];
            file.read_exact_at(&mut part[..len as usize], at).call("pread")?;
            part[len as usize..].fill(0);
            found(at, part)?;
            at += whole;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcriu_images::{ImageDir, pagemap::PageReader};

    #[test]
    fn only_data_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let store = PageStore::new(ImageDir::open(dir.path()).unwrap());
        let file: File =
            nix::sys::memfd::memfd_create("test", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap().into();
        let size = (1 << 30) + 100;
        file.set_len(size).unwrap();
        file.write_all_at(b"first", 4096).unwrap();
        file.write_all_at(b"tail", size - 4).unwrap();
        file.write_all_at(&[0; 4096], 1 << 20).unwrap();
        dump(&store, &file, 77, size).unwrap();
        let reader = PageReader::open(&store.images, ImageKind::ShmemPagemap, 77).unwrap().unwrap();
        let regions: Vec<_> = reader.pagemap(0).unwrap().regions.iter().map(|r| (r.vaddr, r.pages)).collect();
        assert_eq!(regions, [(4096, 1), (1 << 30, 1)]);
        assert_eq!(&reader.read(4096, 4096).unwrap().unwrap()[..5], b"first");
        assert_eq!(&reader.read(1 << 30, 4096).unwrap().unwrap()[96..101], b"tail\0");
        assert_eq!(store.counts().shmem_written.load(Ordering::Relaxed), 2);
        assert_eq!(store.counts().shmem_scanned.load(Ordering::Relaxed), (1 << 18) + 1);
    }

    #[test]
    fn an_empty_file_has_an_empty_pagemap() {
        let dir = tempfile::tempdir().unwrap();
        let store = PageStore::new(ImageDir::open(dir.path()).unwrap());
        let file: File =
            nix::sys::memfd::memfd_create("test", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap().into();
        dump(&store, &file, 1, 0).unwrap();
        let reader = PageReader::open(&store.images, ImageKind::ShmemPagemap, 1).unwrap().unwrap();
        assert!(reader.pagemap(0).unwrap().regions.is_empty());
        assert!(!dir.path().join("pages-1.img").exists());
    }
}
