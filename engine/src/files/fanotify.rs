//! fanotify: marks on inodes and mounts.
//!
//! As with inotify the kernel tells an inode by device, number and handle, and a name is looked for on dump; a
//! mount is told by its number and found again by where it is mounted. Events that nobody has read are lost; a
//! group that others wait for permission of is refused while somebody waits.

use std::{
    collections::HashMap,
    os::fd::{BorrowedFd, OwnedFd},
};

use nix::{
    fcntl::{OFlag, open},
    sys::stat::Mode,
};
use rcriu_images::pb;

use super::{
    DrainedFd, FdProbe, FdType, FileKind, FilesOut, FilesTask, PlanFiles, RestoredFile, Roots, pipe,
    watch::{self, Fields, Inode, Mounts},
};
use crate::{
    error::{Context, Error, Result, SysContext},
    procfs::mountinfo,
    pstree::FileId,
    sys::fanotify,
};

/// The kind.
#[derive(Debug)]
pub(super) struct FanotifyKind;

impl FileKind for FanotifyKind {
    fn fd_type(&self) -> FdType {
        FdType::Fanotify
    }

    fn claims(&self, fd: &FdProbe) -> bool {
        fd.anonymous("[fanotify]")
    }

    fn dump(&self, fd: &DrainedFd, id: FileId, out: &mut FilesOut<'_>) -> Result<pb::FileEntry> {
        let info = &fd.probe.info;
        let mut lines = info.rest.iter().filter(|line| line.starts_with(b"fanotify "));
        let strange = || fd.probe.strange();
        let group = lines.next().and_then(|line| group(line)).ok_or_else(strange)?;
        if watch::has_events(fd)? {
            if group.0 & fanotify::DECIDES != 0 {
                return Err(Error::unsupported("somebody waits for permission of this fanotify group")
                    .remedy("let the program answer before the dump"));
            }
            log::warn!("{}: fanotify events that nobody has read are lost", fd.probe.place());
        }
        let mut marks = Vec::new();
        for line in lines {
            marks.push(mark(line, out).ok_or_else(strange)??);
        }
        let ffy = pb::FanotifyFileEntry {
            id: id.0,
            flags: info.flags,
            fown: fd.fown,
            faflags: group.0,
            evflags: group.1,
            mark: marks,
        };
        Ok(pb::FileEntry {
            r#type: FdType::Fanotify as i32,
            id: id.0,
            ffy: Some(ffy.into()),
            ..Default::default()
        })
    }

    fn collect(&self, entry: &pb::FileEntry, plan: &mut PlanFiles<'_>) -> Result<Box<dyn RestoredFile>> {
        let entry = entry.ffy.as_deref().cloned();
        let entry = entry.ok_or_else(|| Error::image("files.img: a fanotify entry without ffy"))?;
        let mut ghosts = HashMap::new();
        for (at, mark) in entry.mark.iter().enumerate() {
            if let Some(inode) = &mark.ie {
                watch::check_handle(&inode.f_handle)?;
                if let Some(ghost) = plan.ghost_file(mark.s_dev, inode.i_ino) {
                    ghosts.insert(at, ghost);
                }
            }
        }
        Ok(Box::new(FanotifyFile { entry, ghosts }))
    }
}

/// `fanotify flags:10 event-flags:0`
fn group(line: &[u8]) -> Option<(u32, u32)> {
    let fields = Fields::of(line)?;
    Some((fields.hex("flags")? as u32, fields.hex("event-flags")? as u32))
}

/// `fanotify ino:4f969 sdev:800013 mflags:0 mask:3b ignored_mask:40000000 fhandle-bytes:8 fhandle-type:1 f_handle:69..`
/// or `fanotify mnt_id:12 mflags:40 mask:38 ignored_mask:40000003`; `None` for a line that is neither.
fn mark(line: &[u8], out: &mut FilesOut<'_>) -> Option<Result<pb::FanotifyMarkEntry>> {
    let fields = Fields::of(line)?;
    let mut entry = pb::FanotifyMarkEntry {
        id: 0,
        r#type: pb::MarkType::Inode as i32,
        mflags: fields.hex("mflags")? as u32,
        mask: fields.hex("mask")? as u32,
        ignored_mask: fields.hex("ignored_mask")? as u32,
        s_dev: fields.hex("sdev").unwrap_or(0) as u32,
        ie: None,
        me: None,
    };
    if let Some(i_ino) = fields.hex("ino") {
        let mut f_handle = fields.handle()?;
        let inode = Inode { dev: entry.s_dev, ino: i_ino };
        let path = out.inodes.path_of(inode, &f_handle);
        return Some(path.during(|| format!("mark on inode {i_ino} of device {:#x}", entry.s_dev)).map(
            |path| {
                f_handle = watch::named(f_handle, path, out);
                entry.ie = Some(pb::FanotifyInodeMarkEntry { i_ino, f_handle });
                entry
            },
        ));
    }
    if let Some(mnt_id) = fields.hex("mnt_id") {
        return Some(mount_of(mnt_id, &out.roots).map(|mount| {
            entry.r#type = pb::MarkType::Mount as i32;
            entry.s_dev = mount.dev.0 << 20 | mount.dev.1;
            entry.me = Some(pb::FanotifyMountMarkEntry { mnt_id: mnt_id as u32, path: Some(mount.point) });
            entry
        }));
    }
    fields.hex("sdev")?;
    Some(Err(Error::unsupported("fanotify marks on whole file systems (FAN_MARK_FILESYSTEM) cannot be kept")))
}

