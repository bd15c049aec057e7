//! fanotify(7): groups and marks.
//!
//! # Safety
//! Targets are named by descriptor; a descriptor the kernel returns is new and ours.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use crate::{
    error::{Result, SysContext},
    sys::errno,
};

/// Groups that say whether others may go on: `FAN_CLASS_CONTENT` and `FAN_CLASS_PRE_CONTENT`.
pub(crate) const DECIDES: u32 = libc::FAN_CLASS_CONTENT | libc::FAN_CLASS_PRE_CONTENT;
/// `FAN_MARK_IGNORE` (Linux 6.0).
pub(crate) const IGNORE: u32 = 0x400;
/// Flags that are about ignored events.
pub(crate) const IGNORES: u32 = libc::FAN_MARK_IGNORED_SURV_MODIFY | IGNORE;

/// A group, close-on-exec; `flags` and `event_flags` as fdinfo shows them.
pub(crate) fn init(flags: u32, event_flags: u32) -> Result<OwnedFd> {
    // SAFETY: numbers only.
    let ret = unsafe { libc::fanotify_init(flags, event_flags) };
    let fd = errno::check(ret.into(), "fanotify_init")?;
    // SAFETY: a new descriptor of ours.
    let made = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    // Not by a flag of the group, which would keep it for all to see.
    fcntl(&made, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).call("fcntl(F_SETFD)")?;
    Ok(made)
}

/// Adds a mark on what `target` (perhaps opened with O_PATH) refers to.
pub(crate) fn add(group: BorrowedFd<'_>, target: impl AsFd, flags: u32, mask: u32) -> Result<()> {
    let path = std::ffi::CString::new(format!("/proc/self/fd/{}", target.as_fd().as_raw_fd()));
    let path = path.unwrap_or_default();
    let flags = flags | libc::FAN_MARK_ADD;
    // SAFETY: the path ends with a zero and outlives the call.
    let ret =
        unsafe { libc::fanotify_mark(group.as_raw_fd(), flags, mask.into(), libc::AT_FDCWD, path.as_ptr()) };
    errno::check(ret.into(), "fanotify_mark").map(drop)
}
