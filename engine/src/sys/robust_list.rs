//! get_robust_list(2) of another thread.
//!
//! # Safety
//! The kernel writes two words, locals here.
#![allow(unsafe_code)]

use crate::{error::Result, pstree::RealPid, sys::errno};

/// Address and length of the head of the thread's list of robust futexes, as it registered them.
///
/// # Errors
/// EPERM without ptrace rights; ESRCH; ENOSYS where the kernel has no robust futexes.
pub fn get(tid: RealPid) -> Result<(u64, u64)> {
    let (mut head, mut len) = (0u64, 0u64);
    // SAFETY: both are locals of word size.
    let ret = unsafe { libc::syscall(libc::SYS_get_robust_list, tid.0, &raw mut head, &raw mut len) };
    errno::check(ret, "get_robust_list").map(|_| (head, len))
}
