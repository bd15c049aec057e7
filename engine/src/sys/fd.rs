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

/// Ownership of `fd`, which must be open and nobody else's.
pub(crate) fn take(fd: RawFd) -> Result<OwnedFd> {
    set_cloexec(fd, true)?;
    // SAFETY: the kernel just confirmed that it is open; the caller promises that nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether `fd` is open.
pub(crate) fn is_open(fd: RawFd) -> bool {
    // SAFETY: no pointers.
    unsafe { libc::fcntl(fd, libc::F_GETFD) >= 0 }
}

/// Sets or clears close-on-exec; tells whether that changed anything.
pub(crate) fn set_cloexec(fd: RawFd, on: bool) -> Result<bool> {
    // SAFETY: no pointers.
    let old = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    if old < 0 {
        return Err(last("fcntl(F_GETFD)", fd));
    }
    let new = if on { old | libc::FD_CLOEXEC } else { old & !libc::FD_CLOEXEC };
    // SAFETY: no pointers.
    if new != old && unsafe { libc::fcntl(fd, libc::F_SETFD, new) } < 0 {
        return Err(last("fcntl(F_SETFD)", fd));
    }
    Ok(new != old)
}

/// Writes all of `bytes`, retrying after signals; false if the kernel refused.
///
/// For the log: it must work in every state of the process and has nobody to report to.
pub(crate) fn write_all(fd: RawFd, mut bytes: &[u8]) -> bool {
    while !bytes.is_empty() {
        // SAFETY: the slice is valid for its length; a wrong fd gives EBADF.
        let n = unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) };
        match usize::try_from(n) {
            Ok(0) => return false,
            Ok(n) => bytes = &bytes[n.min(bytes.len())..],
            Err(_) if std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return false,
        }
    }
    true
}
