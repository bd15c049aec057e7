//! Process file descriptors: pidfd_open(2), pidfd_getfd(2), pidfd_send_signal(2).
//!
//! # Safety
//! Numbers only, but for a null siginfo pointer; a descriptor the kernel returns is new and ours.
#![allow(unsafe_code)]

use std::{
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr::null,
};

use crate::{error::Result, pstree::RealPid, sys::errno};

/// `PIDFD_THREAD`: refers to one thread, not to its process (Linux 6.9).
pub const PIDFD_THREAD: u32 = libc::O_EXCL as u32;

/// A descriptor for the process `pid` (Linux 5.3).
///
/// # Errors
/// ESRCH if there is none; EINVAL if `pid` is a thread but not a leader and `PIDFD_THREAD` is not given.
pub fn open(pid: RealPid, flags: u32) -> Result<OwnedFd> {
    // SAFETY: numbers only.
    let ret = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.0, flags) };
    let fd = errno::check(ret, "pidfd_open")?;
    // SAFETY: a new descriptor of ours.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// A duplicate, in our process, of descriptor `fd` of the process (Linux 5.6). Close-on-exec.
///
/// # Errors
/// EBADF if it has no such descriptor; EPERM without ptrace rights; ESRCH if it ended.
pub fn getfd(pidfd: BorrowedFd<'_>, fd: i32) -> Result<OwnedFd> {
    // SAFETY: numbers only.
    let ret = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) };
    let fd = errno::check(ret, "pidfd_getfd")?;
    // SAFETY: a new descriptor of ours.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Sends `signal` as kill(2) would; 0 only checks.
pub fn send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> Result<()> {
    // SAFETY: a null siginfo means "as kill does".
    let ret = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, null::<libc::siginfo_t>(), 0)
    };
    errno::check(ret, "pidfd_send_signal").map(drop)
}

/// A namespace of the process or thread, by the number of its kind in `PIDFD_GET_*_NAMESPACE` (Linux 6.11).
///
/// # Errors
/// EOPNOTSUPP if the kernel has no such kind; ENOTTY or EINVAL before Linux 6.11; EPERM without ptrace rights; ESRCH if it
/// ended.
pub fn namespace(pidfd: BorrowedFd<'_>, kind: u8) -> Result<OwnedFd> {
    let request = 0xff00 | libc::Ioctl::from(kind);
    // SAFETY: no argument.
    let ret = unsafe { libc::ioctl(pidfd.as_raw_fd(), request, 0) };
    let fd = errno::check(ret.into(), "ioctl(PIDFD_GET_NAMESPACE)")?;
    // SAFETY: a new descriptor of ours.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Takes part in giving back the memory of a process that was killed (Linux 5.15).
///
/// # Errors
/// EINVAL if it is not about to end, or somebody else who is not has the same memory.
pub fn release_memory(pidfd: BorrowedFd<'_>) -> Result<()> {
    /// `SYS_process_mrelease`, whose number is the same everywhere.
    const PROCESS_MRELEASE: libc::c_long = 448;
    // SAFETY: numbers only; the memory is another process's.
    let ret = unsafe { libc::syscall(PROCESS_MRELEASE, pidfd.as_raw_fd(), 0) };
    errno::check(ret, "process_mrelease").map(drop)
}

/// One descriptor per entry of `flags`, all for one process that has ended and was waited for.
pub fn of_the_dead(flags: &[u32]) -> Result<Vec<OwnedFd>> {
    // SAFETY: the child makes no call but _exit, which is async-signal-safe.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        // SAFETY: as above.
        unsafe { libc::_exit(0) }
    }
    let pid = errno::check(pid.into(), "fork")? as i32;
    // Until it is waited for, its number cannot become somebody else's.
    let opened = flags.iter().map(|flags| open(RealPid(pid), *flags)).collect();
    // SAFETY: our own child; a null status is not written.
    let ret = unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
    errno::check(ret.into(), "waitpid")?;
    opened
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::fd::{AsFd, AsRawFd},
    };

    use super::*;

    #[test]
    fn descriptors_of_a_process_can_be_taken() {
        let me = RealPid(std::process::id() as i32);
        let Ok(pidfd) = open(me, 0) else {
            eprintln!("SKIP: no pidfd_open");
            return;
        };
        let (mut r, w) = std::io::pipe().unwrap();
        let copy = match getfd(pidfd.as_fd(), w.as_raw_fd()) {
            Ok(fd) => fd,
            Err(e) if e.errno() == Some(libc::ENOSYS) => {
                eprintln!("SKIP: no pidfd_getfd");
                return;
            }
            Err(e) => panic!("{e}"),
        };
        drop(w);
        std::fs::File::from(copy).write_all(b"x").unwrap();
        let mut all = Vec::new();
        r.read_to_end(&mut all).unwrap();
        assert_eq!(all, b"x");
        assert_eq!(getfd(pidfd.as_fd(), -1).unwrap_err().errno(), Some(libc::EBADF));
        send_signal(pidfd.as_fd(), 0).unwrap();
    }
}
