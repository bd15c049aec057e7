//! clone3(2) with a chosen pid.
//!
//! # Safety
//! Like fork(2): the child of a process with several threads may only make async-signal-safe calls,
//! and with shared-memory flags it would run on its parent's stack; see [`clone3`].
#![allow(unsafe_code)]

use blobrt::abi::CloneArgs;

use crate::{
    error::{Error, Kind, Result, SysContext},
    pstree::RealPid,
    sys::errno,
};

/// Which side returned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// The caller; the child has this pid in the caller's pid namespace.
    Parent(RealPid),
    /// The new process.
    Child,
}

/// Forks with namespace `flags` (`CLONE_NEW*`, `CLONE_PARENT`), sending `exit_signal` at the child's
/// end. `set_tid` gives its pid in its own pid namespace first, then outwards; empty lets the kernel
/// choose.
///
/// # Errors
/// EEXIST if a pid is taken; EPERM without CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN in the namespaces.
///
/// # Safety
/// The calling process has one thread, or the child only makes async-signal-safe calls. Flags that
/// share memory or need further fields (`CLONE_VM`, `CLONE_THREAD`, `CLONE_SETTLS`, `CLONE_PIDFD`, tid
/// addresses) are refused.
pub unsafe fn clone3(flags: u64, exit_signal: i32, set_tid: &[i32]) -> Result<Side> {
    let allowed = (libc::CLONE_NEWNS
        | libc::CLONE_NEWCGROUP
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET
        | libc::CLONE_PARENT
        | libc::CLONE_FILES
        | libc::CLONE_FS
        | libc::CLONE_SYSVSEM
        | libc::CLONE_IO) as u64
        | 0x80; // CLONE_NEWTIME
    if flags & !allowed != 0 {
        return Err(Error::bug(format!("clone3 with flags {:#x}", flags & !allowed)));
    }
    let args = CloneArgs {
        flags,
        exit_signal: exit_signal as u64,
        set_tid: if set_tid.is_empty() { 0 } else { set_tid.as_ptr().expose_provenance() as u64 },
        set_tid_size: set_tid.len() as u64,
        ..CloneArgs::default()
    };
    // SAFETY: without CLONE_VM the child has its own copy of the stack; args and set_tid are alive.
    let ret = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
    match ret {
        0 => Ok(Side::Child),
        r if r > 0 => Ok(Side::Parent(RealPid(r as i32))),
        _ => match (errno::last(), set_tid.first()) {
            (libc::EEXIST, Some(tid)) => Err(Error::new(Kind::Host(format!("clone3: pid {tid} is in use")))),
            (e, _) => Err(Error::sys("clone3", e)),
        },
    }
}

/// Forks a process with one thread; its parent gets no signal at the child's end, and waits for it with
/// `__WALL`.
///
/// # Errors
/// If this process has more threads: a fork copies only the calling one, and what the others hold stays held.
pub fn fork_alone() -> Result<Side> {
    let threads = std::fs::read_dir("/proc/self/task").call("open(/proc/self/task)")?.count();
    if threads != 1 {
        return Err(Error::host(format!("this process has {threads} threads")));
    }
    // SAFETY: this process has one thread; without CLONE_VM a null stack means a copy of ours.
    match unsafe { libc::syscall(libc::SYS_clone, 0, 0, 0, 0, 0) } {
        0 => Ok(Side::Child),
        r if r > 0 => Ok(Side::Parent(RealPid(r as i32))),
        _ => Err(Error::sys("clone", errno::last())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sharing_memory_is_refused() {
        // SAFETY: refused before any call.
        let e = unsafe { clone3(libc::CLONE_VM as u64, 0, &[]) }.unwrap_err();
        assert!(matches!(e.kind(), Kind::Bug(_)));
    }

    #[test]
    fn a_taken_pid_is_named() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIP: choosing a pid needs root");
            return;
        }
        let me = std::process::id() as i32;
        // SAFETY: the child, should there be one, leaves at once by _exit.
        match unsafe { clone3(0, libc::SIGCHLD, &[me]) } {
            // SAFETY: _exit is async-signal-safe.
            Ok(Side::Child) => unsafe { libc::_exit(0) },
            Ok(Side::Parent(pid)) => panic!("got pid {pid} though {me} is taken"),
            Err(e) if e.errno() == Some(libc::ENOSYS) => eprintln!("SKIP: no clone3"),
            Err(e) => assert_eq!(e.to_string(), format!("clone3: pid {me} is in use")),
        }
    }
}
