//! Files that tasks hold but no path leads to any more.
//!
//! * A *ghost* has no name at all: its content travels in `ghost-file-N.img`.
//! * A *link remap* has lost the name it was opened by, but not its last one. Its inode stays on the file
//!   system; a link to it, made beside the old name, leads there until the restore (`--link-remap`).
//!
//! Either way `remap-fpath.img` says which file entry is meant. On restore the engine brings every such inode
//! under its old name, takes a handle (O_PATH) and removes the name at once, all before the first fork: tasks
//! open the handle, so nobody locks, nobody links, and nothing is left to clean up when tasks fail.

use std::{
    collections::HashMap,
    ffi::OsString,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
};

use nix::{
    errno::Errno,
    fcntl::AT_FDCWD,
    sys::stat::SFlag,
    unistd::{LinkatFlags, UnlinkatFlags, linkat, unlinkat},
};
use rcriu_images::{ImageDir, ImageKind, ImageWriter, pb};

use super::{DrainedFd, FilesOut, Roots};
use crate::{
    error::{Error, Result, SysContext},
    pstree::FileId,
};

mod moment;
mod restore;

pub use restore::{Lost, Source};
pub(super) use restore::{Remap, Remaps, bring_back, check};

/// Smaller files are one piece in their image; from here on holes are kept.
const CHUNKS_FROM: i64 = 3 * 4096;

/// What the dump has written of ghosts and made of links.
#[derive(Debug)]
pub(super) struct GhostsOut {
    remaps: ImageWriter,
    /// Ghost images by device and inode.
    known: HashMap<(u64, u64), u32>,
    next: u32,
    links: Links,
}

/// Names made beside lost ones. Dropped without [`GhostsOut::finish`] they go: the dump failed.
#[derive(Debug)]
struct Links {
    roots: Roots,
    /// With the mounts they are on.
    made: Vec<(Option<i32>, OsString)>,
}

impl Drop for Links {
    fn drop(&mut self) {
        for (mount, path) in self.made.drain(..) {
            let whole = self.roots.of_mount(mount).path(path.as_bytes());
            if let Err(e) = unlinkat(AT_FDCWD, whole.as_ref(), UnlinkatFlags::NoRemoveDir) {
                log::error!("unlink({}): {e}", path.display());
            }
        }
    }
}

impl GhostsOut {
    pub(super) fn new(images: &ImageDir, roots: Roots) -> Self {
        GhostsOut {
            remaps: images.writer(ImageKind::RemapFpath, 0),
            known: HashMap::new(),
            next: 1,
            links: Links { roots, made: Vec::new() },
        }
    }

    /// Completes the image. Links made for a restore are removed when the tasks go on without one.
    pub(super) fn finish(mut self, stays: bool) -> Result<()> {
        self.remaps.finish()?;
        if !stays {
            self.links.made.clear();
        }
        Ok(())
    }

    pub(super) fn note(&mut self, orig: FileId, remap: u32, kind: pb::RemapType) -> Result<()> {
        let entry =
            pb::RemapFilePathEntry { orig_id: orig.0, remap_id: remap, remap_type: Some(kind as i32) };
        Ok(self.remaps.write(&entry)?)
    }
}

/// Dumps a file without a name for entry `id`; every inode once.
///
/// # Errors
/// Content above `--ghost-limit`.
pub(super) fn dump_ghost(fd: &DrainedFd, id: FileId, out: &mut FilesOut<'_>) -> Result<()> {
    let stat = &fd.probe.stat;
    let used = stat.st_blocks.max(0).cast_unsigned().saturating_mul(512);
    if used > out.opts.ghost_limit {
        return Err(Error::unsupported(format!(
            "the file {} has no name any more and {used} bytes of content, more than --ghost-limit {}",
            fd.probe.link_text(),
            out.opts.ghost_limit
        ))
        .remedy(format!("dump with --ghost-limit {used}")));
    }
    let ghost = match out.ghosts.known.get(&(stat.st_dev, stat.st_ino)) {
        Some(ghost) => *ghost,
        None => {
            let ghost = out.ghosts.next;
            out.ghosts.next += 1;
            write_ghost(fd, ghost, out)?;
            out.ghosts.known.insert((stat.st_dev, stat.st_ino), ghost);
            ghost
        }
    };
    out.ghosts.note(id, ghost, pb::RemapType::Ghost)
}

