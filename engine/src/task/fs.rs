//! Working directory, root and umask.

use nix::fcntl::OFlag;
use rcriu_images::{ImageDir, ImageKind, pb};

use crate::{
    error::{Context, Result},
    procfs::ProcDir,
    pstree::{FileId, VirtPid},
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
