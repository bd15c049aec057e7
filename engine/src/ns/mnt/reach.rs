//! Getting at what is on one mount of the tree and nothing else, while it is dumped.
//!
//! Other mounts may stand on a mount and hide parts of it, or be over it and hide all. A detached clone of the one
//! mount shows it whole; where there is none (old kernels, mounts that are unbindable or hidden), what is in the way
//! is unmounted in a copy of the namespace, which goes with the thread that made it. In a copy that another user
//! namespace than the first one's makes, the kernel locks all mounts together: there a child of ours makes it as a
//! member of that, which a thread of ours cannot become.

use std::{
    ffi::OsStr,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
};

use nix::{
    fcntl::{OFlag, openat},
    mount::{MntFlags, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::stat::{Mode, fstat},
};

use super::{
    flags,
    mount::{Mount, device},
    paths::below,
    tree::Tree,
    walk,
};
use crate::{
    error::{Error, Result, SysContext},
    ns::enter,
    process::{self, Forked},
    procfs::ProcDir,
    pstree::RealPid,
    restore::passing::Channel,
    sys::mount::{self as calls, Mounting},
};

/// The only kind of message of a child.
const FOUND: u8 = 0;

/// The root folder of the mount at `at`, open for reading, without anything mounted on it. `own_users` says that the
/// namespace belongs to a user namespace of its own.
///
/// # Errors
/// A mount that cannot be reached: hidden by mounts that the kernel has locked there.
pub(super) fn folder(tree: &Tree, at: usize, pid: RealPid, own_users: bool) -> Result<OwnedFd> {
    let hidden = tree.is_hidden(at)?;
    let mount = tree.at(at)?;
    let bare = !hidden && tree.children(at).next().is_none();
    let fd = enter::inside(pid, CloneFlags::CLONE_NEWNS, || {
        if bare {
            return readable(&find(mount)?).map(Some);
        }
        if !hidden && mount.flags & flags::UNBINDABLE == 0 {
            match calls::clone_of(find(mount)?.as_fd()) {
                Ok(clone) => return readable(&clone).map(Some),
                Err(e) if !matches!(e.errno(), Some(libc::ENOSYS | libc::EINVAL)) => return Err(e),
                Err(_) => {}
            }
        }
        if own_users { Ok(None) } else { cleared(tree, at).map(Some) }
    })?;
    let fd = match fd {
        Some(fd) => fd,
        None => cleared_as_member(tree, at, pid)?,
    };
    let stat = fstat(&fd).call("fstat")?;
    match device(libc::major(stat.st_dev), libc::minor(stat.st_dev)) == mount.dev {
        true => Ok(fd),
        false => Err(Error::host("another file system was found in its place")),
    }
}

/// The folder or file that a mount is on, in the namespace we are in.
pub(super) fn find(mount: &Mount) -> Result<OwnedFd> {
    let root = walk::open_folder(b"/")?;
    walk::to(root.as_fd(), mount.point.strip_prefix(b"/").unwrap_or(&mount.point))
}

fn readable(folder: &OwnedFd) -> Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    openat(folder, ".", flags, Mode::empty()).call("openat")
}

