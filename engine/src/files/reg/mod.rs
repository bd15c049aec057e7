//! Files that a path leads to: regular files, folders, symbolic links held with O_PATH, and the devices of
//! memory (/dev/null and its kin), which behave like files.
//!
//! An image holds the path, never the content: the restore opens the path again and checks that what it finds
//! is what was dumped (size, build-id, mode). So the dump must make sure that the path leads to the inode.

mod known;

use std::os::{
    fd::{AsRawFd, OwnedFd},
    unix::ffi::OsStrExt,
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, OFlag, open},
    sys::{
        stat::{FileStat, Mode, SFlag, fstat, fstatat, major, minor},
        statfs::{DEVPTS_SUPER_MAGIC, FsType, NFS_SUPER_MAGIC, OVERLAYFS_SUPER_MAGIC, PROC_SUPER_MAGIC},
    },
    unistd::{Whence, lseek},
};
use rcriu_images::pb;

pub(super) use self::known::Known;
use super::{
    DrainedFd, FdProbe, FdType, FileKind, FilesOut, FilesTask, OpenHow, PlanFiles, Preflight, RestoredFile,
    build_id,
    ghost::{self, Remap},
};
use crate::{
    error::{Context, Error, Result, SysContext},
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
        let reg = entry.reg.clone().ok_or_else(|| Error::image("files.img: a reg entry without reg"))?;
        if reg.id != entry.id {
            return Err(Error::image(format!("files.img: ids {:#x} and {:#x} differ", entry.id, reg.id)));
        }
        Ok(Box::new(RegFile::new(reg, plan)?))
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
        ..Default::default()
    };
    if let Some(external) = external(probe, out) {
        entry.name = external.id().into_bytes();
        entry.ext = Some(true);
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
    match out.known.stat(link) {
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

fn stat_of(path: &[u8]) -> nix::Result<FileStat> {
    fstatat(AT_FDCWD, path, AtFlags::AT_SYMLINK_NOFOLLOW)
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
    if bare.is_some() || stat_of(folder).is_err() {
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

/// A file a path leads to, to be restored.
#[derive(Debug)]
pub(super) struct RegFile {
    entry: pb::RegFileEntry,
    remap: Option<Remap>,
    /// Where the inode still has a name, for a remap of that sort.
    linked: Option<Vec<u8>>,
}

impl RegFile {
    pub(super) fn new(entry: pb::RegFileEntry, plan: &PlanFiles<'_>) -> Result<Self> {
        let external = entry.ext();
        if !external && (!entry.name.starts_with(b"/") || entry.name.contains(&0)) {
            return Err(Error::image(format!("files.img: {} is no path", entry.name.escape_ascii())));
        }
        let remap = plan.remaps.of(FileId(entry.id)).cloned();
        let linked = match &remap {
            Some(Remap::Linked(other)) => {
                let other = plan.entries.get(other).and_then(|e| e.reg.as_ref());
                let path = other.map(|reg| reg.name.clone()).filter(|path| path.starts_with(b"/"));
                Some(path.ok_or_else(|| {
                    Error::image(format!("remap-fpath.img: file {:#x} leads nowhere", entry.id))
                })?)
            }
            _ => None,
        };
        Ok(RegFile { entry, remap, linked })
    }

    pub(super) fn flags(&self) -> i32 {
        self.entry.flags.cast_signed()
    }

    /// Flags for open(2) but for O_CLOEXEC: an unnamed temporary file is opened like any other.
    fn open_flags(flags: i32) -> OFlag {
        let mut flags = flags;
        if flags.cast_unsigned() & TMPFILE != 0 {
            flags &= !libc::O_TMPFILE;
        }
        OFlag::from_bits_retain(flags) & !OFlag::O_CLOEXEC
    }

    /// Opens the file with other flags than the entry's, and checks that it is the one.
    pub(super) fn open_as(&self, flags: i32, cx: &FilesTask<'_>) -> Result<OwnedFd> {
        self.open_with(flags, true, cx).map(|(file, _)| file)
    }

    /// The same, close-on-exec or not as far as it is opened and not duplicated; tells whether it is.
    fn open_with(&self, flags: i32, mut cloexec: bool, cx: &FilesTask<'_>) -> Result<(OwnedFd, bool)> {
        if let Some(fd) = cx.inherited(|| self.name())? {
            return Ok((fd, true));
        }
        let wanted = if cloexec { OFlag::O_CLOEXEC } else { OFlag::empty() };
        if self.entry.ext() {
            return Err(Error::host(format!("{} must be given from outside", self.name()))
                .remedy(format!("restore with --inherit-fd fd[N]:{}", self.name())));
        }
        let file = match cx.handle(FileId(self.entry.id)) {
            // Symbolic links cannot be opened through /proc: the handle was made with the right flags.
            Some(handle) if flags & libc::O_PATH != 0 && flags & libc::O_NOFOLLOW != 0 => {
                cloexec = true;
                handle.try_clone_to_owned().call("dup")?
            }
            Some(handle) => {
                let path = format!("/proc/self/fd/{}", handle.as_raw_fd());
                let flags = Self::open_flags(flags) & !OFlag::O_NOFOLLOW;
                open(path.as_str(), flags | wanted, Mode::empty()).call("open")?
            }
            None => {
                let flags = Self::open_flags(flags) | wanted;
                open(self.entry.name.as_slice(), flags, Mode::empty()).call("open")?
            }
        };
        let stat = fstat(&file).call("fstat")?;
        self.check_size_and_mode(&stat, cx.opts.skip_file_rwx_check)?;
        Ok((file, cloexec))
    }

    fn check_size_and_mode(&self, stat: &FileStat, skip_permissions: bool) -> Result<()> {
        if let Some(size) = self.entry.size
            && stat.st_size.cast_unsigned() != size
        {
            return Err(Error::host(format!("it has {} bytes, {size} when it was dumped", stat.st_size)));
        }
        if let Some(mode) = self.entry.mode {
            let mask = if skip_permissions { !0o777 } else { !0 };
            if stat.st_mode & mask != mode & mask {
                return Err(Error::host(format!(
                    "its mode is {:o}, {mode:o} when it was dumped",
                    stat.st_mode
                ))
                .remedy("permissions alone can be left out of account with --skip-file-rwx-check"));
            }
        }
        Ok(())
    }

    fn check_build_id(&self) -> Result<()> {
        if self.entry.build_id.is_empty() || self.entry.size.is_none() {
            return Ok(());
        }
        let path = std::ffi::OsStr::from_bytes(&self.entry.name);
        let file = std::fs::File::open(path).call("open")?;
        match build_id::of(&file).call("read")? {
            Some(found) if found != self.entry.build_id => {
                Err(Error::host("its build-id is another than when it was dumped")
                    .remedy("put the old file back, or restore with --file-validation filesize"))
            }
            _ => Ok(()),
        }
    }
}

impl RestoredFile for RegFile {
    fn name(&self) -> String {
        String::from_utf8_lossy(&self.entry.name).into_owned()
    }

    fn preflight(&self, cx: &Preflight<'_>) -> Result<()> {
        if cx.inherited(|| self.name()) {
            return Ok(());
        }
        if self.entry.ext() {
            return Err(Error::host("it must be given from outside")
                .remedy(format!("restore with --inherit-fd fd[N]:{}", self.name())));
        }
        match &self.remap {
            Some(Remap::Ghost(ghost)) => return ghost::check(cx.images, *ghost),
            Some(Remap::DeadProcess(_)) => return Ok(()),
            Some(Remap::Linked(_)) | None => {}
        }
        // Names below /proc/PID come into being with the tasks.
        if self.entry.name.starts_with(b"/proc/") {
            return Ok(());
        }
        let path = self.linked.as_deref().unwrap_or(&self.entry.name);
        let stat = cx.stat(path, self.flags() & libc::O_NOFOLLOW == 0);
        self.check_size_and_mode(&stat.call("stat")?, cx.opts.skip_file_rwx_check)?;
        if cx.opts.common.file_validation == FileValidation::BuildId && self.linked.is_none() {
            self.check_build_id()?;
        }
        Ok(())
    }

    fn lost(&self) -> Option<(ghost::Source<'_>, ghost::Lost<'_>)> {
        let source = match (&self.remap, &self.linked) {
            (Some(Remap::Ghost(ghost)), _) => ghost::Source::Ghost(*ghost),
            (_, Some(path)) => ghost::Source::Link(path),
            _ => return None,
        };
        let file = ghost::Lost { id: FileId(self.entry.id), path: &self.entry.name, flags: self.flags() };
        Some((source, file))
    }

    fn open(&self, cx: &mut FilesTask<'_>) -> Result<OwnedFd> {
        let wanted = cx.first_cloexec(FileId(self.entry.id));
        let (file, cloexec) = self.open_with(self.flags(), wanted, cx)?;
        cx.opened_cloexec = Some(cloexec);
        let pos = self.entry.pos;
        // A file that was just opened stands at 0, and some cannot be moved at all.
        if self.flags() & libc::O_PATH == 0 && pos != 0 && pos != NO_POSITION {
            lseek(&file, pos.cast_signed(), Whence::SeekSet).call("lseek")?;
        }
        Ok(file)
    }

    fn has_finish(&self) -> bool {
        false
    }

    fn fown(&self) -> Option<&pb::FownEntry> {
        (self.flags() & libc::O_PATH == 0).then_some(&self.entry.fown)
    }

    fn open_again(&self, how: OpenHow, cx: &mut FilesTask<'_>) -> Option<Result<OwnedFd>> {
        Some(self.open_as(how.flags, cx).during(|| self.name()))
    }
}

#[cfg(test)]
mod tests;
