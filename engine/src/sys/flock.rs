//! Locks and leases of files: flock(2), fcntl(2).
//!
//! # Safety
//! `struct flock` is a local of the kernel's layout; everything else is numbers.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

use restorer::args::Late;

use crate::{
    error::{Error, Result},
    sys::errno,
};

/// Locks the open file as a whole; `kind` is `F_RDLCK`, `F_WRLCK`, `F_UNLCK`. Does not wait.
///
/// # Errors
/// EWOULDBLOCK if somebody else has a lock that does not go with it.
pub(crate) fn flock(file: BorrowedFd<'_>, kind: i32) -> Result<()> {
    let how = match kind {
        libc::F_RDLCK => libc::LOCK_SH,
        libc::F_WRLCK => libc::LOCK_EX,
        libc::F_UNLCK => libc::LOCK_UN,
        _ => return Err(Error::sys("flock", libc::EINVAL)),
    };
    // SAFETY: numbers only.
    let ret = unsafe { libc::flock(file.as_raw_fd(), how | libc::LOCK_NB) };
    errno::check(ret.into(), "flock").map(drop)
}

fn range(kind: i32, start: i64, len: i64) -> libc::flock {
    // SAFETY: all zeros is a valid struct flock.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    (range.l_type, range.l_whence) = (kind as i16, libc::SEEK_SET as i16);
    (range.l_start, range.l_len) = (start, len);
    range
}

/// Locks a range for the open file (`F_OFD_SETLK`, Linux 3.15). Does not wait.
pub(crate) fn set(file: BorrowedFd<'_>, kind: i32, start: i64, len: i64) -> Result<()> {
    let range = range(kind, start, len);
    // SAFETY: the range is a local.
    let ret = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const range) };
    errno::check(ret.into(), "fcntl(F_OFD_SETLK)").map(drop)
}

/// Locks a range for this process's descriptor table (`F_SETLK`). Does not wait.
#[cfg(test)]
pub(crate) fn posix(file: BorrowedFd<'_>, kind: i32, start: i64, len: i64) -> Result<()> {
    late(&posix_later(file.as_raw_fd(), kind, start, len))
}

/// The call that locks a range for the descriptor table of the task that makes it.
pub(crate) fn posix_later(fd: i32, kind: i32, start: i64, len: i64) -> Late {
    // struct flock: type and whence are 16 bit each, then 32 bit of padding.
    let head = u64::from(kind as u16) | (libc::SEEK_SET as u64) << 16;
    Late {
        call: libc::SYS_fcntl as u32,
        fd: fd.cast_unsigned(),
        arg: libc::F_SETLK as u64,
        data: [head, start.cast_unsigned(), len.cast_unsigned(), 0],
    }
}

/// What lease the open file has, or what it is to become if it is being broken: `F_RDLCK`, `F_WRLCK`, `F_UNLCK`.
pub(crate) fn lease(file: BorrowedFd<'_>) -> Result<i32> {
    // SAFETY: numbers only.
    let ret = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLEASE) };
    errno::check(ret.into(), "fcntl(F_GETLEASE)").map(|kind| kind as i32)
}

/// Takes a lease. Needs CAP_LEASE on files of others.
///
/// # Errors
/// EAGAIN if the file is open in a way the lease forbids.
pub(crate) fn set_lease(file: BorrowedFd<'_>, kind: i32) -> Result<()> {
    // SAFETY: numbers only.
    let ret = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) };
    errno::check(ret.into(), "fcntl(F_SETLEASE)").map(drop)
}

/// Makes a late call here and now, as the restorer would.
#[cfg(test)]
pub(crate) fn late(late: &Late) -> Result<()> {
    // SAFETY: the structure is as large as any of these calls needs, and a local of the caller's.
    let ret = unsafe { libc::syscall(late.call.into(), late.fd, late.arg, late.data.as_ptr(), 0) };
    errno::check(ret, "late call").map(drop)
}
