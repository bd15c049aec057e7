//! Whose a socket is: rules of packet filters go by its user, and only sockets of one user share a port
//! (SO_REUSEPORT). CRIU loses it: all become root's.

use std::os::fd::{AsFd, BorrowedFd};

use nix::{
    sys::stat::{FileStat, fstat},
    unistd::{Gid, Uid, fchown},
};
use rcriu_images::pb;

use crate::{
    error::{Result, SysContext},
    files::FilesOut,
};

/// For the images: none of root's.
pub(super) fn dump(stat: &FileStat, out: &FilesOut<'_>) -> Option<pb::RcriuOwner> {
    let owner = pb::RcriuOwner { uid: out.users.user(stat.st_uid), gid: out.users.group(stat.st_gid) };
    (owner != pb::RcriuOwner::default()).then_some(owner)
}

/// Gives a socket to its owner, before it is bound. One who cannot have it is warned of.
pub(super) fn restore(fd: BorrowedFd<'_>, who: &str, owner: Option<&pb::RcriuOwner>) -> Result<()> {
    let Some(owner) = owner else { return Ok(()) };
    let now = fstat(fd).call("fstat")?;
    if (now.st_uid, now.st_gid) == (owner.uid, owner.gid) {
        return Ok(());
    }
    let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
    if let Err(e) = fchown(fd.as_fd(), Some(uid), Some(gid)) {
        log::warn!("{who} is not given to user {uid} and group {gid}: {e}");
    }
    Ok(())
}
