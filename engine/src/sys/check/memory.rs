//! Probes about mappings, memory files and page faults.
//!
//! # Safety
//! As in the parent module; mappings are made and moved in a child.
#![allow(unsafe_code)]

use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::null_mut;

use super::{answer, errno, in_child, must};
use crate::error::{Error, Result, SysContext};

/// Start and length of the mapping that begins at `address`, or is called `name`.
fn mapping(name: &str, address: Option<u64>) -> Result<Option<(u64, u64)>> {
    let maps = fs::read_to_string("/proc/self/maps").call("read(/proc/self/maps)")?;
    for line in maps.lines() {
        let range = line.split_once(' ').and_then(|(range, _)| range.split_once('-'));
        let Some((Ok(start), Ok(end))) =
            range.map(|(a, b)| (u64::from_str_radix(a, 16), u64::from_str_radix(b, 16)))
        else {
            continue;
        };
        if address.map_or(line.ends_with(name), |a| a == start) {
            return Ok(Some((start, end - start)));
        }
    }
    Ok(None)
}

/// Moves a mapping to a free place and gives that.
fn move_away(start: u64, len: u64) -> Result<u64> {
    let len = len as usize;
    // SAFETY: a fresh inaccessible range of the same length.
    let to = unsafe {
        libc::mmap(null_mut(), len, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
    };
    if to == libc::MAP_FAILED {
        return Err(Error::sys("mmap", errno()));
    }
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: both ranges belong to this process; the target is the one just mapped. libc's wrapper is not
    // used after the vdso is gone.
    let got = unsafe { libc::syscall(libc::SYS_mremap, start, len, len, flags, to) };
    must("mremap", got).map(|at| at as u64)
}

pub(crate) fn aio_remap() -> Result<bool> {
    in_child(|| {
        let mut context = 0u64;
        // SAFETY: the kernel writes the context into a local.
        let r = unsafe { libc::syscall(libc::SYS_io_setup, 16, &mut context) };
        if !answer("io_setup", r, &[libc::ENOSYS])? {
            return Ok(false);
        }
        let Some((start, len)) = mapping("", Some(context))? else { return Ok(false) };
        let moved = move_away(start, len)?;
        // SAFETY: asks for no events.
        let r =
            unsafe { libc::syscall(libc::SYS_io_getevents, moved, 0, 1, null_mut::<u8>(), null_mut::<u8>()) };
        answer("io_getevents", r, &[libc::EINVAL])
    })
}

/// vdso and its data can be moved, and signals still return.
pub(crate) fn vdso_mremap() -> Result<bool> {
    extern "C" fn nothing(_: i32) {}
    match in_child(|| {
        for name in ["[vvar]", "[vvar_vclock]", "[vdso]"] {
            if let Some((start, len)) = mapping(name, None)? {
                move_away(start, len)?;
            }
        }
        // SAFETY: a handler that does nothing, then the signal for it.
        unsafe {
            libc::signal(libc::SIGUSR1, nothing as *const () as usize);
            libc::raise(libc::SIGUSR1);
        }
        Ok(true)
    }) {
        // A kernel that does not follow the move kills the child when the signal returns.
        Err(e) if e.errno().is_none() => Ok(false),
        other => other,
    }
}

fn arch_map_vdso(code: i32) -> Result<bool> {
    in_child(|| {
        // SAFETY: either refused because there is a vdso, or maps one in this child.
        let r = unsafe { libc::syscall(libc::SYS_arch_prctl, code, 0) };
        match errno() {
            libc::EEXIST if r < 0 => Ok(true),
            libc::EINVAL if r < 0 => Ok(false),
            _ if r >= 0 => Ok(true),
            e => Err(Error::sys("arch_prctl(ARCH_MAP_VDSO)", e)),
        }
    })
}

pub(crate) fn can_map_vdso() -> Result<bool> {
    const ARCH_MAP_VDSO_64: i32 = 0x2003;
    arch_map_vdso(ARCH_MAP_VDSO_64)
}

/// The kernel runs 32-bit tasks and can give them their vdso.
pub(crate) fn compat() -> Result<bool> {
    const ARCH_MAP_VDSO_32: i32 = 0x2002;
    arch_map_vdso(ARCH_MAP_VDSO_32)
}

fn userfaultfd() -> Result<Option<OwnedFd>> {
    // SAFETY: no pointers.
    let r = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    if !answer("userfaultfd", r, &[libc::ENOSYS, libc::EPERM])? {
        return Ok(None);
    }
    // SAFETY: the kernel just gave us this number.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(r as i32) }))
}

pub(crate) fn uffd() -> Result<bool> {
    Ok(userfaultfd()?.is_some())
}

/// userfaultfd tells of fork, mremap, madvise and munmap.
pub(crate) fn uffd_noncooperative() -> Result<bool> {
    const UFFD_API: u64 = 0xaa;
    const UFFDIO_API: u64 = 0xc018_aa3f;
    /// EVENT_FORK, EVENT_REMAP, EVENT_REMOVE, EVENT_UNMAP.
    const WANTED: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6;
    let Some(fd) = userfaultfd()? else { return Ok(false) };
    // struct uffdio_api { api, features, ioctls }; no features asked for: the kernel tells all it has.
    let mut api = [UFFD_API, 0, 0];
    // SAFETY: a struct of three 64-bit numbers.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API as _, api.as_mut_ptr()) };
    must("ioctl(UFFDIO_API)", r.into())?;
    Ok(api[1] & WANTED == WANTED)
}

pub(crate) fn memfd_hugetlb() -> Result<bool> {
    // SAFETY: a constant name.
    let r = unsafe { libc::memfd_create(c"probe".as_ptr(), libc::MFD_HUGETLB | libc::MFD_CLOEXEC) };
    let has = answer("memfd_create(MFD_HUGETLB)", r.into(), &[libc::EINVAL, libc::ENOENT, libc::ENOSYS])?;
    if has {
        drop(crate::sys::fd::take(r)?);
    }
    Ok(has)
}

/// `prctl(PR_SET_MM, PR_SET_MM_MAP)` and `PR_GET_TID_ADDRESS`.
pub(crate) fn prctl_mm_map() -> Result<bool> {
    let mut address = 0u64;
    // SAFETY: the kernel writes one word.
    let r = unsafe { libc::prctl(libc::PR_GET_TID_ADDRESS, &mut address) };
    if !answer("prctl(PR_GET_TID_ADDRESS)", r.into(), &[libc::EINVAL])? {
        return Ok(false);
    }
    let mut size = 0u32;
    // SAFETY: the kernel writes the size of its struct.
    let r = unsafe { libc::prctl(libc::PR_SET_MM, libc::PR_SET_MM_MAP_SIZE, &mut size, 0, 0) };
    answer("prctl(PR_SET_MM_MAP_SIZE)", r.into(), &[libc::EINVAL])
}
