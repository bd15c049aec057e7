//! Descriptors known by number only: inherited ones, and those that move between numbers.
//!
//! # Safety
//! Plain calls on numbers. A wrong number gives EBADF, never a dangling owner: ownership is only made here for
//! numbers the kernel just confirmed or just returned.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

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

/// Whether `fd` is closed on exec.
pub(crate) fn cloexec(fd: RawFd) -> Result<bool> {
    // SAFETY: no pointers.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    if flags < 0 { Err(last("fcntl(F_GETFD)", fd)) } else { Ok(flags & libc::FD_CLOEXEC != 0) }
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

/// Descriptor `fd` of this process, which stays open for as long as the result is used.
///
/// For descriptors that have been put where images want them: they belong to the table, not to a value.
pub(crate) fn borrow(fd: RawFd) -> Result<BorrowedFd<'static>> {
    if !is_open(fd) {
        return Err(Error::sys("fcntl(F_GETFD)", libc::EBADF).during(format!("descriptor {fd}")));
    }
    // SAFETY: not -1, as it is open; a number closed meanwhile gives EBADF.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
}

/// Makes number `to` refer to the open file of `fd`, whatever it was before.
///
/// # Errors
/// EBADF when `to` is beyond RLIMIT_NOFILE.
pub(crate) fn place(fd: BorrowedFd<'_>, to: RawFd, cloexec: bool) -> Result<()> {
    if fd.as_raw_fd() == to {
        return set_cloexec(to, cloexec).map(drop);
    }
    // SAFETY: no pointers. What `to` was before is closed: nobody owns the numbers that images claim.
    if unsafe { libc::dup3(fd.as_raw_fd(), to, if cloexec { libc::O_CLOEXEC } else { 0 }) } < 0 {
        return Err(last("dup3", to));
    }
    Ok(())
}

/// A close-on-exec duplicate with the lowest free number from `min` on; nobody owns it.
pub(crate) fn duplicate_above(fd: BorrowedFd<'_>, min: RawFd) -> Result<RawFd> {
    // SAFETY: no pointers.
    let new = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, min) };
    if new < 0 { Err(last("fcntl(F_DUPFD_CLOEXEC)", fd.as_raw_fd())) } else { Ok(new) }
}

/// Closes number `fd`, which no value owns. EBADF is no error: the aim is reached.
pub(crate) fn close(fd: RawFd) -> Result<()> {
    // SAFETY: no pointers; the caller says that no value owns the number.
    if unsafe { libc::close(fd) } < 0 && nix::errno::Errno::last_raw() == libc::EIO {
        return Err(last("close", fd));
    }
    Ok(())
}

/// Owner of an open file for signals: `F_GETOWN_EX`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub(crate) struct Owner {
    /// `F_OWNER_TID`, `F_OWNER_PID`, `F_OWNER_PGRP`.
    pub(crate) kind: i32,
    /// 0 for none.
    pub(crate) pid: i32,
}

const F_SETOWN_EX: i32 = 15;
const F_GETOWN_EX: i32 = 16;
const F_GETOWNER_UIDS: i32 = 17;
const F_SETSIG: i32 = 10;
const F_GETSIG: i32 = 11;

/// Who gets the signals of the open file; numbers of our own pid namespace.
pub(crate) fn owner(fd: BorrowedFd<'_>) -> Result<Owner> {
    let mut owner = Owner::default();
    // SAFETY: struct f_owner_ex is two ints, and a local.
    let r = unsafe { libc::fcntl(fd.as_raw_fd(), F_GETOWN_EX, &raw mut owner) };
    if r < 0 { Err(last("fcntl(F_GETOWN_EX)", fd.as_raw_fd())) } else { Ok(owner) }
}

/// Sets who gets the signals of the open file.
///
/// # Errors
/// ESRCH if there is no such task.
pub(crate) fn set_owner(fd: BorrowedFd<'_>, owner: Owner) -> Result<()> {
    // SAFETY: struct f_owner_ex is two ints, and a local.
    let r = unsafe { libc::fcntl(fd.as_raw_fd(), F_SETOWN_EX, &raw const owner) };
    if r < 0 { Err(last("fcntl(F_SETOWN_EX)", fd.as_raw_fd())) } else { Ok(()) }
}

