//! Huge pages of hugetlbfs: their size as images write it, and whether enough of them are reserved here.
//!
//! Mappings and memfds in huge pages are dumped in ordinary pages like all others; what is particular is that
//! their addresses and lengths are multiples of the huge page, and that the memory comes from pools which the
//! administrator fills. A pool that is too small is found before anything is created, not by a SIGBUS later.

use std::{
    collections::{BTreeMap, HashSet},
    os::fd::OwnedFd,
};

use nix::sys::{
    stat::FileStat,
    statfs::{HUGETLBFS_MAGIC, Statfs},
};
use rcriu_images::{ImageKind, pagemap::PageReader, pb};

use super::{
    status as st,
    vma::{Backing, MappedFiles, Opened},
};
use crate::{
    error::{Error, Result, SysContext},
    procfs::maps::Map,
    restore::Snapshot,
};

/// `MAP_HUGETLB`, the same number in mmap(2) and in images.
pub const MAP_HUGETLB: u32 = libc::MAP_HUGETLB as u32;
/// `MFD_HUGETLB` of memfd_create(2).
pub const MFD_HUGETLB: u32 = libc::MFD_HUGETLB;
/// Where the base 2 logarithm of the page size stands in flags of mmap, memfd_create and shmget.
const SIZE_SHIFT: u32 = 26;
/// All of its bits.
pub const SIZE_MASK: u32 = 0x3f << SIZE_SHIFT;
/// Name of anonymous memory in huge pages, private or shared.
pub const ANONYMOUS: &[u8] = b"/anon_hugepage (deleted)";
/// Where the kernel shows its pools.
const POOLS: &str = "/sys/kernel/mm/hugepages";

/// Size of the pages of a file system, if it is a hugetlbfs.
pub fn page_size(fs: &Statfs) -> Option<u64> {
    (fs.filesystem_type() == HUGETLBFS_MAGIC).then(|| fs.block_size() as u64)
}

/// The bits of flags that say a page size, a power of two.
pub fn size_bits(page_size: u64) -> u32 {
    page_size.trailing_zeros() << SIZE_SHIFT
}

/// Page size that flags say; `None` where they leave it to the file or to the system.
pub fn said_size(flags: u32) -> Option<u64> {
    1u64.checked_shl((flags & SIZE_MASK) >> SIZE_SHIFT).filter(|size| *size > 1)
}

/// What the addresses of a mapping must be multiples of.
pub fn alignment(vma: &pb::VmaEntry) -> u64 {
    let said = (vma.flags & MAP_HUGETLB != 0).then(|| said_size(vma.flags)).flatten();
    said.unwrap_or(4096).max(4096)
}

/// The file behind a mapping in huge pages: of a mounted hugetlbfs, a memfd, or anonymous memory.
pub(super) fn open(fd: OwnedFd, stat: &FileStat, map: &Map, files: &mut dyn MappedFiles) -> Result<Opened> {
    let fs = nix::sys::statfs::fstatfs(&fd).call("fstatfs")?;
    let size = page_size(&fs)
        .ok_or_else(|| Error::unsupported("memory in huge pages that are not of a hugetlbfs"))?;
    let size_bits = size_bits(size);
    let anonymous = map.name == ANONYMOUS;
    if anonymous && !map.shared {
        // Every private mapping has a file of its own, which stays empty.
        return if stat.st_blocks == 0 {
            Ok(Opened { backing: None, size_bits })
        } else {
            Err(Error::unsupported("mapping shared anonymous huge pages as private is not supported"))
        };
    }
    if map.name.starts_with(b"/SYSV") {
        return Err(Error::unsupported("System V shared memory in huge pages is not supported"));
    }
    if anonymous || map.name.starts_with(b"/memfd:") {
        return Ok(Opened { backing: Some(Backing::Memfd(files.mapped(fd)?)), size_bits });
    }
    // The size is that of the file system, here and there.
    Ok(Opened { backing: Some(Backing::File(files.mapped(fd)?)), size_bits: 0 })
}

/// Whether the pools of this system hold what the snapshot takes from them at least.
///
/// # Errors
/// The pool that is too small, and how to enlarge it.
pub fn check(snapshot: &Snapshot) -> Result<()> {
    for (size, pages) in needed(snapshot)? {
        let pool = Pool::read(size)?;
        let Some(pool) = pool else {
            return Err(Error::host(format!(
                "the dump has huge pages of {}, which this system does not know",
                text(size)
            )));
        };
        if pool.available() < pages {
            return Err(Error::host(format!(
                "the dump needs {pages} huge pages of {}, here {} are free",
                text(size),
                pool.available()
            ))
            .remedy(format!(
                "echo {} > {}/nr_hugepages",
                pool.total.saturating_add(pages).saturating_sub(pool.available()),
                folder(size)
            )));
        }
    }
    Ok(())
}

