//! kcmp(2): whether two tasks share a kernel object, and an order over objects.
//!
//! # Safety
//! Numbers only, but for the epoll slot, a local that outlives the call.
#![allow(unsafe_code)]

use std::cmp::Ordering;

use crate::{error::Result, pstree::RealPid, sys::errno};

/// What is compared.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum What {
    /// Open files behind descriptor `.0` of the first and `.1` of the second task.
    File(i32, i32),
    /// Address spaces.
    Vm,
    /// Descriptor tables.
    Files,
    /// Root, working directory and umask.
    Fs,
    /// Signal handlers.
    Sighand,
    /// I/O contexts.
    Io,
    /// System V semaphore undo lists.
    SysvSem,
}

/// The kernel's order of the two objects, stable while both exist: equal means shared.
///
/// # Errors
/// ESRCH, EBADF, EPERM without ptrace rights, ENOSYS where the kernel was built without it.
pub fn compare(a: RealPid, b: RealPid, what: What) -> Result<Ordering> {
    let (kind, x, y) = match what {
        What::File(x, y) => (0, x, y),
        What::Vm => (1, 0, 0),
        What::Files => (2, 0, 0),
        What::Fs => (3, 0, 0),
        What::Sighand => (4, 0, 0),
        What::Io => (5, 0, 0),
        What::SysvSem => (6, 0, 0),
    };
    // SAFETY: numbers only.
    let ret =
        unsafe { libc::syscall(libc::SYS_kcmp, a.0, b.0, kind, x as libc::c_ulong, y as libc::c_ulong) };
    order(errno::check(ret, "kcmp")?)
}

/// A target registered in an epoll instance.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct EpollSlot {
    /// Descriptor of the epoll instance in the second task.
    pub efd: u32,
    /// Descriptor number the target was added under.
    pub tfd: u32,
    /// Which of several targets added under that number.
    pub toff: u32,
}

/// Whether descriptor `fd` of `a` is the open file that `slot` of `b` watches (Linux 4.13).
pub fn compare_epoll(a: RealPid, fd: i32, b: RealPid, slot: EpollSlot) -> Result<Ordering> {
    // SAFETY: slot is a local of the layout the kernel reads.
    let ret = unsafe { libc::syscall(libc::SYS_kcmp, a.0, b.0, 7, fd as libc::c_ulong, &raw const slot) };
    order(errno::check(ret, "kcmp(KCMP_EPOLL_TFD)")?)
}

/// 0 equal, 1 less, 2 greater; 3 means unequal without an order, which no current kernel gives.
fn order(ret: u64) -> Result<Ordering> {
    match ret {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        other => Err(crate::error::Error::host(format!("kcmp gave {other}: objects without an order"))),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn duplicates_are_equal_and_the_order_is_antisymmetric() {
        let me = RealPid(std::process::id() as i32);
        let a = std::fs::File::open("/dev/null").unwrap();
        let b = a.try_clone().unwrap();
        let c = std::fs::File::open("/dev/null").unwrap();
        let cmp =
            |x: &std::fs::File, y: &std::fs::File| compare(me, me, What::File(x.as_raw_fd(), y.as_raw_fd()));
        match cmp(&a, &b) {
            Err(e) if e.errno() == Some(libc::ENOSYS) => eprintln!("SKIP: no kcmp"),
            r => {
                assert_eq!(r.unwrap(), Ordering::Equal);
                assert_eq!(cmp(&a, &c).unwrap(), cmp(&c, &a).unwrap().reverse());
                assert_ne!(cmp(&a, &c).unwrap(), Ordering::Equal);
                assert_eq!(compare(me, me, What::Vm).unwrap(), Ordering::Equal);
            }
        }
    }

    #[test]
    fn epoll_targets_are_found() {
        let me = RealPid(std::process::id() as i32);
        let (r, _w) = std::io::pipe().unwrap();
        let ep = nix::sys::epoll::Epoll::new(nix::sys::epoll::EpollCreateFlags::empty()).unwrap();
        ep.add(&r, nix::sys::epoll::EpollEvent::new(nix::sys::epoll::EpollFlags::EPOLLIN, 0)).unwrap();
        let slot = EpollSlot { efd: ep.0.as_raw_fd() as u32, tfd: r.as_raw_fd() as u32, toff: 0 };
        match compare_epoll(me, r.as_raw_fd(), me, slot) {
            Err(e) if matches!(e.errno(), Some(libc::ENOSYS | libc::EOPNOTSUPP | libc::EINVAL)) => {
                eprintln!("SKIP: no KCMP_EPOLL_TFD")
            }
            r => assert_eq!(r.unwrap(), Ordering::Equal),
        }
    }
}
