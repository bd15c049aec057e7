//! inotify(7) on descriptors that come from anywhere; nix only works on its own.
//!
//! # Safety
//! Paths passed are locals that end in NUL; a descriptor the kernel returns is new and ours.
#![allow(unsafe_code)]

use std::{
    ffi::CStr,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use crate::{error::Result, sys::errno};

/// Not blocking, close-on-exec.
pub(crate) fn init() -> Result<OwnedFd> {
    // SAFETY: numbers only.
    let ret = unsafe { libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK) };
    let fd = errno::check(ret.into(), "inotify_init1")?;
    // SAFETY: a new descriptor of ours.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Watches what `path` leads to; gives the number of the watch.
pub(crate) fn add(inotify: BorrowedFd<'_>, path: &CStr, mask: u32) -> Result<i32> {
    // SAFETY: the path ends in NUL and outlives the call.
    let ret = unsafe { libc::inotify_add_watch(inotify.as_raw_fd(), path.as_ptr(), mask) };
    errno::check(ret.into(), "inotify_add_watch").map(|wd| wd as i32)
}

/// Ends a watch, which leaves an event.
pub(crate) fn remove(inotify: BorrowedFd<'_>, wd: i32) -> Result<()> {
    // SAFETY: numbers only.
    let ret = unsafe { libc::inotify_rm_watch(inotify.as_raw_fd(), wd) };
    errno::check(ret.into(), "inotify_rm_watch").map(drop)
}

/// The next watch gets number `wd` (Linux 4.18, CONFIG_CHECKPOINT_RESTORE).
///
/// # Errors
/// ENOTTY on other kernels.
pub(crate) fn set_next(inotify: BorrowedFd<'_>, wd: i32) -> Result<()> {
    const INOTIFY_IOC_SETNEXTWD: libc::Ioctl = 0x4004_4900;
    // SAFETY: the argument is a number.
    let ret = unsafe { libc::ioctl(inotify.as_raw_fd(), INOTIFY_IOC_SETNEXTWD, wd) };
    errno::check(ret.into(), "ioctl(INOTIFY_IOC_SETNEXTWD)").map(drop)
}
