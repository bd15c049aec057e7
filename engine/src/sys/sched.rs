//! Scheduling of other threads: libc's wrappers go by process in some C libraries, the calls by thread.
//!
//! # Safety
//! The only pointer passed is to a local that the kernel fills.
#![allow(unsafe_code)]

use crate::{error::Result, pstree::RealPid, sys::errno};

/// `SCHED_*` of the thread, with `SCHED_RESET_ON_FORK`.
pub fn policy(tid: RealPid) -> Result<i32> {
    // SAFETY: no pointers.
    let ret = unsafe { libc::syscall(libc::SYS_sched_getscheduler, tid.0) };
    errno::check(ret, "sched_getscheduler").map(|policy| policy as i32)
}

/// Static priority of a thread with a real-time policy.
pub fn priority(tid: RealPid) -> Result<i32> {
    let mut param = 0i32;
    // SAFETY: struct sched_param of the kernel is one int.
    let ret = unsafe { libc::syscall(libc::SYS_sched_getparam, tid.0, &raw mut param) };
    errno::check(ret, "sched_getparam").map(|_| param)
}

/// Nice value, -20 to 19.
pub fn nice(tid: RealPid) -> Result<i32> {
    // SAFETY: no pointers. The raw call gives 20 - nice, 1 to 40, so that no value looks like an error.
    let ret = unsafe { libc::syscall(libc::SYS_getpriority, libc::PRIO_PROCESS, tid.0) };
    errno::check(ret, "getpriority").map(|raw| 20 - raw as i32)
}
