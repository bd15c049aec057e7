//! Everything that can be known to fail before anything is created.

use nix::errno::Errno;
use nix::unistd::Pid;

use crate::pstree::VirtPid;

/// Whether nobody on this host has this number as a pid or tid.
pub fn is_free(pid: VirtPid) -> bool {
    nix::sys::signal::kill(Pid::from_raw(pid.0), None) == Err(Errno::ESRCH)
}
