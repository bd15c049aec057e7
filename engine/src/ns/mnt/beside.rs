//! File systems that show another namespace than that of mounts: sysfs the devices of a network namespace, mqueue the
//! queues of an ipc namespace. Each shows the one that its first mount was made in.
//!
//! Images have no room for which that was. It is taken to be that of the first task in the mount namespace in which the
//! file system is first met, as it is of containers inside of the container; a dump warns where it was another.

use std::os::fd::{AsFd, BorrowedFd};

use nix::{
    sched::{CloneFlags, setns},
    sys::stat::fstat,
};

use super::{
    mount::{Mount, device},
    tree::{Source, Tree},
};
use crate::{
    error::{Result, SysContext},
    ns::enter,
    pstree::RealPid,
    sys::fsmount,
};

/// File systems, with the kind of namespace that they show.
const SHOWN: [(&str, CloneFlags); 2] =
    [("sysfs", CloneFlags::CLONE_NEWNET), ("mqueue", CloneFlags::CLONE_NEWIPC)];

/// The kind of namespace that a file system shows.
fn shows(mount: &Mount) -> Option<(&'static str, CloneFlags)> {
    let name = mount.kind?.name;
    SHOWN.into_iter().find(|(shown, _)| *shown == name)
}

/// Warns if the mount at a position of `tree`, in whose mount namespace `task` is the first, would show another namespace
/// after a restore.
pub(super) fn check(tree: &Tree, at: usize, task: RealPid) -> Result<()> {
    let mount = tree.at(at)?;
    let new = tree.sources.get(at) == Some(&Source::New) && mount.outside.is_none();
    let Some((name, kind)) = shows(mount).filter(|_| new) else { return Ok(()) };
    let of_task = enter::inside(task, kind, || {
        let stat = fstat(&fsmount::detached(name, &[])?).call("fstat")?;
        Ok(device(libc::major(stat.st_dev), libc::minor(stat.st_dev)))
    });
    match of_task {
        Ok(dev) if dev == mount.dev => Ok(()),
        Ok(_) => {
            log::warn!(
                "{} shows a namespace that task {task} is not in: after a restore it shows that of the task",
                mount.name()
            );
            Ok(())
        }
        // Before Linux 5.2, and for who may not: nobody can tell.
        Err(e) if matches!(e.errno(), Some(libc::ENOSYS | libc::EPERM)) => Ok(()),
        Err(e) => Err(e),
    }
}

/// By position of a mount namespace: the network and ipc namespace of the first task in it, of kinds of which there are
/// several.
#[derive(Debug, Default)]
pub struct Beside<'a>(pub Vec<[Option<BorrowedFd<'a>>; 2]>);

impl Beside<'_> {
    /// Enters what a mount in a mount namespace is to show.
    ///
    /// World: the builder, which ends.
    pub(super) fn enter(&self, space: usize, mount: &Mount) -> Result<()> {
        let Some((name, kind)) = shows(mount) else { return Ok(()) };
        let at = SHOWN.iter().position(|(shown, _)| *shown == name).unwrap_or_default();
        match self.0.get(space).and_then(|namespaces| namespaces.get(at).copied().flatten()) {
            Some(namespace) => setns(namespace.as_fd(), kind).call("setns"),
            None => Ok(()),
        }
    }
}
