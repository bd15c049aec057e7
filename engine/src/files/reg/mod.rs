//! Files that a path leads to: regular files, folders, symbolic links held with O_PATH, and the devices of
//! memory (/dev/null and its kin), which behave like files.
//!
//! An image holds the path, never the content: the restore opens the path again and checks that what it finds
//! is what was dumped (size, build-id, mode). So the dump must make sure that the path leads to the inode.

mod known;
mod restore;

use nix::{
    errno::Errno,
    sys::{
        stat::{FileStat, SFlag, major, minor},
        statfs::{DEVPTS_SUPER_MAGIC, FsType, NFS_SUPER_MAGIC, OVERLAYFS_SUPER_MAGIC, PROC_SUPER_MAGIC},
    },
};
use rcriu_images::pb;

pub(super) use self::{known::Known, restore::RegFile};
use super::{DrainedFd, FdProbe, FdType, FileKind, FilesOut, PlanFiles, RestoredFile, ghost};
use crate::{
    error::{Error, Result},
    options::{External, FileValidation},
    pstree::FileId,
};

/// Major number of /dev/mem, /dev/null, /dev/zero, /dev/full, /dev/random, /dev/urandom, /dev/kmsg.
const MEM_MAJOR: u64 = 1;
const KMSG_MINOR: u64 = 11;

/// `__O_TMPFILE` without the O_DIRECTORY that comes with it.
const TMPFILE: u32 = 0o20_000_000;

/// Position of a file that must not be moved.
const NO_POSITION: u64 = u64::MAX;

/// The kind.
#[derive(Debug)]
pub(super) struct Reg;

impl FileKind for Reg {
    fn fd_type(&self) -> FdType {
        FdType::Reg
    }

    fn claims(&self, fd: &FdProbe) -> bool {
        match fd.file_type() {
            SFlag::S_IFREG | SFlag::S_IFDIR | SFlag::S_IFLNK => {
                fd.link.starts_with(b"/") && !super::memfd::is(fd) && fd.fs != super::refuse::SECRETMEM_MAGIC
            }
            SFlag::S_IFCHR => major(fd.stat.st_rdev) == MEM_MAJOR,
            _ => false,
        }
    }

    fn dump(&self, fd: &DrainedFd, id: FileId, out: &mut FilesOut<'_>) -> Result<pb::FileEntry> {
        dump_path(fd, id, out)
    }

    fn collect(&self, entry: &pb::FileEntry, plan: &mut PlanFiles<'_>) -> Result<Box<dyn RestoredFile>> {
        let reg = entry.reg.as_ref().ok_or_else(|| Error::image("files.img: a reg entry without reg"))?;
        if reg.id != entry.id {
            return Err(Error::image(format!("files.img: ids {:#x} and {:#x} differ", entry.id, reg.id)));
        }
        Ok(Box::new(RegFile::new(FileId(entry.id), plan)?))
    }
}

/// Dumps the path that leads to an open file: for descriptors of this kind, and for all others that need one.
pub(super) fn dump_path(fd: &DrainedFd, id: FileId, out: &mut FilesOut<'_>) -> Result<pb::FileEntry> {
    let probe = &fd.probe;
    let stat = &probe.stat;
    let mut entry = pb::RegFileEntry {
        id: id.0,
        flags: probe.info.flags,
        pos: probe.info.pos,
        fown: fd.fown,
        mode: Some(stat.st_mode),
        mnt_id: out.own_mount(probe),
        ..Default::default()
    };
    if let Some(external) = external(probe, out) {
        entry.name = external.id().into_bytes();
        entry.ext = Some(true);
    } else if let Some(external) = outside(probe, out)? {
        log::warn!(
            "fd of task {}: {} lies outside of the tree's mount namespace: a restore opens it there, unless it is \
             given ({})",
            probe.task,
            probe.link_text(),
            external.id()
        );
        entry.name = external.id().into_bytes();
        entry.ext = Some(true);
        let outside = Some(probe.link.clone());
        out.more(pb::RcriuFileEntry { id: id.0, outside, ..Default::default() })?;
    } else {
        entry.name = name_of(fd, id, out)?;
    }
    // The kernel's log can be written at no position but the end.
    let kmsg = probe.file_type() == SFlag::S_IFCHR && minor(stat.st_rdev) == KMSG_MINOR;
    if kmsg && entry.flags.cast_signed() & libc::O_ACCMODE == libc::O_WRONLY && entry.pos == 0 {
        entry.pos = NO_POSITION;
    }
    if probe.file_type() == SFlag::S_IFREG && must_keep_size(entry.flags) {
        entry.size = Some(stat.st_size.cast_unsigned());
        if out.opts.common.file_validation == FileValidation::BuildId {
            entry.build_id = out.known.build_id(fd)?;
        }
    }
    Ok(pb::FileEntry { r#type: FdType::Reg as i32, id: id.0, reg: Some(entry), ..Default::default() })
}

fn external<'a>(probe: &FdProbe, out: &FilesOut<'a>) -> Option<&'a External> {
    out.opts.common.external.iter().find(|e| match e {
        External::File { mnt_id, inode } => {
            probe.info.mnt_id.map(i32::cast_unsigned) == Some(*mnt_id) && probe.stat.st_ino == *inode
        }
        _ => false,
    })
}

