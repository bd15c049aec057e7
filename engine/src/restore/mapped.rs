//! Images of root, read by root of a user namespace.
//!
//! Tasks open images when they are in the tree's user namespace already, where root has no right to what belongs to root
//! outside. They get the folder by a mount of its own, which shows what is root's as theirs (Linux 5.12, and a file system
//! that can do so). LXD gives the images to the namespace's root before a restore: then there is nothing to be done.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::{
    fcntl::{OFlag, openat},
    sys::stat::{Mode, fstat},
    unistd::{chdir, geteuid},
};
use rcriu_images::ImageDir;

use crate::{
    error::{Result, SysContext},
    procfs::ProcDir,
    pstree::RealPid,
    sys::{fd, mount},
};

/// The folder as tasks in the user namespace of `root` can use it; `None` if they cannot, or need not.
pub(super) fn for_users_of(root: RealPid, images: &ImageDir) -> Option<OwnedFd> {
    let ours = fstat(images).is_ok_and(|stat| stat.st_uid == geteuid().as_raw());
    // Parent images are found from the folder upwards, which a mount of its own has no way to.
    let alone = matches!(images.parent_target(), Ok(None));
    if !ours || !alone {
        return None;
    }
    match make(root, images) {
        Ok(folder) => Some(folder),
        Err(e) => {
            log::debug!("Images are read as they are: {e}");
            None
        }
    }
}

fn make(root: RealPid, images: &ImageDir) -> Result<OwnedFd> {
    let users = ProcDir::open(root)?.file("ns/user", OFlag::O_RDONLY)?;
    let tree = mount::clone_of(images.as_fd())?;
    mount::map_users(tree.as_fd(), users.as_fd())?;
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    openat(&tree, ".", flags, Mode::empty()).call("openat")
}

/// In the root task: uses `folder` from now on. The working folder, mostly the same one, is out of reach too; the
/// program's own comes in the end.
pub(super) fn take(folder: &OwnedFd, images: &ImageDir) -> Result<()> {
    chdir("/").call("chdir")?;
    fd::place(folder.as_fd(), images.as_fd().as_raw_fd(), true)
}