/// Real and effective user under whose rights those signals are sent (Linux 3.6, CONFIG_CHECKPOINT_RESTORE).
pub(crate) fn owner_uids(fd: BorrowedFd<'_>) -> Result<[u32; 2]> {
    let mut uids = [0u32; 2];
    // SAFETY: the kernel writes two uid_t, and they are a local.
    let r = unsafe { libc::fcntl(fd.as_raw_fd(), F_GETOWNER_UIDS, uids.as_mut_ptr()) };
    if r < 0 { Err(last("fcntl(F_GETOWNER_UIDS)", fd.as_raw_fd())) } else { Ok(uids) }
}

/// Signal sent instead of SIGIO, 0 for SIGIO itself.
pub(crate) fn signal(fd: BorrowedFd<'_>) -> Result<i32> {
    // SAFETY: no pointers.
    let r = unsafe { libc::fcntl(fd.as_raw_fd(), F_GETSIG) };
    if r < 0 { Err(last("fcntl(F_GETSIG)", fd.as_raw_fd())) } else { Ok(r) }
}

/// Sets the signal sent instead of SIGIO.
pub(crate) fn set_signal(fd: BorrowedFd<'_>, signal: i32) -> Result<()> {
    // SAFETY: no pointers.
    let r = unsafe { libc::fcntl(fd.as_raw_fd(), F_SETSIG, signal) };
    if r < 0 { Err(last("fcntl(F_SETSIG)", fd.as_raw_fd())) } else { Ok(()) }
}

/// Status flags of the open file (`F_GETFL`).
pub(crate) fn status_flags(fd: BorrowedFd<'_>) -> Result<i32> {
    // SAFETY: no pointers.
    let r = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    if r < 0 { Err(last("fcntl(F_GETFL)", fd.as_raw_fd())) } else { Ok(r) }
}

/// Sets those status flags of the open file that can be set (`F_SETFL`).
pub(crate) fn set_status_flags(fd: BorrowedFd<'_>, flags: i32) -> Result<()> {
    // SAFETY: no pointers.
    let r = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags) };
    if r < 0 { Err(last("fcntl(F_SETFL)", fd.as_raw_fd())) } else { Ok(()) }
}

/// Capacity of a pipe in bytes.
pub(crate) fn pipe_size(fd: BorrowedFd<'_>) -> Result<u32> {
    // SAFETY: no pointers.
    let r = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETPIPE_SZ) };
    u32::try_from(r).map_err(|_| last("fcntl(F_GETPIPE_SZ)", fd.as_raw_fd()))
}

/// Sets the capacity of a pipe; the kernel rounds up.
///
/// # Errors
/// EPERM above /proc/sys/fs/pipe-max-size without CAP_SYS_RESOURCE, EBUSY when more data is inside.
pub(crate) fn set_pipe_size(fd: BorrowedFd<'_>, bytes: u32) -> Result<()> {
    let bytes = libc::c_int::try_from(bytes).map_err(|_| Error::sys("fcntl(F_SETPIPE_SZ)", libc::EINVAL))?;
    // SAFETY: no pointers.
    let r = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETPIPE_SZ, bytes) };
    if r < 0 { Err(last("fcntl(F_SETPIPE_SZ)", fd.as_raw_fd())) } else { Ok(()) }
}

/// Where a file is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Mounted {
    /// Major and minor number of the device.
    pub dev: (u32, u32),
    pub ino: u64,
    /// Number of the mount, as in /proc/PID/mountinfo.
    pub mount: u64,
}

/// Asks where the file is; `None` where statx(2) does not tell the mount (before Linux 5.8).
pub(crate) fn mounted(fd: BorrowedFd<'_>) -> Result<Option<Mounted>> {
    /// `STATX_MNT_ID`.
    const MNT_ID: u32 = 0x1000;
    // SAFETY: all zeroes are a value of the structure.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    let (flags, mask) = (libc::AT_EMPTY_PATH, libc::STATX_INO | MNT_ID);
    // SAFETY: an empty path, that is the descriptor itself; the structure outlives the call.
    let ret = unsafe { libc::statx(fd.as_raw_fd(), c"".as_ptr(), flags, mask, &raw mut stat) };
    if ret < 0 {
        let e = last("statx", fd.as_raw_fd());
        return if e.errno() == Some(libc::ENOSYS) { Ok(None) } else { Err(e) };
    }
    let told = stat.stx_mask & MNT_ID != 0;
    Ok(told.then_some(Mounted {
        dev: (stat.stx_dev_major, stat.stx_dev_minor),
        ino: stat.stx_ino,
        mount: stat.stx_mnt_id,
    }))
}
