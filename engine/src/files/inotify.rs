//! inotify: watches on inodes.
//!
//! The kernel tells a watch's inode by device, number and file handle, not by the name it was added under. A
//! name is looked for on dump (any will do: the watch is on the inode), so that images work on other file
//! systems too; a watch on an unlinked file finds its ghost. Events that nobody has read are lost.

use std::{
    collections::HashMap,
    ffi::CString,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

use nix::unistd::read;
use rcriu_images::pb;

use super::{
    DrainedFd, FdProbe, FdType, FileKind, FilesOut, FilesTask, PlanFiles, RestoredFile, pipe,
    watch::{self, Fields, Inode, Mounts},
};
use crate::{
    error::{Context, Error, Result},
    pstree::FileId,
    sys::{handle, inotify},
};

/// The kind.
#[derive(Debug)]
pub(super) struct InotifyKind;

impl FileKind for InotifyKind {
    fn fd_type(&self) -> FdType {
        FdType::Inotify
    }

    fn claims(&self, fd: &FdProbe) -> bool {
        fd.anonymous("inotify") || fd.anonymous("[inotify]")
    }

    fn dump(&self, fd: &DrainedFd, id: FileId, out: &mut FilesOut<'_>) -> Result<pb::FileEntry> {
        if watch::has_events(fd)? {
            log::warn!("{}: inotify events that nobody has read are lost", fd.probe.place());
        }
        let info = &fd.probe.info;
        let mut wd = Vec::new();
        let lines = info.rest.iter().filter(|line| line.starts_with(b"inotify wd:"));
        for line in lines {
            let mut watch = parse(line).ok_or_else(|| fd.probe.strange())?;
            let inode = Inode { dev: watch.s_dev, ino: watch.i_ino };
            let name = out.inodes.path_of(inode, &watch.f_handle).during(|| {
                format!("watch {} on inode {} of device {:#x}", watch.wd, watch.i_ino, watch.s_dev)
            })?;
            watch.f_handle = watch::named(watch.f_handle, name, out);
            wd.push(watch);
        }
        let ify = pb::InotifyFileEntry { id: id.0, flags: info.flags, fown: fd.fown, wd };
        Ok(pb::FileEntry {
            r#type: FdType::Inotify as i32,
            id: id.0,
            ify: Some(ify.into()),
            ..Default::default()
        })
    }

    fn collect(&self, entry: &pb::FileEntry, plan: &mut PlanFiles<'_>) -> Result<Box<dyn RestoredFile>> {
        let mut entry = entry.ify.as_deref().cloned();
        if let Some(entry) = &mut entry {
            // Numbers are given out in rising order.
            entry.wd.sort_by_key(|watch| watch.wd);
            if let Some(bad) = entry.wd.iter().find(|w| w.f_handle.bytes as usize > handle::MAX) {
                return Err(Error::image(format!("files.img: a handle of {} bytes", bad.f_handle.bytes)));
            }
        }
        let entry = entry.ok_or_else(|| Error::image("files.img: an inotify entry without ify"))?;
        let ghosts = entry.wd.iter().filter_map(|w| Some((w.wd, plan.ghost_file(w.s_dev, w.i_ino)?)));
        Ok(Box::new(InotifyFile { ghosts: ghosts.collect(), entry }))
    }
}

/// `inotify wd:3 ino:9e7e sdev:800013 mask:800afce ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:7e9e..`
fn parse(line: &[u8]) -> Option<pb::InotifyWdEntry> {
    let fields = Fields::of(line)?;
    Some(pb::InotifyWdEntry {
        id: 0,
        i_ino: fields.hex("ino")?,
        mask: fields.hex("mask")? as u32,
        ignored_mask: fields.hex("ignored_mask").unwrap_or(0) as u32,
        s_dev: u32::try_from(fields.hex("sdev")?).ok()?,
        wd: u32::try_from(fields.hex("wd")?).ok()?,
        f_handle: fields.handle()?,
    })
}

/// An inotify instance to be restored.
#[derive(Debug)]
struct InotifyFile {
    entry: pb::InotifyFileEntry,
    /// Watches on files without a name: the file entry whose inode it is.
    ghosts: HashMap<u32, FileId>,
}

impl RestoredFile for InotifyFile {
    fn name(&self) -> String {
        "inotify".into()
    }

    fn fown(&self) -> Option<&pb::FownEntry> {
        Some(&self.entry.fown)
    }

    fn open(&self, _: &mut FilesTask<'_>) -> Result<OwnedFd> {
        let made = inotify::init()?;
        pipe::set_flags(&made, self.entry.flags.cast_signed())?;
        Ok(made)
    }

    /// Watches come last, so that fewer of the restore's own doings are seen.
    fn finish(&self, fd: BorrowedFd<'_>, cx: &mut FilesTask<'_>) -> Result<()> {
        let mut mounts = Mounts::new(cx.roots().clone());
        for watch in &self.entry.wd {
            self.add(fd, watch, &mut mounts, cx).during(|| {
                let path = watch.f_handle.path.as_deref().unwrap_or_default();
                format!("watch {} {}", watch.wd, path.escape_ascii())
            })?;
        }
        Ok(())
    }
}

impl InotifyFile {
    fn add(
        &self,
        inotify: BorrowedFd<'_>,
        watch: &pb::InotifyWdEntry,
        mounts: &mut Mounts,
        cx: &FilesTask<'_>,
    ) -> Result<()> {
        let target = watch::target(self.ghosts.get(&watch.wd), watch.s_dev, &watch.f_handle, mounts, cx)?;
        let path = CString::new(format!("/proc/self/fd/{}", target.as_raw_fd())).unwrap_or_default();
        let wanted = watch.wd.cast_signed();
        let mask = watch.mask & (libc::IN_ALL_EVENTS | libc::IN_EXCL_UNLINK | libc::IN_ONESHOT);
        let choose = cx.kernel.inotify_next_watch;
        if choose {
            inotify::set_next(inotify, wanted)?;
        }
        // Without the right to choose, numbers are passed over until the right one comes.
        loop {
            let got = inotify::add(inotify, &path, mask)?;
            if got == wanted {
                return Ok(());
            }
            inotify::remove(inotify, got)?;
            // That left an event nobody must see.
            let _ = read(inotify, &mut [0; 64]);
            if got > wanted || choose {
                return Err(Error::image(format!("it became watch {got}")));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::fd::AsFd};

    use super::*;
    use crate::files::roundtrip::{FREE, Trip, at, get};
    use crate::files::watch::{HANDLE_WORDS, handle_bytes};

    fn path(folder: &std::path::Path, name: &str) -> CString {
        CString::new(folder.join(name).into_os_string().into_encoded_bytes()).unwrap()
    }

    /// Watches that events have come for.
    fn events(inotify: BorrowedFd<'_>) -> Vec<i32> {
        let mut seen = Vec::new();
        let mut bytes = [0; 4096];
        while let Ok(n) = read(inotify, &mut bytes) {
            let mut rest = &bytes[..n];
            while let Some((head, tail)) = rest.split_first_chunk::<16>() {
                let word = |at: usize| u32::from_ne_bytes(head[at..at + 4].try_into().unwrap());
                seen.push(word(0).cast_signed());
                rest = &tail[word(12) as usize..];
            }
        }
        seen
    }

    #[test]
    fn lines_become_entries() {
        let line = b"inotify wd:a ino:9e7e sdev:800013 mask:800afce ignored_mask:0 fhandle-bytes:8 \
            fhandle-type:1 f_handle:7e9e0000640d1b6d";
        let watch = parse(line).unwrap();
        assert_eq!((watch.wd, watch.i_ino, watch.s_dev, watch.mask), (10, 0x9e7e, 0x80_0013, 0x800_afce));
        assert_eq!((watch.f_handle.bytes, watch.f_handle.r#type), (8, 1));
        assert_eq!(watch.f_handle.handle.len(), HANDLE_WORDS);
        assert_eq!(handle_bytes(&watch.f_handle), [0x7e, 0x9e, 0, 0, 0x64, 0x0d, 0x1b, 0x6d]);
        assert_eq!(parse(b"inotify wd:1 ino:2 sdev:3 mask:4 fhandle-bytes:fff f_handle:00"), None);
    }

    #[test]
    fn watches_keep_their_numbers_masks_and_inodes() {
        Trip::new(
            concat!(module_path!(), "::watches_keep_their_numbers_masks_and_inodes"),
            |folder| {
                fs::create_dir(folder.join("dir")).unwrap();
                fs::write(folder.join("file"), "x").unwrap();
                fs::write(folder.join("gone"), "x").unwrap();
                let made = inotify::init().unwrap();
                let watch = |name, mask| inotify::add(made.as_fd(), &path(folder, name), mask).unwrap();
                let first = watch("dir", libc::IN_CREATE);
                watch("file", libc::IN_MODIFY);
                inotify::remove(made.as_fd(), first).unwrap();
                watch("dir", libc::IN_CREATE | libc::IN_EXCL_UNLINK);
                watch("gone", libc::IN_MODIFY);
                events(made.as_fd());
                at(made, FREE, false);
                // Its inode is kept by a descriptor.
                at(fs::File::options().write(true).open(folder.join("gone")).unwrap(), FREE + 1, false);
                fs::remove_file(folder.join("gone")).unwrap();
            },
            |folder| {
                events(get(FREE));
                fs::write(folder.join("file"), "y").unwrap();
                fs::write(folder.join("dir/new"), "y").unwrap();
                nix::unistd::write(get(FREE + 1), b"y").unwrap();
                let seen = events(get(FREE));
                assert!([2, 3, 4].iter().all(|wd| seen.contains(wd)), "{seen:?}");
                let info = fs::read_to_string(format!("/proc/self/fdinfo/{FREE}")).unwrap();
                assert!(!info.contains("wd:1 "), "{info}");
            },
        )
        .run();
    }

    #[test]
    fn a_link_is_watched_by_its_name() {
        let trip = Trip::new(
            concat!(module_path!(), "::a_link_is_watched_by_its_name"),
            |folder| {
                std::os::unix::fs::symlink("nowhere", folder.join("link")).unwrap();
                let made = inotify::init().unwrap();
                let mask = libc::IN_ATTRIB | libc::IN_DONT_FOLLOW;
                inotify::add(made.as_fd(), &path(folder, "link"), mask).unwrap();
                at(made, FREE, false);
            },
            |folder| {
                let (uid, link) = (nix::unistd::geteuid().as_raw(), folder.join("link"));
                std::os::unix::fs::lchown(link, Some(uid), None).unwrap();
                assert_eq!(events(get(FREE)), [1]);
            },
        );
        // Its handle leads nowhere.
        let between = |folder: &std::path::Path| {
            fs::rename(folder.join("link"), folder.join("old")).unwrap();
            std::os::unix::fs::symlink("nowhere", folder.join("link")).unwrap();
            fs::remove_file(folder.join("old")).unwrap();
        };
        Trip { between, ..trip }.run();
    }
}
