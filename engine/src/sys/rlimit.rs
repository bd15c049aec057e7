//! prlimit(2) on another process.
//!
//! # Safety
//! The kernel reads and writes one `struct rlimit64` each, locals here.
#![allow(unsafe_code)]

use std::ptr::null;

use crate::{error::Result, pstree::RealPid, sys::errno};

/// Number of resources the kernel has (`RLIM_NLIMITS`).
pub const RESOURCES: u32 = 16;
/// No limit.
pub const INFINITY: u64 = u64::MAX;

/// Soft and hard limit, in the resource's unit; [`INFINITY`] for none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Rlimit {
    /// What counts now.
    pub soft: u64,
    /// How far the soft limit may be raised.
    pub hard: u64,
}

/// Limit number `resource` of `pid`.
///
/// # Errors
/// EINVAL for a resource the kernel does not have, EPERM without rights over the process, ESRCH.
pub fn get(pid: RealPid, resource: u32) -> Result<Rlimit> {
    let mut old = Rlimit { soft: 0, hard: 0 };
    // SAFETY: old is a local of the kernel's layout.
    let ret = unsafe { libc::syscall(libc::SYS_prlimit64, pid.0, resource, null::<Rlimit>(), &raw mut old) };
    errno::check(ret, "prlimit").map(|_| old)
}

/// Sets limit number `resource` of `pid` and gives the one before.
///
/// # Errors
/// EPERM when the hard limit would rise and we lack CAP_SYS_RESOURCE.
pub fn set(pid: RealPid, resource: u32, new: Rlimit) -> Result<Rlimit> {
    let mut old = Rlimit { soft: 0, hard: 0 };
    // SAFETY: both are locals of the kernel's layout.
    let ret = unsafe { libc::syscall(libc::SYS_prlimit64, pid.0, resource, &raw const new, &raw mut old) };
    errno::check(ret, "prlimit").map(|_| old)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_limits_can_be_read_and_written_back() {
        let me = RealPid(std::process::id() as i32);
        for resource in 0..RESOURCES {
            let limit = get(me, resource).unwrap();
            assert!(limit.soft <= limit.hard, "resource {resource}");
            assert_eq!(set(me, resource, limit).unwrap(), limit);
        }
        assert_eq!(get(me, RESOURCES).unwrap_err().errno(), Some(libc::EINVAL));
    }
}