/// What an open file is called that lies on a mount of ours, not of the mount namespace the tree has for itself: output
/// of a container that goes to a file of the host.
fn outside(probe: &FdProbe, out: &FilesOut<'_>) -> Result<Option<External>> {
    let Some(mount) = out.own_mount(probe).filter(|_| probe.fd.is_some() && probe.link.starts_with(b"/"))
    else {
        return Ok(None);
    };
    if out.roots.mounts()?.iter().any(|(_, all)| all.iter().any(|inside| inside.id == mount)) {
        return Ok(None);
    }
    let found = nix::sys::stat::lstat(probe.link.as_slice());
    let is = found.is_ok_and(|found| (found.st_dev, found.st_ino) == (probe.stat.st_dev, probe.stat.st_ino));
    Ok(is.then_some(External::File { mnt_id: mount.cast_unsigned(), inode: probe.stat.st_ino }))
}

/// A log may grow between dump and restore.
fn must_keep_size(flags: u32) -> bool {
    let flags = flags.cast_signed();
    !(flags & libc::O_ACCMODE == libc::O_WRONLY && flags & libc::O_APPEND != 0)
}

/// Finds out by which name a restore can find the file; makes one where there is none.
fn name_of(fd: &DrainedFd, id: FileId, out: &mut FilesOut<'_>) -> Result<Vec<u8>> {
    let probe = &fd.probe;
    let link = &probe.link;
    if !link.starts_with(b"/") {
        return Err(Error::unsupported(format!("no path leads to the file: {}", probe.link_text()))
            .remedy("it may lie outside of our root or on a mount that was detached"));
    }
    let bare = link.strip_suffix(b" (deleted)").unwrap_or(link);
    match probe.fs {
        PROC_SUPER_MAGIC => return proc_name(probe, id, out),
        // The kernel makes these names itself; none ends like a deleted one.
        DEVPTS_SUPER_MAGIC => return Ok(bare.to_vec()),
        _ => {}
    }
    if probe.stat.st_nlink == 0 {
        ghost::dump_ghost(fd, id, out)?;
        return Ok(bare.to_vec());
    }
    if probe.fs == NFS_SUPER_MAGIC && is_silly_name(link) {
        // The name goes with the last descriptor.
        ghost::dump_linked(fd, link, id, out)?;
        return Ok(link.clone());
    }
    match out.known.stat(link, probe.info.mnt_id) {
        Ok(found) => {
            same_inode(probe, &found, out)?;
            Ok(link.clone())
        }
        Err(Errno::ENOENT | Errno::ENOTDIR) => {
            match ghost::dump_linked(fd, bare, id, out) {
                // A removed file of a lower layer cannot be linked: it has no name in truth.
                Err(e) if e.errno() == Some(libc::ENOENT) && is_overlay(probe.fs) => {
                    ghost::dump_ghost(fd, id, out)?;
                }
                other => other?,
            }
            Ok(bare.to_vec())
        }
        Err(e) => Err(Error::sys("stat", e as i32).during(probe.link_text())),
    }
}

fn is_overlay(fs: FsType) -> bool {
    fs == OVERLAYFS_SUPER_MAGIC
}

fn same_inode(probe: &FdProbe, found: &FileStat, out: &FilesOut<'_>) -> Result<()> {
    let ours = &probe.stat;
    if (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino) {
        return Ok(());
    }
    let device = matches!(probe.file_type(), SFlag::S_IFCHR | SFlag::S_IFBLK);
    if out.opts.common.evasive_devices && device && found.st_rdev == ours.st_rdev {
        return Ok(());
    }
    let at = |s: &FileStat| format!("inode {} on {}:{}", s.st_ino, major(s.st_dev), minor(s.st_dev));
    Err(Error::unsupported(format!(
        "the path {} leads to another file by now ({}, the open file is {})",
        probe.link_text(),
        at(found),
        at(ours)
    ))
    .remedy("something was mounted over it or took its name"))
}

/// A name below /proc: one of a task that is gone needs a stand-in on restore.
fn proc_name(probe: &FdProbe, id: FileId, out: &mut FilesOut<'_>) -> Result<Vec<u8>> {
    let link = &probe.link;
    let bare = link.strip_suffix(b" (deleted)");
    let rest = link.strip_prefix(b"/proc/").unwrap_or_default();
    let digits = rest.iter().take_while(|c| c.is_ascii_digit()).count();
    let Some(pid) = crate::procfs::number::<u32>(&rest[..digits]).filter(|pid| *pid > 0) else {
        return Ok(link.clone());
    };
    let folder = &link[..b"/proc/".len() + digits];
    if bare.is_some() || out.roots.of_mount(probe.info.mnt_id).lstat(folder).is_err() {
        out.ghosts.note(id, pid, pb::RemapType::Procfs)?;
    }
    Ok(bare.unwrap_or(link).to_vec())
}

/// A name NFS gives to a file that was removed while open: `.nfs` and 24 hexadecimal digits.
fn is_silly_name(path: &[u8]) -> bool {
    let name = path.rsplit(|c| *c == b'/').next().unwrap_or_default();
    name.strip_prefix(b".nfs")
        .is_some_and(|digits| digits.len() >= 24 && digits[..24].iter().all(u8::is_ascii_hexdigit))
}

#[cfg(test)]
mod tests;
