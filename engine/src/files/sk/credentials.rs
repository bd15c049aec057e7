//! Who has sent a message, where the receiver wants to know (`SO_PASSCRED`): services tell each other by that.
//!
//! Numbers are those in the namespaces of the tree. The kernel takes only processes that are there: a sender who has
//! ended, or was none of the tree, is replaced by the task that sends the message again; user and group stay.

use nix::{
    sys::{signal::kill, socket::UnixCredentials},
    unistd::Pid,
};
use rcriu_images::pb;

use crate::files::FilesOut;

/// For the images.
pub(super) fn dump(sender: UnixCredentials, out: &FilesOut<'_>) -> pb::RcriuCredentials {
    pb::RcriuCredentials {
        pid: out.numbering.virt(sender.pid()).cast_unsigned(),
        uid: out.users.user(sender.uid()),
        gid: out.users.group(sender.gid()),
    }
}

/// To be sent by the calling task; `None` for whom no namespace has.
pub(super) fn of(sender: &pb::RcriuCredentials) -> Option<UnixCredentials> {
    if sender.uid == u32::MAX || sender.gid == u32::MAX {
        log::warn!("A message from somebody outside of the tree's user namespace is sent as from root");
        return None;
    }
    let pid = sender.pid.cast_signed();
    let is_there = pid > 0 && kill(Pid::from_raw(pid), None) != Err(nix::errno::Errno::ESRCH);
    if !is_there {
        log::warn!("A message of process {pid}, which is gone, is sent as from another");
    }
    let pid = if is_there { pid } else { std::process::id().cast_signed() };
    Some(UnixCredentials::from(nix::libc::ucred { pid, uid: sender.uid, gid: sender.gid }))
}
