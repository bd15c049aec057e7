//! userfaultfd(2): page faults and writes of a process served or recorded by another.
//!
//! Source: Documentation/admin-guide/mm/userfaultfd.rst and `uapi/linux/userfaultfd.h` of the kernel.
//!
//! # Safety
//! Each ioctl reads and writes one structure, a local here. The memory an ioctl changes is that of the
//! process the descriptor was made in, by number, except for the source of [`copy`], a slice.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use crate::{
    error::{Error, Result},
    sys::errno,
};

bitflags::bitflags! {
    /// Features of the descriptor (`UFFD_FEATURE_*`).
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct Features: u64 {
        /// Write protection faults (5.7).
        const PAGEFAULT_FLAG_WP = 1;
        /// Report fork (4.11); then the message brings a descriptor for the child.
        const EVENT_FORK = 1 << 1;
        /// Report mremap.
        const EVENT_REMAP = 1 << 2;
        /// Report MADV_DONTNEED and MADV_REMOVE.
        const EVENT_REMOVE = 1 << 3;
        /// Missing pages of hugetlbfs.
        const MISSING_HUGETLBFS = 1 << 4;
        /// Missing pages of shared memory.
        const MISSING_SHMEM = 1 << 5;
        /// Report munmap.
        const EVENT_UNMAP = 1 << 6;
        /// SIGBUS instead of messages.
        const SIGBUS = 1 << 7;
        /// Say which thread faulted.
        const THREAD_ID = 1 << 8;
        /// Write protection in hugetlbfs and shared memory (5.19).
        const WP_HUGETLBFS_SHMEM = 1 << 12;
        /// Write-protect pages that were never touched (6.4).
        const WP_UNPOPULATED = 1 << 13;
        /// Poisoning pages (6.6).
        const POISON = 1 << 14;
        /// Write protection faults resolve themselves and are recorded (6.7).
        const WP_ASYNC = 1 << 15;
        /// Moving pages (6.8).
        const MOVE = 1 << 16;
    }

    /// What is watched in a range (`UFFDIO_REGISTER_MODE_*`).
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Mode: u64 {
        /// Access to missing pages.
        const MISSING = 1;
        /// Writes to protected pages.
        const WP = 2;
        /// Access to pages that exist but are not mapped.
        const MINOR = 4;
    }
}

const UFFD_API: u64 = 0xaa;
const NEW: u32 = 0xaa00;
const API: u32 = 0xc018_aa3f;
const REGISTER: u32 = 0xc020_aa00;
const UNREGISTER: u32 = 0x8010_aa01;
const WAKE: u32 = 0x8010_aa02;
const COPY: u32 = 0xc028_aa03;
const ZEROPAGE: u32 = 0xc020_aa04;
const WRITEPROTECT: u32 = 0xc018_aa06;
const POISON: u32 = 0xc020_aa08;

/// A descriptor for our own address space. `user_mode_only` needs no privilege (5.11).
pub fn open(user_mode_only: bool) -> Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | i32::from(user_mode_only);
    // SAFETY: numbers only.
    let ret = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let fd = errno::check(ret, "userfaultfd")?;
    // SAFETY: a new descriptor of ours.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// The same by an open `/dev/userfaultfd`, whose opener had the privilege (6.1).
pub fn open_by(device: impl AsFd) -> Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the argument is a number.
    let ret = unsafe { libc::ioctl(device.as_fd().as_raw_fd(), NEW as libc::Ioctl, flags) };
    let fd = errno::check(ret.into(), "ioctl(USERFAULTFD_IOC_NEW)")?;
    // SAFETY: a new descriptor of ours.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn ioctl<const N: usize>(fd: impl AsFd, name: &'static str, request: u32, arg: &mut [u64; N]) -> Result<()> {
    // SAFETY: the size encoded in bits 16..30 of each request equals 8 * N, checked here.
    assert_eq!((request >> 16 & 0x3fff) as usize, N * 8);
    // SAFETY: arg is alive and of the size the request says.
    let ret = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request as libc::Ioctl, arg.as_mut_ptr()) };
    errno::check(ret.into(), name).map(drop)
}