fn write_ghost(fd: &DrainedFd, ghost: u32, out: &FilesOut<'_>) -> Result<()> {
    let stat = &fd.probe.stat;
    log::info!("Dumping ghost file contents (id {ghost:#x}): {}", fd.probe.link_text());
    let kind = fd.probe.file_type();
    let time = |sec: i64, nsec: i64| {
        Some(pb::Timeval { tv_sec: sec.cast_unsigned(), tv_usec: (nsec / 1000).cast_unsigned() })
    };
    let chunks = kind == SFlag::S_IFREG && stat.st_size >= CHUNKS_FROM;
    let device = kind == SFlag::S_IFCHR || kind == SFlag::S_IFBLK;
    let mut image = out.images.writer(ImageKind::GhostFile, u64::from(ghost));
    image.write(&pb::GhostFileEntry {
        uid: out.users.user(stat.st_uid),
        gid: out.users.group(stat.st_gid),
        mode: stat.st_mode,
        dev: Some(super::watch::kernel_dev(stat.st_dev)),
        ino: Some(stat.st_ino),
        rdev: device.then_some(stat.st_rdev as u32),
        atim: time(stat.st_atime, stat.st_atime_nsec),
        mtim: time(stat.st_mtime, stat.st_mtime_nsec),
        chunks: chunks.then_some(true),
        size: chunks.then_some(stat.st_size.cast_unsigned()),
        symlnk_target: (kind == SFlag::S_IFLNK).then(|| link_target(fd.file.as_fd())).transpose()?,
    })?;
    if kind == SFlag::S_IFREG {
        let file = fd.reopen_for_reading()?;
        if chunks {
            write_chunks(&file, stat.st_size.cast_unsigned(), &mut image)?;
        } else {
            copy(&file, 0, stat.st_size.cast_unsigned(), &mut image)?;
        }
    }
    Ok(image.finish()?)
}

fn link_target(link: BorrowedFd<'_>) -> Result<Vec<u8>> {
    Ok(nix::fcntl::readlinkat(link, "").call("readlinkat")?.into_vec())
}

/// Writes the pieces of a file that hold data.
fn write_chunks(file: &std::fs::File, size: u64, image: &mut ImageWriter) -> Result<()> {
    use nix::unistd::{Whence, lseek};
    let seek = |at: u64, whence| -> Result<Option<u64>> {
        match lseek(file, at.cast_signed(), whence) {
            Ok(at) => Ok(Some(at.cast_unsigned())),
            Err(Errno::ENXIO) => Ok(None),
            Err(e) => Err(Error::sys("lseek(SEEK_DATA)", e as i32)),
        }
    };
    let mut at = 0;
    while at < size {
        let Some(data) = seek(at, Whence::SeekData)? else { break };
        let end = seek(data, Whence::SeekHole)?.unwrap_or(size).min(size);
        if end <= data {
            break;
        }
        image.write(&pb::GhostChunkEntry { len: end - data, off: data })?;
        copy(file, data, end - data, image)?;
        at = end;
    }
    Ok(())
}

fn copy(file: &std::fs::File, mut at: u64, mut len: u64, image: &mut ImageWriter) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let mut buffer = vec![0u8; len.min(1 << 20) as usize];
    while len > 0 {
        crate::interrupt::check()?;
        let step = buffer.len().min(usize::try_from(len).unwrap_or(usize::MAX));
        file.read_exact_at(&mut buffer[..step], at).call("pread")?;
        image.write_raw(&buffer[..step])?;
        at += step as u64;
        len -= step as u64;
    }
    Ok(())
}

/// Gives the inode behind entry `id` a name beside the one it lost (`path`, without " (deleted)").
///
/// # Errors
/// Not allowed without `--link-remap`; ENOENT on overlayfs, whose removed lower files cannot be linked.
pub(super) fn dump_linked(fd: &DrainedFd, path: &[u8], id: FileId, out: &mut FilesOut<'_>) -> Result<()> {
    let text = path.escape_ascii().to_string();
    if !out.opts.common.link_remap {
        return Err(Error::unsupported(format!("the file {text} has lost this name but not its last one"))
            .remedy("dump with --link-remap"));
    }
    let lid = out.fresh_id()?;
    let (mount, mnt_id) = (fd.probe.info.mnt_id, out.own_mount(&fd.probe));
    let mut folder = parent(path);
    let link = loop {
        let mut link = folder.to_vec();
        link.extend_from_slice(format!("/link_remap.{}", lid.0).as_bytes());
        let whole = out.roots.of_mount(mount).path(&link);
        match make_link(fd, &whole, out) {
            Ok(()) => break link,
            // The folder is gone as well: the one above will do, the name does not matter.
            Err(e) if e.errno() == Some(libc::ENOENT) && !folder.is_empty() => folder = parent(folder),
            Err(e) => return Err(e.during(format!("a name for {text}"))),
        }
    };
    out.ghosts.links.made.push((mount, OsString::from_vec(link.clone())));
    out.write(pb::FileEntry {
        r#type: super::FdType::Reg as i32,
        id: lid.0,
        reg: Some(pb::RegFileEntry { id: lid.0, name: link, mnt_id, ..Default::default() }),
        ..Default::default()
    })?;
    out.ghosts.note(id, lid.0, pb::RemapType::Linked)
}

fn make_link(fd: &DrainedFd, path: &[u8], out: &FilesOut<'_>) -> Result<()> {
    let link = || linkat(fd.file.as_fd(), "", AT_FDCWD, path, LinkatFlags::AT_EMPTY_PATH).call("linkat");
    match (link(), out.users.namespace()) {
        // A file system of the tree's own user namespace, in which we are nobody.
        (Err(e), Some(users)) if matches!(e.errno(), Some(libc::EOVERFLOW | libc::EPERM)) => {
            users.acting(link)
        }
        (done, _) => done,
    }
}

/// The folder of an absolute path, empty for the root.
fn parent(path: &[u8]) -> &[u8] {
    &path[..path.iter().rposition(|c| *c == b'/').unwrap_or(0)]
}