fn mount_of(id: u64, roots: &Roots) -> Result<mountinfo::Mount> {
    let mounts = roots.mounts()?;
    let mut all = mounts.iter().flat_map(|(_, mounts)| mounts.iter());
    let found = all.find(|mount| u64::try_from(mount.id) == Ok(id));
    found
        .cloned()
        .ok_or_else(|| Error::unsupported(format!("a fanotify mark on mount {id}, which is not seen here")))
}

/// A fanotify group to be restored.
#[derive(Debug)]
struct FanotifyFile {
    entry: pb::FanotifyFileEntry,
    /// Marks on files without a name, by position: the file entry whose inode it is.
    ghosts: HashMap<usize, FileId>,
}

impl RestoredFile for FanotifyFile {
    fn name(&self) -> String {
        "fanotify".into()
    }

    fn fown(&self) -> Option<&pb::FownEntry> {
        Some(&self.entry.fown)
    }

    fn open(&self, _: &mut FilesTask<'_>) -> Result<OwnedFd> {
        // Not blocking is a flag of the open file, whatever the group was made with.
        let made = fanotify::init(self.entry.faflags, self.entry.evflags)?;
        pipe::set_flags(&made, self.entry.flags.cast_signed())?;
        Ok(made)
    }

    /// Marks come last, so that fewer of the restore's own doings are seen.
    fn finish(&self, fd: BorrowedFd<'_>, cx: &mut FilesTask<'_>) -> Result<()> {
        let mut mounts = Mounts::new(cx.roots().clone());
        for at in 0..self.entry.mark.len() {
            self.add(fd, at, &mut mounts, cx).during(|| format!("mark {at}"))?;
        }
        Ok(())
    }
}

impl FanotifyFile {
    fn add(&self, group: BorrowedFd<'_>, at: usize, mounts: &mut Mounts, cx: &FilesTask<'_>) -> Result<()> {
        let mark = &self.entry.mark[at];
        let (target, kind) = match (&mark.ie, &mark.me) {
            (Some(inode), _) => {
                (watch::target(self.ghosts.get(&at), mark.s_dev, &inode.f_handle, mounts, cx)?, 0)
            }
            (None, Some(mount)) => {
                let path = match &mount.path {
                    Some(path) => path.clone(),
                    None => mount_of(mount.mnt_id.into(), cx.roots())?.point,
                };
                let whole = cx.roots().of_mount(Some(mount.mnt_id.cast_signed())).path(&path);
                let target = open(whole.as_ref(), OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty());
                let target = target.call("open").during(|| path.escape_ascii().to_string())?;
                (target, libc::FAN_MARK_MOUNT)
            }
            (None, None) => return Err(Error::image("a fanotify mark on nothing")),
        };
        let flags = mark.mflags | kind;
        if mark.mask != 0 {
            fanotify::add(group, &target, flags & !fanotify::IGNORES, mark.mask)?;
        }
        if mark.ignored_mask != 0 {
            let ignore = if flags & fanotify::IGNORE == 0 { libc::FAN_MARK_IGNORED_MASK } else { 0 };
            fanotify::add(group, &target, flags | ignore, mark.ignored_mask)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::fd::AsFd};

    use super::*;
    use crate::files::roundtrip::{FREE, Trip, at, get};

    fn lines() -> Vec<String> {
        let text = fs::read_to_string(format!("/proc/self/fdinfo/{FREE}")).unwrap();
        text.lines().filter(|l| l.starts_with("fanotify")).map(str::to_owned).collect()
    }

    #[test]
    fn groups_keep_their_flags_and_marks() {
        Trip::new(
            concat!(module_path!(), "::groups_keep_their_flags_and_marks"),
            |folder| {
                fs::write(folder.join("file"), "x").unwrap();
                let group = fanotify::init(libc::FAN_CLOEXEC | libc::FAN_NONBLOCK, 0).unwrap();
                let file = fs::File::open(folder.join("file")).unwrap();
                let mask = (libc::FAN_MODIFY | libc::FAN_OPEN) as u32;
                fanotify::add(group.as_fd(), &file, 0, mask).unwrap();
                let ignored = libc::FAN_MARK_IGNORED_MASK | libc::FAN_MARK_IGNORED_SURV_MODIFY;
                fanotify::add(group.as_fd(), &file, ignored, libc::FAN_OPEN as u32).unwrap();
                at(group, FREE, true);
                fs::write(folder.join("before"), lines().join("\n")).unwrap();
            },
            |folder| {
                assert_eq!(fs::read_to_string(folder.join("before")).unwrap(), lines().join("\n"));
                fs::write(folder.join("file"), "y").unwrap();
                let mut event = [0; 256];
                let n = nix::unistd::read(get(FREE), &mut event).unwrap();
                assert!(n >= 24, "{n}");
                assert_ne!(u64::from_ne_bytes(event[8..16].try_into().unwrap()) & libc::FAN_MODIFY, 0);
            },
        )
        .run();
    }
}
