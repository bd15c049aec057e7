//! Working directory, root and umask.

use std::os::fd::{AsFd, OwnedFd};

use nix::{
    fcntl::OFlag,
    sys::stat::{Mode, fstat, umask},
    unistd::{chroot, fchdir},
};
use rcriu_images::{ImageDir, ImageKind, pb};

use crate::{
    error::{Context, Error, Result, SysContext},
    files::{FilesTask, OpenHow},
    procfs::ProcDir,
    pstree::{FileId, VirtPid},
    restore::TaskCx,
};

/// Writes `fs-PID.img`. `file` gives ids to the folders, which are opened with O_PATH.
pub fn dump(
    images: &ImageDir,
    pid: VirtPid,
    dir: &ProcDir,
    umask: u32,
    mut file: impl FnMut(std::os::fd::OwnedFd) -> Result<FileId>,
) -> Result<()> {
    let mut id = |name: &str| {
        let fd = dir.file(name, OFlag::O_PATH)?;
        file(fd).during(|| name.to_owned())
    };
    let entry = pb::FsEntry { cwd_id: id("cwd")?.0, root_id: id("root")?.0, umask: Some(umask) };
    let mut out = images.writer(ImageKind::Fs, pid.0.cast_unsigned().into());
    out.write(&entry)?;
    Ok(out.finish()?)
}

/// A task's folders, open and not yet entered: everything else is found by paths of the old root.
#[derive(Debug)]
pub struct Folders {
    root: OwnedFd,
    cwd: OwnedFd,
    umask: Option<u32>,
}

/// Opens both folders.
///
/// # Errors
/// A folder that is gone, or is none.
pub fn open(cx: &TaskCx<'_>, files: &mut FilesTask<'_>) -> Result<Folders> {
    let entry = cx.image()?.fs.ok_or_else(|| Error::bug("a living task without fs"))?;
    let how = OpenHow { flags: libc::O_PATH | libc::O_DIRECTORY };
    let mut folder = |id, what: &str| files.open_path(FileId(id), how).during(|| what.to_owned());
    Ok(Folders {
        cwd: folder(entry.cwd_id, "working folder")?,
        root: folder(entry.root_id, "root folder")?,
        umask: entry.umask,
    })
}

impl Folders {
    /// Enters them. From now on paths mean what they mean to the task.
    pub fn enter(self) -> Result<()> {
        let ours = nix::sys::stat::stat("/").call("stat(/)")?;
        let root = fstat(self.root.as_fd()).call("fstat(root folder)")?;
        if (ours.st_dev, ours.st_ino) != (root.st_dev, root.st_ino) {
            fchdir(self.root.as_fd()).call("fchdir(root folder)")?;
            chroot(".").call("chroot")?;
        }
        fchdir(self.cwd.as_fd()).call("fchdir(working folder)")?;
        if let Some(mask) = self.umask {
            umask(Mode::from_bits_truncate(mask & 0o777));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pstree::RealPid;

    #[test]
    fn folders_get_their_ids_in_order() {
        let tmp = tempfile::tempdir().unwrap();
        let images = ImageDir::open(tmp.path()).unwrap();
        let me = ProcDir::open(RealPid(std::process::id() as i32)).unwrap();
        let mut next = 4;
        dump(&images, VirtPid(9), &me, 0o27, |fd| {
            assert_eq!(nix::sys::stat::fstat(&fd).unwrap().st_mode & libc::S_IFMT, libc::S_IFDIR);
            next += 1;
            Ok(FileId(next))
        })
        .unwrap();
        let entry: pb::FsEntry = images.read_one(ImageKind::Fs, 9).unwrap();
        assert_eq!((entry.cwd_id, entry.root_id, entry.umask), (5, 6, Some(0o27)));
    }
}
