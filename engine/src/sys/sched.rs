//! Scheduling of other threads: libc's wrappers go by process in some C libraries, the calls by thread.
//!
//! # Safety
//! Pointers passed are to locals and slices that outlive the call, with their lengths.
#![allow(unsafe_code)]

use crate::{error::Result, pstree::RealPid, sys::errno};

/// `SCHED_*` of the thread, with `SCHED_RESET_ON_FORK`.
pub fn policy(tid: RealPid) -> Result<i32> {
    // SAFETY: no pointers.
    let ret = unsafe { libc::syscall(libc::SYS_sched_getscheduler, tid.0) };
    errno::check(ret, "sched_getscheduler").map(|policy| policy as i32)
}

/// Whether this process has a thread of that number, be it on its way out.
pub fn has_thread(tid: nix::unistd::Pid) -> bool {
    // SAFETY: no pointers; no signal is sent.
    let ret = unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), tid.as_raw(), 0) };
    ret == 0 || errno::last() != libc::ESRCH
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

/// `ioprio_get(2)`: class in the upper three bits of 16, level below; 0 if never set.
pub fn io_priority(tid: RealPid) -> Result<u32> {
    // SAFETY: no pointers.
    let ret = unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, tid.0) };
    errno::check(ret, "ioprio_get").map(|value| value as u32)
}

/// `ioprio_set(2)`.
///
/// # Errors
/// EPERM without CAP_SYS_NICE for the real-time class.
pub fn set_io_priority(tid: RealPid, value: u32) -> Result<()> {
    // SAFETY: no pointers.
    let ret = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, tid.0, value) };
    errno::check(ret, "ioprio_set").map(drop)
}

const IOPRIO_WHO_PROCESS: i32 = 1;

/// CPUs the thread may run on now, bit 0 of byte 0 is CPU 0; without those that are offline.
pub fn affinity(tid: RealPid) -> Result<Vec<u8>> {
    // Large enough for every kernel that can be built for this architecture (8192 CPUs).
    let mut mask = vec![0u8; 1024];
    // SAFETY: the buffer is as long as stated.
    let ret = unsafe { libc::syscall(libc::SYS_sched_getaffinity, tid.0, mask.len(), mask.as_mut_ptr()) };
    mask.truncate(errno::check(ret, "sched_getaffinity")? as usize);
    Ok(mask)
}

/// Binds the thread to the CPUs of `mask`, as far as its control group allows them.
///
/// # Errors
/// EINVAL if that leaves none.
pub fn set_affinity(tid: RealPid, mask: &[u8]) -> Result<()> {
    // The kernel takes whole words.
    let mut words = mask.to_vec();
    words.resize(mask.len().next_multiple_of(8), 0);
    // SAFETY: the buffer is as long as stated.
    let ret = unsafe { libc::syscall(libc::SYS_sched_setaffinity, tid.0, words.len(), words.as_ptr()) };
    errno::check(ret, "sched_setaffinity").map(drop)
}

/// `struct sched_attr` of sched_setattr(2), with utilisation clamps (Linux 5.3).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct Attr {
    /// Length of the structure, filled in here.
    pub size: u32,
    /// `SCHED_*` without flags.
    pub policy: u32,
    /// `SCHED_FLAG_*`.
    pub flags: u64,
    /// Nice value of the fair policies.
    pub nice: i32,
    /// Of the real-time policies.
    pub priority: u32,
    /// Nanoseconds: of the deadline policy; of the fair ones the time slice (Linux 6.12).
    pub runtime: u64,
    /// Nanoseconds.
    pub deadline: u64,
    /// Nanoseconds.
    pub period: u64,
    /// Utilisation clamps, 0 to 1024; both 0 where the kernel has none.
    pub util_min: u32,
    /// As above.
    pub util_max: u32,
}

/// Scheduling attributes of the thread.
pub fn attributes(tid: RealPid) -> Result<Attr> {
    let mut attr = Attr::default();
    // SAFETY: the structure is as long as stated.
    let ret = unsafe { libc::syscall(libc::SYS_sched_getattr, tid.0, &raw mut attr, size_of::<Attr>(), 0) };
    errno::check(ret, "sched_getattr").map(|_| attr)
}

/// Sets them.
///
/// # Errors
/// EBUSY if there is no bandwidth for a deadline, EPERM without CAP_SYS_NICE, EOPNOTSUPP for utilisation clamps
/// that the kernel does not have.
pub fn set_attributes(tid: RealPid, attr: &Attr) -> Result<()> {
    let attr = Attr { size: size_of::<Attr>() as u32, ..*attr };
    // SAFETY: the structure states its length.
    let ret = unsafe { libc::syscall(libc::SYS_sched_setattr, tid.0, &raw const attr, 0) };
    errno::check(ret, "sched_setattr").map(drop)
}

/// Whether the thread has a core scheduling cookie, and which (Linux 5.14; 0 for none).
///
/// # Errors
/// EINVAL or ENODEV where the kernel has no core scheduling.
pub fn core_cookie(tid: RealPid) -> Result<u64> {
    const PR_SCHED_CORE: i32 = 62;
    const GET: libc::c_ulong = 0;
    const SCOPE_THREAD: libc::c_ulong = 0;
    let mut cookie = 0u64;
    let pid = tid.0 as libc::c_ulong;
    // SAFETY: the kernel stores one word.
    let ret = unsafe { libc::prctl(PR_SCHED_CORE, GET, pid, SCOPE_THREAD, &raw mut cookie) };
    errno::check(ret.into(), "prctl(PR_SCHED_CORE)").map(|_| cookie)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_agree_with_the_older_calls() {
        const { assert!(size_of::<Attr>() == 56) };
        let me = RealPid(nix::unistd::gettid().as_raw());
        let attr = attributes(me).unwrap();
        assert_eq!(attr.policy as i32, policy(me).unwrap() & !0x4000_0000);
        assert_eq!(attr.nice, nice(me).unwrap());
        let mask = affinity(me).unwrap();
        assert!(mask.iter().any(|byte| *byte != 0));
        set_affinity(me, &mask).unwrap();
        let before = io_priority(me).unwrap();
        // Best effort, level 6.
        set_io_priority(me, 2 << 13 | 6).unwrap();
        assert_eq!(io_priority(me).unwrap(), 2 << 13 | 6);
        set_io_priority(me, before).unwrap();
    }
}
