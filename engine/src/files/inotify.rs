//! inotify: watches on inodes.
//!
//! The kernel tells a watch's inode by device, number and file handle, not by the name it was added under. A
//! name is looked for on dump (any will do: the watch is on the inode), so that images work on other file
//! systems too; a watch on an unlinked file finds its ghost. Events that nobody has read are lost.

use std::{
    collections::HashMap,
    ffi::CString,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    fcntl::{OFlag, open, readlink},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::stat::{Mode, major, minor, stat},
    unistd::read,
};
use rcriu_images::pb;

use super::{DrainedFd, FdProbe, FdType, FileKind, FilesOut, FilesTask, PlanFiles, RestoredFile, pipe};
use crate::{
    error::{Context, Error, Result, SysContext},
    procfs::{self, mountinfo},
    pstree::FileId,
    sys::{handle, inotify},
};

/// Words of a handle in images, always as many.
const HANDLE_WORDS: usize = 16;

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

    fn dump(&self, fd: &DrainedFd, id: FileId, _: &mut FilesOut<'_>) -> Result<pb::FileEntry> {
        let mut ready = [PollFd::new(fd.file.as_fd(), PollFlags::POLLIN)];
        if poll(&mut ready, PollTimeout::ZERO).call("poll")? > 0 {
            log::warn!("{}: inotify events that nobody has read are lost", fd.probe.place());
        }
        let info = &fd.probe.info;
        let mut wd = Vec::new();
        let lines = info.rest.iter().filter(|line| line.starts_with(b"inotify wd:"));
        let mut mounts = Mounts::default();
        for line in lines {
            let mut watch = parse(line).ok_or_else(|| fd.probe.strange())?;
            watch.f_handle.path = mounts.path_of(&watch).during(|| {
                format!("watch {} on inode {} of device {:#x}", watch.wd, watch.i_ino, watch.s_dev)
            })?;
            wd.push(watch);
        }
        let ify = pb::InotifyFileEntry { id: id.0, flags: info.flags, fown: fd.fown, wd };
        Ok(pb::FileEntry { r#type: FdType::Inotify as i32, id: id.0, ify: Some(ify), ..Default::default() })
    }

    fn collect(&self, entry: &pb::FileEntry, plan: &mut PlanFiles<'_>) -> Result<Box<dyn RestoredFile>> {
        let mut entry = entry.ify.clone();
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
    let text = std::str::from_utf8(line).ok()?;
    let value = |label: &str| {
        let rest = text.split_once(&format!(" {label}:"))?.1;
        rest.split_whitespace().next()
    };
    let hex = |label: &str| procfs::hex(value(label)?.as_bytes());
    let bytes = usize::try_from(hex("fhandle-bytes")?).ok().filter(|n| *n <= handle::MAX)?;
    let digits = value("f_handle")?.as_bytes();
    let mut data = [0u8; handle::MAX];
    for (to, pair) in data[..bytes].iter_mut().zip(digits.chunks(2)) {
        *to = procfs::hex(pair)? as u8;
    }
    Some(pb::InotifyWdEntry {
        id: 0,
        i_ino: hex("ino")?,
        mask: hex("mask")? as u32,
        ignored_mask: hex("ignored_mask").unwrap_or(0) as u32,
        s_dev: u32::try_from(hex("sdev")?).ok()?,
        wd: u32::try_from(hex("wd")?).ok()?,
        f_handle: pb::FhEntry {
            bytes: bytes as u32,
            r#type: hex("fhandle-type")? as u32,
            handle: words(&data),
            path: None,
            mnt_id: None,
        },
    })
}

fn words(data: &[u8; handle::MAX]) -> Vec<u64> {
    data.as_chunks::<8>().0.iter().take(HANDLE_WORDS).map(|word| u64::from_ne_bytes(*word)).collect()
}

fn handle_bytes(entry: &pb::FhEntry) -> Vec<u8> {
    let mut bytes: Vec<u8> = entry.handle.iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.resize(entry.bytes as usize, 0);
    bytes
}

/// Folders through which the files of a device can be opened, found once for each device.
#[derive(Debug, Default)]
struct Mounts(HashMap<u32, Vec<OwnedFd>>);

impl Mounts {
    /// Mounts of a device in the kernel's numbering (major, 20 bits of minor).
    fn of(&mut self, dev: u32) -> Result<&[OwnedFd]> {
        use std::collections::hash_map::Entry;
        Ok(match self.0.entry(dev) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(free) => {
                let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
                let mounts = mountinfo::own()?.into_iter();
                let mounts = mounts.filter(|m| m.dev == (dev >> 20, dev & 0xf_ffff));
                let folders = mounts.filter_map(|m| open(m.point.as_slice(), flags, Mode::empty()).ok());
                free.insert(folders.collect())
            }
        })
    }

    /// Opens the inode of a handle.
    fn open(&mut self, dev: u32, entry: &pb::FhEntry) -> Result<Option<OwnedFd>> {
        let data = handle_bytes(entry);
        let kind = entry.r#type.cast_signed();
        let folders = self.of(dev)?.iter();
        Ok(folders.filter_map(|folder| handle::open(folder.as_fd(), kind, &data, libc::O_PATH).ok()).next())
    }

    /// A name of the watched inode, if one can be found.
    ///
    /// # Errors
    /// Nothing leads to the inode: neither its handle nor a name.
    fn path_of(&mut self, watch: &pb::InotifyWdEntry) -> Result<Option<Vec<u8>>> {
        let Some(file) = self.open(watch.s_dev, &watch.f_handle)? else {
            return Err(Error::unsupported("the watched file cannot be opened by its handle")
                .remedy("its file system has no handles, or is not mounted here"));
        };
        let path = readlink(format!("/proc/self/fd/{}", file.as_raw_fd()).as_str()).call("readlink")?;
        match stat(path.as_os_str()) {
            Ok(found) if found.st_ino == watch.i_ino && kernel_dev(found.st_dev) == watch.s_dev => {
                Ok(Some(std::os::unix::ffi::OsStringExt::into_vec(path)))
            }
            _ => Ok(None),
        }
    }
}

/// A device number in the form the kernel keeps it.
pub(super) fn kernel_dev(dev: u64) -> u32 {
    (major(dev) << 20 | minor(dev)) as u32
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
        let mut mounts = Mounts::default();
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
        let target = match (self.ghosts.get(&watch.wd), &watch.f_handle.path) {
            (Some(ghost), _) => {
                let handle = cx.handle(*ghost).ok_or_else(|| Error::bug("a ghost without a handle"))?;
                handle.try_clone_to_owned().call("dup")?
            }
            (None, Some(path)) => {
                open(path.as_slice(), OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).call("open")?
            }
            (None, None) => mounts
                .open(watch.s_dev, &watch.f_handle)?
                .ok_or_else(|| Error::host("the watched file is gone"))?,
        };
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
    use std::fs;

    use super::*;
    use crate::files::roundtrip::{FREE, Trip, at, get};

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
}
