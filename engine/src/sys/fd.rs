//! Descriptors known by number only: inherited ones, and those that move between numbers.
//!
//! # Safety
//! Plain calls on numbers. A wrong number gives EBADF, never a dangling owner: ownership is only made here for
//! numbers the kernel just confirmed or just returned.
#![allow(unsafe_code)]

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use crate::error::{Error, Result};

fn last(call: &'static str, fd: RawFd) -> Error {
    Error::io(call, &std::io::Error::last_os_error()).during(format!("descriptor {fd}"))
}

/// A close-on-exec duplicate of `fd`, which stays as it is.
pub(crate) fn duplicate(fd: RawFd) -> Result<OwnedFd> {
    // SAFETY: no pointers.
    let new = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if new < 0 {
        return Err(last("fcntl(F_DUPFD_CLOEXEC)", fd));
    }
    // SAFETY: the kernel just gave us this number.
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}