/// The first step on a new descriptor: asks for `features`, gives all that the kernel has.
///
/// # Errors
/// EINVAL if the kernel lacks one; a second descriptor has to be made to ask for less.
pub fn api(fd: impl AsFd, features: Features) -> Result<Features> {
    let mut arg = [UFFD_API, features.bits(), 0];
    ioctl(fd, "ioctl(UFFDIO_API)", API, &mut arg)?;
    Ok(Features::from_bits_truncate(arg[1]))
}

/// Watches `[start, start + len)`; gives the bit set of ioctls (by number) that work there.
pub fn register(fd: impl AsFd, start: u64, len: u64, mode: Mode) -> Result<u64> {
    let mut arg = [start, len, mode.bits(), 0];
    ioctl(fd, "ioctl(UFFDIO_REGISTER)", REGISTER, &mut arg)?;
    Ok(arg[3])
}

/// Ends watching.
pub fn unregister(fd: impl AsFd, start: u64, len: u64) -> Result<()> {
    ioctl(fd, "ioctl(UFFDIO_UNREGISTER)", UNREGISTER, &mut [start, len])
}

/// Lets threads that wait for a fault in the range try again.
pub fn wake(fd: impl AsFd, start: u64, len: u64) -> Result<()> {
    ioctl(fd, "ioctl(UFFDIO_WAKE)", WAKE, &mut [start, len])
}

/// Fills missing pages at `start` with `data` (whole pages) and wakes whoever waits for them. Gives the
/// number of bytes copied; less than asked when the address space changed meanwhile.
///
/// # Errors
/// EEXIST if the first page is there already, ENOENT if the range went away, ESRCH if the process did.
pub fn copy(fd: impl AsFd, start: u64, data: &[u8]) -> Result<u64> {
    let mut arg = [start, data.as_ptr().expose_provenance() as u64, data.len() as u64, 0, 0];
    partial(ioctl(fd, "ioctl(UFFDIO_COPY)", COPY, &mut arg), arg[4])
}

/// Fills missing pages with zeroes, like [`copy`].
pub fn zero(fd: impl AsFd, start: u64, len: u64) -> Result<u64> {
    let mut arg = [start, len, 0, 0];
    partial(ioctl(fd, "ioctl(UFFDIO_ZEROPAGE)", ZEROPAGE, &mut arg), arg[3])
}

/// Makes touching missing pages SIGBUS (6.6), like [`copy`].
pub fn poison(fd: impl AsFd, start: u64, len: u64) -> Result<u64> {
    let mut arg = [start, len, 0, 0];
    partial(ioctl(fd, "ioctl(UFFDIO_POISON)", POISON, &mut arg), arg[3])
}

/// EAGAIN with progress is a partial success.
fn partial(result: Result<()>, done: u64) -> Result<u64> {
    match result {
        Ok(()) => Ok(done),
        Err(e) if e.errno() == Some(libc::EAGAIN) && (done as i64) > 0 => Ok(done),
        Err(e) => Err(e),
    }
}

/// Sets or lifts write protection of a range registered with [`Mode::WP`].
pub fn write_protect(fd: impl AsFd, start: u64, len: u64, on: bool) -> Result<()> {
    ioctl(fd, "ioctl(UFFDIO_WRITEPROTECT)", WRITEPROTECT, &mut [start, len, on.into()])
}

