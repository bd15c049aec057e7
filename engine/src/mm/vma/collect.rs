//! From a list of mappings to entries, with the files behind them.
//!
//! Files are opened through `/proc/PID/map_files`, which reaches deleted ones and other mount namespaces; the same
//! file mapped often is opened once.

use std::{
    collections::HashMap,
    os::fd::{AsFd, OwnedFd},
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, openat, readlinkat},
    sys::stat::{Mode, fstatat},
};

use super::{Backing, MappedFiles, Opened, Vma, VmaRules, classify};
use crate::{
    error::{Context, Error, Result, SysContext},
    mm::{hugetlb, status as st},
    procfs::{
        ProcDir, excerpt,
        maps::{Map, VmFlags},
    },
};

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
    let mut collector = Collector::default();
    collector.vmas.reserve(maps.len());
    collector.add(dir, maps, rules, files, seen)?;
    Ok(collector.vmas)
}

/// The same, of one task, a part of them at a time.
#[derive(Debug, Default)]
pub struct Collector {
    map_files: Option<OwnedFd>,
    /// Files that are more than a number belong to the task that has mapped them.
    own: HashMap<FileKey, Opened>,
    pub vmas: Vec<Vma>,
}

impl Collector {
    /// Takes the next mappings.
    pub fn add(
        &mut self,
        dir: &ProcDir,
        maps: &[Map],
        rules: VmaRules,
        files: &mut dyn MappedFiles,
        seen: &mut SeenFiles,
    ) -> Result<()> {
        let Collector { map_files, own, vmas } = self;
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
                    let folder = match &*map_files {
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
                            if known { &mut seen.files } else { &mut *own }.insert(key, file);
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
        Ok(())
    }
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
    if map.name == b"anon_inode:[io_uring]" {
        return Ok(Opened { backing: Some(Backing::Uring(stat.st_ino)), size_bits: 0 });
    }
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
        libc::S_IFSOCK => {
            return Ok(Opened { backing: Some(Backing::Socket(stat.st_ino)), size_bits: 0 });
        }
        libc::S_IFCHR if stat.st_rdev == nix::sys::stat::makedev(1, 5) => {}
        kind => {
            let link = readlinkat(&map_files, range).unwrap_or_default();
            let what = match kind {
                libc::S_IFCHR => "device",
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
