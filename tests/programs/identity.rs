//! Names, places and small settings of a task: the harness compares them in /proc; here it is checked that
//! they still work.
//!
//! # Safety
//!
//! The calls made raw take integers only.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::Context;
use nix::sys::prctl;
use nix::sys::stat::{Mode, umask};

use crate::kit::{Check, rest, same, sys, write};

/// With `chroot`, the task's root is a folder of the scratch folder.
pub fn run(args: &[String]) -> Check {
    fs::create_dir_all("root/deep/below").context("mkdir")?;
    if args.iter().any(|a| a == "chroot") {
        nix::unistd::chroot("root").context("chroot")?;
        nix::unistd::chdir("/deep/below").context("chdir")?;
    } else {
        nix::unistd::chdir("root/deep/below").context("chdir")?;
    }
    umask(Mode::from_bits_truncate(0o153));
    prctl::set_name(c"a name (odd) 1").context("PR_SET_NAME")?;
    // SAFETY: integers only.
    sys("setpriority", unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 7) })?;
    prctl::set_timerslack(123_456).context("PR_SET_TIMERSLACK")?;
    let cwd = std::env::current_dir().context("getcwd")?;
    rest()?;
    same("cwd", std::env::current_dir().context("getcwd")?, cwd)?;
    write("new", b"made after")?;
    let mode = fs::metadata("new").context("stat")?.permissions().mode() & 0o777;
    same("mode of a new file under the umask", mode, 0o666 & !0o153)
}

/// The execution domain.
pub fn personality(_: &[String]) -> Check {
    // SAFETY: integers only.
    sys("personality", unsafe { libc::personality(libc::ADDR_NO_RANDOMIZE as libc::c_ulong) })?;
    rest()?;
    // SAFETY: 0xffffffff only asks.
    let personality = sys("personality", unsafe { libc::personality(0xffff_ffff) })?;
    same("personality", personality, libc::ADDR_NO_RANDOMIZE)
}
