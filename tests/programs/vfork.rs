//! A parent that waits in vfork(2) for a child that does not exec: it cannot be stopped where it is.
//!
//! # Safety
//!
//! clone(2) with CLONE_VFORK but without CLONE_VM: the child has memory of its own, the parent waits until it
//! ends by _exit(2).

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::Context;
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;

use crate::kit::crew::wait;
use crate::kit::{Check, same, sys, tell_ready, wait_term};

/// See the module. The verdict's signal goes to the parent, which cannot take it before the child ends, so
/// the child watches for it.
pub fn run(_: &[String]) -> Check {
    // Opened once: who looks at the child from outside always finds the same descriptors.
    let status = File::open(format!("/proc/{}/status", Pid::this())).context("status")?;
    // SAFETY: see the module; syscall instead of vfork() because Rust must not know that it returns twice.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_VFORK | libc::SIGCHLD, 0, 0, 0, 0) };
    if sys("clone", pid)? == 0 {
        tell_ready()?;
        // The parent has its SIGTERM pending once it is asked: /proc tells.
        let mut text = [0; 8192];
        loop {
            let read = status.read_at(&mut text, 0).unwrap_or(0);
            let pending = String::from_utf8_lossy(&text[..read]);
            let bits = pending.lines().find_map(|l| l.strip_prefix("ShdPnd:")).unwrap_or("").trim();
            if u64::from_str_radix(bits, 16).is_ok_and(|b| b & 1 << 14 != 0) {
                // SAFETY: ends the process.
                unsafe { libc::_exit(3) }
            }
            std::thread::yield_now();
        }
    }
    let child = Pid::from_raw(pid as i32);
    same("status of the child", wait(child).context("waitpid")?, WaitStatus::Exited(child, 3))?;
    wait_term()
}