/// As [`folder`], by unmounting in a copy of the namespace.
fn cleared(tree: &Tree, at: usize) -> Result<OwnedFd> {
    unshare(CloneFlags::CLONE_NEWNS).call("unshare(CLONE_NEWNS)")?;
    let private = Mounting { target: b"/", flags: flags::REC | flags::PRIVATE, ..Mounting::default() };
    calls::mount(private)?;
    for point in in_the_way(tree, at)? {
        umount2(OsStr::from_bytes(&point), MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
            .call("umount2")?;
    }
    readable(&find(tree.at(at)?)?)
}

/// The same, by a child in the user namespace of task `pid`.
fn cleared_as_member(tree: &Tree, at: usize, pid: RealPid) -> Result<OwnedFd> {
    let dir = ProcDir::open(pid)?;
    let users = dir.file("ns/user", OFlag::O_RDONLY)?;
    let mounts = dir.file("ns/mnt", OFlag::O_RDONLY)?;
    let (ours, theirs) = Channel::pair()?;
    let child = match process::fork()? {
        Forked::Parent(child) => child,
        Forked::Child => {
            let clear = || {
                setns(&users, CloneFlags::CLONE_NEWUSER).call("setns(CLONE_NEWUSER)")?;
                setns(&mounts, CloneFlags::CLONE_NEWNS).call("setns(CLONE_NEWNS)")?;
                cleared(tree, at)
            };
            // The folder stays when this namespace has gone.
            let _ = match clear() {
                Ok(folder) => theirs.send(FOUND, 0, Some(folder.as_fd())),
                Err(e) => theirs.send(FOUND, e.errno().unwrap_or(libc::EIO).cast_unsigned(), None),
            };
            process::leave(0)
        }
    };
    drop(theirs);
    let found = ours.receive();
    process::end(child);
    match found? {
        Some((FOUND, 0, Some(folder))) => Ok(folder),
        Some((FOUND, errno, _)) => {
            Err(Error::sys("clearing the way to it", errno.cast_signed()).remedy("unmount what is over it"))
        }
        _ => Err(Error::host("the process that clears the way to it was ended")),
    }
}

/// Where to unmount, in order, until the mount at `at` is bare; a place that has several above one another is named
/// as often.
fn in_the_way(tree: &Tree, at: usize) -> Result<Vec<Vec<u8>>> {
    let mut above = vec![at];
    while let Some(parent) = above.last().and_then(|at| tree.parents.get(*at).copied().flatten()) {
        above.push(parent);
    }
    let mut points = Vec::new();
    let mut pile = |mut over: usize| -> Result<()> {
        loop {
            let point = &tree.at(over)?.point;
            points.push(point.clone());
            match tree.children(over).find(|(_, child)| child.point == *point) {
                Some((child, _)) => over = child,
                None => return Ok(()),
            }
        }
    };
    // From the root downwards: those that hide the next one, the shortest path first.
    for pair in above.windows(2).rev() {
        let [next, parent] = *pair else { continue };
        let point = &tree.at(next)?.point;
        let mut over: Vec<(usize, &Mount)> = tree
            .children(parent)
            .filter(|(sibling, m)| *sibling != next && below(point, &m.point).is_some())
            .collect();
        over.sort_by_key(|(_, m)| m.point.len());
        for (sibling, _) in over {
            pile(sibling)?;
        }
    }
    let mut on: Vec<(usize, &Mount)> = tree.children(at).collect();
    on.sort_by_key(|(_, m)| m.point.len());
    for (child, _) in on {
        pile(child)?;
    }
    Ok(points)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{mount, tree};
    use super::*;

    #[test]
    fn what_hides_a_mount_is_found_from_the_root_downwards() {
        let tree = tree(vec![
            mount(1, 0, "/"),
            mount(2, 1, "/a/b"),
            mount(3, 2, "/a/b/c"),
            mount(4, 1, "/a"),
            mount(5, 4, "/a"),
            mount(6, 2, "/a/b"),
        ])
        .unwrap();
        let hidden: Vec<bool> = (0..6).map(|at| tree.is_hidden(at).unwrap()).collect();
        assert_eq!(hidden, [false, true, true, true, false, true]);
        let text = |at| {
            let points = in_the_way(&tree, at).unwrap();
            points.iter().map(|p| String::from_utf8_lossy(p).into_owned()).collect::<Vec<_>>()
        };
        assert_eq!(text(1), ["/a", "/a", "/a/b", "/a/b/c"]);
        assert_eq!(text(2), ["/a", "/a", "/a/b"]);
        assert_eq!(text(3), ["/a"]);
        assert!(text(4).is_empty());
        assert!(tree.path(3, b"/a/b/c/x").is_err());
        assert_eq!(tree.path(5, b"a/x").unwrap(), b"/a/x");
        assert!(tree.path(1, b"/a/x").is_err() && tree.path(9, b"/x").is_err());
        assert_eq!(tree.path(1, b"/x").unwrap(), b"/x");
    }
}
