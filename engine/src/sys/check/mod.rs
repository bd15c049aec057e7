//! Probes of the command check: what a dump or restore may need of the kernel, most of it only for some
//! programs. The table is [`crate::kernel::check`].
//!
//! A probe says no only on the refusal by which a kernel without the feature shows itself; any other failure is
//! an error, so that a missing permission is not taken for a missing feature.
//!
//! # Safety
//! Calls without pointers, or with pointers to locals that outlive the call. What changes a process for good
//! (namespaces, mounts, mappings, filters) happens in a child that then ends.
#![allow(unsafe_code)]

pub(crate) mod files;
pub(crate) mod memory;
pub(crate) mod namespaces;
pub(crate) mod netlink;
pub(crate) mod sockets;
pub(crate) mod tasks;

use crate::error::{Error, Result};

/// errno of the call that just failed.
fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// `r` of a call: success is yes, one of `no` is no.
fn answer(call: &'static str, r: i64, no: &[i32]) -> Result<bool> {
    if r >= 0 {
        return Ok(true);
    }
    let e = errno();
    if no.contains(&e) { Ok(false) } else { Err(Error::sys(call, e)) }
}

/// `r` of a call that must succeed for the probe to go on.
fn must(call: &'static str, r: i64) -> Result<i64> {
    if r < 0 { Err(Error::sys(call, errno())) } else { Ok(r) }
}

/// Is the file there? Any other failure than its absence is an error.
fn exists(path: &str) -> Result<bool> {
    match std::fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(Error::io("lstat", &e).during(path.to_owned())),
    }
}

/// Runs `probe` in a child, for what must not happen to us.
///
/// Precondition: no other thread of ours holds a lock the probe needs; the allocator's is safe.
fn in_child(probe: impl FnOnce() -> Result<bool>) -> Result<bool> {
    const YES: i32 = 10;
    const NO: i32 = 11;
    // SAFETY: the child runs the probe and leaves by _exit; it touches nothing of its parent.
    let pid = must("fork", i64::from(unsafe { libc::fork() }))? as i32;
    if pid == 0 {
        let code = match probe() {
            Ok(true) => YES,
            Ok(false) => NO,
            // The errno travels as far as it fits.
            Err(e) => 100 + e.errno().unwrap_or(0).clamp(0, 150),
        };
        // SAFETY: ends the child without running destructors that belong to the parent.
        unsafe { libc::_exit(code) };
    }
    let mut status = 0;
    // SAFETY: our own child; status is a local.
    must("waitpid", i64::from(unsafe { libc::waitpid(pid, &mut status, 0) }))?;
    match libc::WEXITSTATUS(status) {
        YES if libc::WIFEXITED(status) => Ok(true),
        NO if libc::WIFEXITED(status) => Ok(false),
        code if libc::WIFEXITED(status) && code > 100 => Err(Error::sys("probe in a child", code - 100)),
        _ => Err(Error::host(format!("the probe's child ended with status {status:#x}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_childs_answer_comes_back() {
        assert!(in_child(|| Ok(true)).unwrap());
        assert!(!in_child(|| Ok(false)).unwrap());
        assert_eq!(in_child(|| Err(Error::sys("x", libc::EPERM))).unwrap_err().errno(), Some(libc::EPERM));
    }

    #[test]
    fn only_the_expected_refusal_is_a_no() {
        // SAFETY: a descriptor that is not open.
        let closed = || i64::from(unsafe { libc::close(-1) });
        assert!(!answer("close", closed(), &[libc::EBADF]).unwrap());
        assert_eq!(answer("close", closed(), &[libc::EINVAL]).unwrap_err().errno(), Some(libc::EBADF));
        assert!(answer("close", 0, &[]).unwrap());
    }
}