/// A message read from the descriptor.
#[derive(Debug)]
pub enum Event {
    /// A thread waits at `address`.
    Fault {
        /// Where, rounded down to its page.
        address: u64,
        /// `UFFD_PAGEFAULT_FLAG_*` bits.
        flags: u64,
    },
    /// The process forked; the descriptor serves the child.
    Fork(OwnedFd),
    /// mremap moved `len` bytes.
    Remap {
        /// From here.
        from: u64,
        /// To here.
        to: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Pages of the range were dropped and will be missing again.
    Remove {
        /// First address.
        start: u64,
        /// Address behind it.
        end: u64,
    },
    /// The range was unmapped.
    Unmap {
        /// First address.
        start: u64,
        /// Address behind it.
        end: u64,
    },
}

/// The next message, or `None` when there is none now.
///
/// The read blocks if the descriptor is a blocking one.
pub fn read_event(fd: impl AsFd) -> Result<Option<Event>> {
    let mut msg = [0u8; 32];
    let n = match nix::unistd::read(fd, &mut msg) {
        Ok(n) => n,
        Err(nix::errno::Errno::EAGAIN) => return Ok(None),
        Err(e) => return Err(Error::sys("read(userfaultfd)", e as i32)),
    };
    if n != msg.len() {
        return Err(Error::host(format!("userfaultfd gave a message of {n} bytes")));
    }
    let word = |at: usize| {
        let mut w = [0; 8];
        w.copy_from_slice(&msg[at..at + 8]);
        u64::from_ne_bytes(w)
    };
    let (a, b, c) = (word(8), word(16), word(24));
    Ok(Some(match msg[0] {
        0x12 => Event::Fault { flags: a, address: b & !0xfff },
        // SAFETY: the kernel installed this new descriptor for us while we read the message.
        0x13 => Event::Fork(unsafe { OwnedFd::from_raw_fd(a as u32 as i32) }),
        0x14 => Event::Remap { from: a, to: b, len: c },
        0x15 => Event::Remove { start: a, end: b },
        0x16 => Event::Unmap { start: a, end: b },
        other => return Err(Error::host(format!("userfaultfd gave an unknown event {other:#x}"))),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_page_is_reported_and_filled() {
        let fd = match open(true).or_else(|_| open(false)) {
            Ok(fd) => fd,
            Err(e) => {
                eprintln!("SKIP: {e}");
                return;
            }
        };
        api(&fd, Features::empty()).unwrap();
        let map = memmap2::MmapMut::map_anon(2 * 4096).unwrap();
        let base = map.as_ptr().addr() as u64;
        register(&fd, base, 2 * 4096, Mode::MISSING).unwrap();
        assert!(read_event(&fd).unwrap().is_none());
        assert_eq!(copy(&fd, base, &[7u8; 4096]).unwrap(), 4096);
        assert_eq!(copy(&fd, base, &[7u8; 4096]).unwrap_err().errno(), Some(libc::EEXIST));
        assert_eq!(zero(&fd, base + 4096, 4096).unwrap(), 4096);
        assert_eq!((map[0], map[4095], map[4096]), (7, 7, 0));
        wake(&fd, base, 4096).unwrap();
        unregister(&fd, base, 2 * 4096).unwrap();
    }

    #[test]
    fn a_faulting_thread_goes_on_once_served() {
        let Ok(fd) = open(true) else {
            eprintln!("SKIP: no userfaultfd for user faults");
            return;
        };
        api(&fd, Features::empty()).unwrap();
        let map = memmap2::MmapMut::map_anon(4096).unwrap();
        let base = map.as_ptr().addr() as u64;
        register(&fd, base, 4096, Mode::MISSING).unwrap();
        std::thread::scope(|s| {
            let reader = s.spawn(|| map[5]);
            let mut poll = [nix::poll::PollFd::new(fd.as_fd(), nix::poll::PollFlags::POLLIN)];
            assert_eq!(nix::poll::poll(&mut poll, 5000u16).unwrap(), 1);
            match read_event(&fd).unwrap() {
                Some(Event::Fault { address, .. }) => assert_eq!(address, base),
                other => panic!("{other:?}"),
            }
            copy(&fd, base, &[9u8; 4096]).unwrap();
            assert_eq!(reader.join().unwrap(), 9);
        });
    }
}
