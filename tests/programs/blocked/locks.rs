//! Threads that wait for a lock on a file.
//!
//! # Safety
//!
//! flock(2) takes no memory.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};

use anyhow::Context;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use super::{caller, raw, returned, still_in};
use crate::kit::{Check, rest, write};

fn open(name: &str) -> anyhow::Result<File> {
    File::options().read(true).write(true).open(name).context("open")
}

fn lock(kind: i32) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: 0, l_start: 0, l_len: 0, l_pid: 0 }
}

fn flock(file: impl AsFd, how: i32) -> Result<(), Errno> {
    // SAFETY: no memory is involved.
    raw(unsafe { libc::flock(file.as_fd().as_raw_fd(), how) }.into())
}

/// flock, and fcntl for a lock of the open file.
pub fn run(_: &[String]) -> Check {
    write("flock", b"")?;
    write("ofd", b"")?;
    let (held, wanted) = (open("flock")?, open("flock")?);
    let (ofd_held, ofd_wanted) = (open("ofd")?, open("ofd")?);
    flock(&held, libc::LOCK_EX).context("flock")?;
    fcntl(&ofd_held, FcntlArg::F_OFD_SETLK(&lock(libc::F_WRLCK))).context("F_OFD_SETLK")?;
    let callers = vec![
        caller("flock", move || flock(&wanted, libc::LOCK_EX))?,
        caller("F_OFD_SETLKW", move || {
            fcntl(&ofd_wanted, FcntlArg::F_OFD_SETLKW(&lock(libc::F_WRLCK))).map(drop)
        })?,
    ];
    rest()?;
    still_in(&callers)?;
    flock(&held, libc::LOCK_UN).context("flock")?;
    fcntl(&ofd_held, FcntlArg::F_OFD_SETLK(&lock(libc::F_UNLCK))).context("F_OFD_SETLK")?;
    returned(callers)
}
