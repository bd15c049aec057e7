//! Mappings: what a line of smaps means for the images.
//!
//! Every mapping falls in exactly one class; what has none, and every flag that could not be given back,
//! is refused by name. Files are opened through `/proc/PID/map_files`, which reaches deleted ones and
//! other mount namespaces; the same file mapped often is opened once.

mod flags;

use std::{
    collections::HashMap,
    os::fd::{AsFd, OwnedFd},
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, openat, readlinkat},
    sys::stat::{Mode, fstatat},
};
use rcriu_images::pb;

use self::flags::{check_flags, told_by_flags};
pub use self::flags::{foreign_userfaultfd, refresh};
use super::{hugetlb, status as st};
use crate::{
    error::{Context, Error, Result, SysContext},
    procfs::{
        ProcDir, excerpt,
        maps::{Map, VmFlags},
    },
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

/// Files of mappings that were met in any task. While all tasks stand still, two lines of smaps that agree in device,
/// inode and path speak of the same file.
#[derive(Debug, Default)]
pub struct SeenFiles {
    files: HashMap<FileKey, Opened>,
    /// How the file of a private mapping was opened. A mapping of another task that agrees in its place too was
    /// inherited from it, or made by the same loader.
    modes: HashMap<(u64, u64, u64, FileKey), Option<u32>>,
}

/// Device, inode, path, and whether the mapping is shared: a private view of a file is another matter than a shared
/// one.
type FileKey = (u32, u32, u64, Vec<u8>, bool);

/// All mappings of the task behind `dir`, in order, as entries of the mm image.
pub fn collect(
    dir: &ProcDir,
    maps: &[Map],
    rules: VmaRules,
    files: &mut dyn MappedFiles,
    seen: &mut SeenFiles,
) -> Result<Vec<Vma>> {
    let mut map_files = None;
    // Files that are more than a number belong to the task that has mapped them.
    let mut own: HashMap<FileKey, Opened> = HashMap::new();
    let mut vmas: Vec<Vma> = Vec::with_capacity(maps.len());
    for map in maps {
        let during = || format!("mapping {:x}-{:x} {}", map.start, map.end, excerpt(&map.name));
        let (file, fdflags) = if is_file(map) {
            let range = format!("{:x}-{:x}", map.start, map.end);
            let key = (map.dev.0, map.dev.1, map.ino, map.name.clone(), map.shared);
            let place = (map.start, map.end, map.pgoff, key.clone());
            let file = seen.files.get(&key).or_else(|| own.get(&key)).copied();
            let mode = seen.modes.get(&place).copied();
            if let (Some(file), Some(mode)) = (file, mode) {
                (file, mode)
            } else {
                let folder = match &map_files {
                    Some(folder) => folder,
                    None => map_files.insert(dir.file("map_files", OFlag::O_PATH | OFlag::O_DIRECTORY)?),
                };
                let mode = match mode {
                    Some(mode) => mode,
                    None => open_mode(folder, &range).during(during)?,
                };
                let file = match file {
                    Some(file) => file,
                    None => {
                        let file = open_file(folder, &range, map, rules, files).during(during)?;
                        let known = matches!(file.backing, Some(Backing::File(_)));
                        if known { &mut seen.files } else { &mut own }.insert(key, file);
                        file
                    }
                };
                if !map.shared {
                    seen.modes.insert(place, mode);
                }
                (file, mode)
            }
        } else {
            (Opened::default(), None)
        };
        let fdflags = fdflags.filter(|_| file.backing.is_some());
        let Some(mut vma) = classify(map, file.backing, fdflags, rules).during(during)? else { continue };
        vma.entry.flags |= file.size_bits;
        // The data pages of the vdso are one entry, however many mappings the kernel makes of them.
        if let Some(last) = vmas.last_mut()
            && vma.is(st::VVAR)
            && last.is(st::VVAR)
        {
            if last.entry.end != vma.entry.start {
                return Err(Error::unsupported("the vvar mappings were torn apart")).during(during);
            }
            last.entry.end = vma.entry.end;
            continue;
        }
        vmas.push(vma);
    }
    Ok(vmas)
}

/// Whether a file object stands behind the mapping. Named anonymous memory and the kernel's own mappings
/// have inode 0.
fn is_file(map: &Map) -> bool {
    map.ino != 0 || map.name.starts_with(b"/") || map.name.starts_with(b"anon_inode:") || map.dev != (0, 0)
}

/// Access mode the file was opened with, from the permissions of the link in map_files.
fn open_mode(map_files: impl AsFd, range: &str) -> Result<Option<u32>> {
    match fstatat(map_files, range, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(match stat.st_mode & 0o600 {
            0o200 => libc::O_WRONLY,
            0o600 => libc::O_RDWR,
            _ => libc::O_RDONLY,
        } as u32)),
        Err(Errno::ENOENT) => Ok(None),
        Err(e) => Err(e).call("fstatat(map_files)"),
    }
}

/// Memory of `mmap(MAP_SHARED | MAP_ANONYMOUS)` or of /dev/zero mapped shared, which is the same: the kernel
/// calls its file like the device, unless the program named the mapping.
fn is_shared_anon(map: &Map) -> bool {
    map.shared && (map.name == b"/dev/zero (deleted)" || map.name.starts_with(b"[anon_shmem:"))
}

fn open_file(
    map_files: impl AsFd,
    range: &str,
    map: &Map,
    rules: VmaRules,
    files: &mut dyn MappedFiles,
) -> Result<Opened> {
    let fd =
        openat(&map_files, range, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).call("open(map_files)")?;
    let stat = nix::sys::stat::fstat(&fd).call("fstat")?;
    let shmem = stat.st_dev == rules.shmem_dev;
    if map.name.starts_with(b"/secretmem") {
        return Err(Error::unsupported("secret memory (memfd_secret) can be read by nobody but its task")
            .remedy("unmap it before the dump"));
    }
    if map.name.starts_with(b"/[aio]") {
        return Ok(Opened { backing: Some(Backing::AioRing), size_bits: 0 });
    }
    if shmem && map.name.starts_with(b"/SYSV") {
        if !map.shared {
            return Err(Error::unsupported("mapping System V shared memory as private is not supported"));
        }
        // The inode has the number of the segment.
        let id = stat.st_ino as i32;
        files.segment(fd, id);
        return Ok(Opened { backing: Some(Backing::Segment(id)), size_bits: 0 });
    }
    if map.flags.any(VmFlags::HUGETLB) {
        return hugetlb::open(fd, &stat, map, files);
    }
    match stat.st_mode & libc::S_IFMT {
        libc::S_IFREG => {}
        libc::S_IFCHR if stat.st_rdev == nix::sys::stat::makedev(1, 5) => {}
        kind => {
            let link = readlinkat(&map_files, range).unwrap_or_default();
            let what = match kind {
                libc::S_IFCHR => "device",
                libc::S_IFSOCK => "socket",
                libc::S_IFBLK => "block device",
                _ => "kernel object",
            };
            return Err(Error::unsupported(format!(
                "mapping a {what} ({}) is not supported",
                link.display()
            )));
        }
    }
    if shmem && is_shared_anon(map) {
        files.shared(fd, stat.st_ino);
        return Ok(Opened { backing: Some(Backing::Shared(stat.st_ino)), size_bits: 0 });
    }
    let id = files.mapped(fd)?;
    let backing = if shmem { Backing::Memfd(id) } else { Backing::File(id) };
    Ok(Opened { backing: Some(backing), size_bits: 0 })
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
