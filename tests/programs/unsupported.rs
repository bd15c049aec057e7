//! Resources that no dump can keep: `unsupported WHAT` holds one, so that the refusal can be looked at, and
//! verifies that it came to no harm.
//!
//! # Safety
//!
//! Each system call gets zeroed structures of the kernel's size; results are kept until the end.

use std::os::fd::{FromRawFd, OwnedFd};

use anyhow::Context;

use crate::kit::mem::{self, PAGE};
use crate::kit::{Check, rest, skip, sys};

/// A new descriptor from a raw call; a kernel that lacks or forbids the call skips the case.
fn descriptor(what: &str, result: i64) -> anyhow::Result<OwnedFd> {
    if result < 0 {
        let e = nix::errno::Errno::last();
        return Err(skip(format!("{what} cannot be made here: {e}")));
    }
    // SAFETY: a descriptor that was made just now.
    Ok(unsafe { OwnedFd::from_raw_fd(result as i32) })
}

fn make(what: &str) -> anyhow::Result<OwnedFd> {
    // perf_event_attr has 120 bytes, a landlock attribute 8.
    let mut zeroed = [0u64; 32];
    match what {
        "perf_event" => {
            // A software clock of this task, in the layout of the attribute's first version (64 bytes).
            zeroed[0] = 1 | 64 << 32;
            let at = zeroed.as_ptr();
            // SAFETY: an attribute of the size it states.
            descriptor(what, unsafe { libc::syscall(libc::SYS_perf_event_open, at, 0, -1, -1, 0) })
        }
        "userfaultfd" => {
            // SAFETY: flags only.
            descriptor(what, unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | 1) })
        }
        "landlock" => {
            zeroed[0] = 1;
            let at = zeroed.as_ptr();
            // SAFETY: an attribute of the size given.
            descriptor(what, unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, at, 8, 0) })
        }
        // SAFETY: integers only.
        "alg" => descriptor(what, unsafe { libc::socket(libc::AF_ALG, libc::SOCK_SEQPACKET, 0) }.into()),
        // SAFETY: integers only.
        "vsock" => descriptor(what, unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0) }.into()),
        other => Err(skip(format!("unsupported has no {other:?}"))),
    }
}

/// See the module.
pub fn run(args: &[String]) -> Check {
    let what = args.first().map_or("", String::as_str);
    let memory = mem::anon(4 * PAGE)?;
    memory.fill(1);
    let held = make(what)?;
    rest()?;
    memory.check("memory", 1)?;
    // SAFETY: an integer; asks for flags.
    let flags = unsafe { libc::fcntl(std::os::fd::AsRawFd::as_raw_fd(&held), libc::F_GETFD) };
    sys("fcntl", flags).context("the descriptor that cannot be dumped").map(drop)
}