/// Pages of each size. Memory that parent and child share since a fork is counted once, whatever of it they
/// have apart.
fn needed(snapshot: &Snapshot) -> Result<BTreeMap<u64, u64>> {
    fn add(pages: &mut BTreeMap<u64, u64>, size: u64, more: u64) {
        let sum = pages.entry(size).or_default();
        *sum = sum.saturating_add(more);
    }
    let mut pages = BTreeMap::new();
    let mut private = HashSet::new();
    let mut shared: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
    let vmas = snapshot.alive().filter_map(|(_, task)| task.mm.as_ref()).flat_map(|mm| &mm.vmas);
    for vma in vmas.filter(|v| v.flags & MAP_HUGETLB != 0 && v.flags & libc::MAP_NORESERVE as u32 == 0) {
        let Some(size) = said_size(vma.flags) else { continue };
        if vma.status & st::ANON_PRIVATE != 0 && private.insert((vma.start, vma.end)) {
            add(&mut pages, size, (vma.end - vma.start) / size);
        }
        if vma.status & st::ANON_SHARED != 0 {
            let end = vma.pgoff.saturating_add(vma.end - vma.start);
            let known = shared.entry(vma.shmid).or_insert((size, 0));
            known.1 = known.1.max(end / size);
        }
    }
    for (size, count) in shared.into_values() {
        add(&mut pages, size, count);
    }
    for inode in snapshot.dir.read_all::<pb::MemfdInodeEntry>(ImageKind::MemfdInode, 0)? {
        let Some(size) = inode.hugetlb_flag.and_then(said_size) else { continue };
        let Some(content) = PageReader::open(&snapshot.dir, ImageKind::ShmemPagemap, inode.shmid.into())?
        else {
            continue;
        };
        let mut end = 0;
        for region in content.pagemap(0).into_iter().flat_map(|map| &map.regions) {
            let (first, last) = ((region.vaddr / size).max(end), region.end().div_ceil(size));
            add(&mut pages, size, last.saturating_sub(first));
            end = end.max(last);
        }
    }
    Ok(pages)
}

/// One pool, in pages.
#[derive(Debug, PartialEq, Eq)]
struct Pool {
    total: u64,
    free: u64,
    /// Promised to mappings that have not touched them.
    reserved: u64,
    /// What may be taken from ordinary memory, and how much of it was.
    overcommit: u64,
    surplus: u64,
}

impl Pool {
    /// `None` for a size without a pool.
    fn read(size: u64) -> Result<Option<Pool>> {
        let folder = folder(size);
        if !std::path::Path::new(&folder).exists() {
            return Ok(None);
        }
        let number = |name: &str| {
            let path = format!("{folder}/{name}");
            let text = std::fs::read_to_string(&path).call(format!("open({path})"))?;
            text.trim().parse().map_err(|_| Error::host(format!("{path} holds no number: {text}")))
        };
        Ok(Some(Pool {
            total: number("nr_hugepages")?,
            free: number("free_hugepages")?,
            reserved: number("resv_hugepages")?,
            overcommit: number("nr_overcommit_hugepages")?,
            surplus: number("surplus_hugepages")?,
        }))
    }

    fn available(&self) -> u64 {
        self.free.saturating_sub(self.reserved) + self.overcommit.saturating_sub(self.surplus)
    }
}

fn folder(size: u64) -> String {
    format!("{POOLS}/hugepages-{}kB", size >> 10)
}

fn text(size: u64) -> String {
    if size >= 1 << 30 { format!("{} GiB", size >> 30) } else { format!("{} MiB", size >> 20) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_two_in_the_highest_bits() {
        assert_eq!(size_bits(2 << 20), 21 << 26);
        assert_eq!(said_size(size_bits(1 << 30) | MAP_HUGETLB), Some(1 << 30));
        assert_eq!(said_size(MAP_HUGETLB), None);
        let vma = |flags| pb::VmaEntry { flags, ..Default::default() };
        assert_eq!(alignment(&vma(size_bits(2 << 20) | MAP_HUGETLB)), 2 << 20);
        assert_eq!(alignment(&vma(0x22)), 4096);
        assert_eq!(alignment(&vma(SIZE_MASK | MAP_HUGETLB)), 1 << 63);
    }

    #[test]
    fn what_is_reserved_is_not_available() {
        let pool = Pool { total: 20, free: 12, reserved: 5, overcommit: 3, surplus: 1 };
        assert_eq!(pool.available(), 9);
        assert_eq!(Pool::read(12345 << 10).unwrap(), None);
    }
}
