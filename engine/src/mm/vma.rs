//! Mappings: what a line of smaps means for the images.
//!
//! Every mapping falls in exactly one class; what has none, and every flag that could not be given back,
//! is refused by name.

mod collect;
mod flags;

use std::os::fd::OwnedFd;

use rcriu_images::pb;

use self::flags::{check_flags, told_by_flags};
pub use self::{
    collect::{Collector, SeenFiles, collect},
    flags::{foreign_userfaultfd, refresh},
};
use super::status as st;
use crate::{
    error::{Error, Result},
    procfs::maps::Map,
    pstree::FileId,
};

/// First address that no process can map: of 4-level page tables. With 5 levels the kernel gives higher
/// ones only to programs that ask for them.
pub const TASK_SIZE: u64 = 0x7fff_ffff_f000;

/// A mapping on its way into the images.
#[derive(Debug, Clone, PartialEq)]
pub struct Vma {
    pub entry: pb::VmaEntry,
    /// Kept in extra images: the name set by PR_SET_VMA_ANON_NAME, where there is one.
    pub name: Option<Vec<u8>>,
    /// Resident or swapped memory, where smaps tells; a mapping without any need not be scanned.
    pub touched: bool,
}

impl Vma {
    /// Whether all bits of `status` are set.
    pub fn is(&self, status: u32) -> bool {
        self.entry.status & status == status
    }

    /// Private memory, whose pages are dumped with the task.
    pub fn is_private(&self) -> bool {
        (self.is(st::REGULAR)
            && (self.is(st::ANON_PRIVATE) || self.is(st::FILE_PRIVATE))
            && self.entry.end <= TASK_SIZE)
            || self.is(st::SHADOW_STACK)
            || self.is(st::AIO_RING)
    }

    /// Whether pages of it go into the images: the kernel fills vvar, droppable memory is lost by design.
    pub fn has_pages(&self) -> bool {
        self.is_private() && !self.is(st::VVAR) && self.entry.flags & MAP_DROPPABLE == 0
    }

    /// All pages are dumped, resident or not: the restorer compares the vdso with its own.
    pub fn dumps_all(&self) -> bool {
        self.is(st::VDSO) || self.is(st::AIO_RING)
    }

    /// Whether the kernel can tell what changed in it: not what it writes itself past the page tables, nor the
    /// pages of hugetlbfs, which images take whole.
    pub fn can_be_tracked(&self) -> bool {
        self.has_pages() && !self.dumps_all() && self.entry.flags & libc::MAP_HUGETLB as u32 == 0
    }

    /// Private anonymous memory whose pages a lazy restore may fetch later.
    pub fn may_be_lazy(&self) -> bool {
        may_be_lazy(&self.entry)
    }

    /// Absent pages read as zero, so pages full of zeros need not be kept.
    pub fn zero_is_absent(&self) -> bool {
        self.is(st::ANON_PRIVATE) && !self.dumps_all() && self.entry.flags & libc::MAP_HUGETLB as u32 == 0
    }

    /// Whether process_vm_readv(2) can read it.
    pub fn readable(&self) -> bool {
        self.entry.prot & libc::PROT_READ as u32 != 0
    }
}

/// As [`Vma::may_be_lazy`].
pub fn may_be_lazy(entry: &pb::VmaEntry) -> bool {
    let flags = entry.flags;
    flags & ANON_PRIVATE_FLAGS == ANON_PRIVATE_FLAGS
        && flags & (libc::MAP_LOCKED | libc::MAP_HUGETLB) as u32 == 0
        && entry.status & (st::VDSO | st::VVAR | st::VSYSCALL) == 0
}

/// `MAP_DROPPABLE` (Linux 6.11).
const MAP_DROPPABLE: u32 = 0x08;
const ANON_PRIVATE_FLAGS: u32 = (libc::MAP_ANONYMOUS | libc::MAP_PRIVATE) as u32;

/// What stands behind a mapping that is not private anonymous memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// An ordinary file.
    File(FileId),
    /// A file of memory that has a descriptor somewhere, or had one.
    Memfd(FileId),
    /// Anonymous shared memory, by its inode.
    Shared(u64),
    /// Ring of a context for asynchronous I/O.
    AioRing,
    /// System V shared memory, by its number.
    Segment(i32),
    /// Rings of a packet socket, by its inode.
    Socket(u64),
    /// Memory of an io_uring, by its inode.
    Uring(u64),
}

/// What opening the file of a mapping told.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Opened {
    /// `None` for private anonymous memory, which has a file only if it lies in huge pages.
    pub backing: Option<Backing>,
    /// Size of its pages as flags say it, 0 for ordinary ones.
    pub size_bits: u32,
}

