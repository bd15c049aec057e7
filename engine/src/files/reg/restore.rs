//! Back from the path.

use std::{
    ops::Deref,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    sync::Arc,
};

use nix::{
    fcntl::{OFlag, open, openat},
    sys::stat::{FileStat, Mode, fstat},
    unistd::{Whence, lseek},
};
use rcriu_images::pb;

use super::{NO_POSITION, TMPFILE};
use crate::{
    error::{Context, Error, Result, SysContext},
    files::{
        FilesTask, OpenHow, PlanFiles, Preflight, RestoredFile, build_id,
        ghost::{self, Remap},
    },
    options::{FileValidation, RestoreOptions},
    pstree::FileId,
};

/// An entry of files.img that has a path, shared with all who know it: there may be very many.
#[derive(Debug)]
struct Entry(Arc<pb::FileEntry>);

impl Entry {
    fn new(entry: &Arc<pb::FileEntry>) -> Option<Entry> {
        entry.reg.is_some().then(|| Entry(entry.clone()))
    }
}

impl Deref for Entry {
    type Target = pb::RegFileEntry;

    fn deref(&self) -> &pb::RegFileEntry {
        self.0.reg.as_ref().expect("looked at when this was made")
    }
}

/// A file a path leads to, to be restored.
#[derive(Debug)]
pub(in crate::files) struct RegFile {
    entry: Entry,
    remap: Option<Remap>,
    /// Where the inode still has a name, for a remap of that sort, and on which mount.
    linked: Option<(Option<i32>, Vec<u8>)>,
    /// Its path in the mount namespace of the engine.
    outside: Option<Vec<u8>>,
}

impl RegFile {
    /// That of an entry with a path.
    pub(in crate::files) fn new(id: FileId, plan: &PlanFiles<'_>) -> Result<Self> {
        let entry = plan.entries.get(id).and_then(Entry::new);
        let entry = entry.ok_or_else(|| Error::image(format!("files.img: there is no path {id}")))?;
        let external = entry.ext();
        if !external && (!entry.name.starts_with(b"/") || entry.name.contains(&0)) {
            return Err(Error::image(format!("files.img: {} is no path", entry.name.escape_ascii())));
        }
        let remap = plan.remaps.of(FileId(entry.id)).cloned();
        let linked = match &remap {
            Some(Remap::Linked(other)) => {
                let other = plan.entries.get(*other).and_then(|e| e.reg.as_ref());
                let path = other.map(|reg| (reg.mnt_id, reg.name.clone()));
                let path = path.filter(|(_, path)| path.starts_with(b"/"));
                Some(path.ok_or_else(|| {
                    Error::image(format!("remap-fpath.img: file {:#x} leads nowhere", entry.id))
                })?)
            }
            _ => None,
        };
        let outside = plan.more(FileId(entry.id)).and_then(|more| more.outside.clone());
        Ok(RegFile { entry, remap, linked, outside: outside.filter(|_| external) })
    }

    pub(in crate::files) fn flags(&self) -> i32 {
        self.entry.flags.cast_signed()
    }

    /// Flags for open(2) but for O_CLOEXEC: an unnamed temporary file is opened like any other.
    pub(super) fn open_flags(flags: i32) -> OFlag {
        let mut flags = flags;
        if flags.cast_unsigned() & TMPFILE != 0 {
            flags &= !libc::O_TMPFILE;
        }
        OFlag::from_bits_retain(flags) & !OFlag::O_CLOEXEC
    }

    /// Opens the file with other flags than the entry's, and checks that it is the one.
    pub(in crate::files) fn open_as(&self, flags: i32, cx: &mut FilesTask<'_>) -> Result<OwnedFd> {
        self.open_with(flags, true, cx).map(|(file, _)| file)
    }

    /// The same, close-on-exec or not as far as it is opened and not duplicated; tells whether it is.
    fn open_with(&self, flags: i32, mut cloexec: bool, cx: &mut FilesTask<'_>) -> Result<(OwnedFd, bool)> {
        if let Some(fd) = cx.inherited(|| self.name())? {
            return Ok((fd, true));
        }
        if let Some(file) = cx.given(FileId(self.entry.id))? {
            self.check_size_and_mode(&fstat(&file).call("fstat")?, cx.opts.skip_file_rwx_check)?;
            return Ok((file, true));
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
                let near = cx.folder_of((self.entry.mnt_id, &self.entry.name));
                let near = near.and_then(|(folder, name)| openat(folder, name, flags, Mode::empty()).ok());
                // What is wrong, the whole path tells: the folder may be another one by now.
                let opened = match near {
                    Some(opened) => Ok(opened),
                    None => {
                        let root = cx.roots().of_mount(self.entry.mnt_id);
                        open(root.path(&self.entry.name).as_ref(), flags, Mode::empty())
                    }
                };
                opened.call("open")?
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
        if let Some(path) = &self.outside {
            let stat = nix::sys::stat::stat(path.as_slice()).call("stat");
            let stat = stat.during(|| path.escape_ascii().to_string())?;
            return self.check_size_and_mode(&stat, cx.opts.skip_file_rwx_check);
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
        // Names below /proc/PID come into being with the tasks, those of a mount namespace with it.
        if self.entry.name.starts_with(b"/proc/") || cx.elsewhere {
            return Ok(());
        }
        let path = self.linked.as_ref().map_or(&self.entry.name, |(_, path)| path);
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
            (_, Some((mount, path))) => ghost::Source::Link((*mount, path)),
            _ => return None,
        };
        let file = ghost::Lost {
            id: FileId(self.entry.id),
            path: (self.entry.mnt_id, &self.entry.name),
            flags: self.flags(),
        };
        Some((source, file))
    }

    fn is_given(&self, opts: &RestoreOptions) -> bool {
        self.outside.is_some() && !opts.inherit_fds.iter().any(|fd| fd.is_for(&self.name()))
    }

    fn give(&self, _: Option<OwnedFd>) -> Result<OwnedFd> {
        let path = self.outside.as_deref().ok_or_else(|| Error::bug("a file that nobody gives"))?;
        let file = open(path, Self::open_flags(self.flags()) | OFlag::O_CLOEXEC, Mode::empty());
        file.call("open").during(|| path.escape_ascii().to_string())
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
