//! Whom a namespace belongs to: ioctl_ns(2), and the way by trying for kernels before 4.9.
//!
//! # Safety
//! The ioctl takes no argument and returns a new descriptor; a forked child makes raw calls only, since this process
//! may have other threads.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::{
    errno::Errno,
    sys::wait::{WaitStatus, waitpid},
    unistd::Pid,
};

use crate::{
    error::{Error, Result, SysContext},
    sys::errno,
};

/// `_IO(0xb7, 1)`.
const NS_GET_USERNS: libc::Ioctl = 0xb701;

/// The user namespace that owns `namespace`; `None` where the kernel does not tell (before Linux 4.9).
///
/// # Errors
/// EPERM if it is none of ours or below.
pub fn owner(namespace: impl AsFd) -> Result<Option<OwnedFd>> {
    // SAFETY: no argument.
    let ret = unsafe { libc::ioctl(namespace.as_fd().as_raw_fd(), NS_GET_USERNS) };
    if ret >= 0 {
        // SAFETY: the kernel has just made it for us.
        return Ok(Some(unsafe { OwnedFd::from_raw_fd(ret) }));
    }
    match errno::last() {
        libc::ENOTTY => Ok(None),
        e => Err(Error::sys("ioctl(NS_GET_USERNS)", e)),
    }
}

/// The first of `others` that the root of user namespace `user` may not enter: one that belongs to another.
///
/// # Errors
/// EPERM if this process may not enter the user namespace.
pub fn stranger(user: BorrowedFd<'_>, others: &[BorrowedFd<'_>]) -> Result<Option<usize>> {
    // Exit codes have 8 bits; there are less than ten kinds.
    const NO_USER: i32 = 255;
    // SAFETY: the child makes raw calls only.
    let pid = errno::check(unsafe { libc::fork() }.into(), "fork")?;
    if pid == 0 {
        // SAFETY: descriptors are numbers here; the child ends without running anything of this process.
        unsafe {
            if libc::setns(user.as_raw_fd(), libc::CLONE_NEWUSER) != 0 {
                libc::_exit(NO_USER);
            }
            for (number, other) in others.iter().enumerate() {
                if libc::setns(other.as_raw_fd(), 0) != 0 {
                    libc::_exit(number as i32 + 1);
                }
            }
            libc::_exit(0);
        }
    }
    let status = loop {
        match waitpid(Pid::from_raw(pid as i32), None) {
            Err(Errno::EINTR) => {}
            other => break other.call("waitpid")?,
        }
    };
    match status {
        WaitStatus::Exited(_, 0) => Ok(None),
        WaitStatus::Exited(_, NO_USER) => Err(Error::sys("setns(CLONE_NEWUSER)", libc::EPERM)),
        WaitStatus::Exited(_, code) => Ok(Some(code as usize - 1)),
        other => Err(Error::host(format!("a process entering namespaces ended by {other:?}"))),
    }
}