/// Gives mapped files their ids: the part of `files` that mappings need.
pub trait MappedFiles {
    /// The id of the file that `fd` (opened with O_PATH through map_files) refers to.
    fn mapped(&mut self, fd: OwnedFd) -> Result<FileId>;

    /// Takes note of anonymous shared memory `ino`; `fd` was opened with O_PATH.
    fn shared(&mut self, fd: OwnedFd, ino: u64);

    /// Takes note of System V shared memory `id`; `fd` was opened with O_PATH.
    fn segment(&mut self, fd: OwnedFd, id: i32);
}

/// Options that decide about mappings.
#[derive(Debug, Clone, Copy)]
pub struct VmaRules {
    /// `--allow-uprobes`.
    pub allow_uprobes: bool,
    /// `st_dev` of the kernel's own tmpfs.
    pub shmem_dev: u64,
}

/// What the mapping is in images; `None` for one that is left to the kernel.
pub fn classify(
    map: &Map,
    file: Option<Backing>,
    fdflags: Option<u32>,
    rules: VmaRules,
) -> Result<Option<Vma>> {
    let mut status = match map.name.as_slice() {
        b"[vsyscall]" => st::VSYSCALL,
        b"[vdso]" if has(map, libc::PROT_READ | libc::PROT_EXEC) => st::REGULAR | st::VDSO,
        b"[vvar]" | b"[vvar_vclock]" if has(map, libc::PROT_READ) => st::REGULAR | st::VVAR,
        b"[heap]" => st::REGULAR | st::HEAP,
        b"[uprobes]" if rules.allow_uprobes => return Ok(None),
        b"[uprobes]" => {
            return Err(Error::unsupported("a probe of perf or bpf is set in this program")
                .remedy("remove the probe, or give --allow-uprobes to leave it out"));
        }
        _ => st::REGULAR,
    };
    if matches!(file, Some(Backing::Uring(_))) {
        status |= st::URING;
    }
    check_flags(map, status)?;
    let mut flags = if map.shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
    let mut shmid = 0;
    match file {
        Some(Backing::Shared(ino)) => {
            status |= st::ANON_SHARED;
            flags |= libc::MAP_ANONYMOUS;
            shmid = ino;
        }
        Some(Backing::Segment(id)) => {
            status |= st::ANON_SHARED | st::SYSVIPC;
            flags |= libc::MAP_ANONYMOUS;
            shmid = id.cast_unsigned().into();
        }
        Some(Backing::AioRing) => status = st::AIO_RING,
        Some(Backing::Uring(_)) if !map.shared => {
            return Err(Error::unsupported("mapping an io_uring as private is not supported"));
        }
        Some(Backing::Uring(ino)) => shmid = ino,
        Some(Backing::Socket(ino)) => {
            status |= st::SOCKET;
            // Of the file, once descriptors have numbers: see `dump::rings`.
            shmid = ino;
        }
        Some(Backing::File(id)) => {
            status |= if map.shared { st::FILE_SHARED } else { st::FILE_PRIVATE };
            shmid = u64::from(id.0);
        }
        Some(Backing::Memfd(id)) => {
            status |= st::MEMFD | if map.shared { st::FILE_SHARED } else { st::FILE_PRIVATE };
            shmid = u64::from(id.0);
        }
        None if map.shared => {
            return Err(Error::unsupported("shared memory without a file behind it is not supported"));
        }
        None => {
            status |= st::ANON_PRIVATE;
            flags |= libc::MAP_ANONYMOUS;
        }
    }
    let (flags, madv) = told_by_flags(map, flags as u32);
    let name = map
        .name
        .strip_prefix(b"[anon:")
        .or_else(|| map.name.strip_prefix(b"[anon_shmem:"))
        .and_then(|n| n.strip_suffix(b"]"))
        .map(<[u8]>::to_vec);
    Ok(Some(Vma {
        entry: pb::VmaEntry {
            start: map.start,
            end: map.end,
            pgoff: map.pgoff,
            shmid,
            prot: map.prot,
            flags,
            status,
            fd: -1,
            madv,
            fdflags,
        },
        name,
        touched: map.touched,
    }))
}

/// An entry for a range of guard pages.
pub fn guard(start: u64, end: u64) -> Vma {
    let entry = pb::VmaEntry { start, end, status: st::GUARD, fd: -1, ..pb::VmaEntry::default() };
    Vma { entry, name: None, touched: false }
}

fn has(map: &Map, prot: i32) -> bool {
    map.prot & prot as u32 == prot as u32
}

#[cfg(test)]
mod tests;
