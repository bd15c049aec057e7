//! State that cannot be kept and must be refused: `refused WHAT` has it, and verifies that it came to no harm.
//!
//! # Safety
//!
//! Raw calls with integers, strings and structures of the length that is passed along.

use anyhow::{Context, Result};
use nix::errno::Errno;

use crate::kit::{Check, rest, same, skip, sys, team};

const KEYCTL_GET_KEYRING_ID: i32 = 0;
const KEYCTL_JOIN_SESSION: i32 = 1;
const KEYCTL_UNLINK: i32 = 9;
const OWN: i32 = -1;
const PROCESS: i32 = -2;
const SESSION: i32 = -3;

fn keyctl(operation: i32, a: i64, b: i64) -> Result<i64> {
    // SAFETY: operations used here take integers, or a null name.
    match sys("keyctl", unsafe { libc::syscall(libc::SYS_keyctl, operation, a, b) }) {
        Err(e) if e.downcast_ref() == Some(&Errno::ENOSYS) => Err(skip("the kernel has no keys")),
        other => other,
    }
}

/// A key in a keyring, which is made if need be; in that of the session one that nobody can read.
fn add_key(keyring: i32) -> Result<i64> {
    let (kind, name) = if keyring == SESSION { (c"logon", c"of:a secret") } else { (c"user", c"a secret") };
    // SAFETY: strings, and content of the length given.
    let key = unsafe {
        libc::syscall(libc::SYS_add_key, kind.as_ptr(), name.as_ptr(), c"abc".as_ptr(), 3, keyring)
    };
    match sys("add_key", key) {
        Err(e) if e.downcast_ref() == Some(&Errno::ENOSYS) => Err(skip("the kernel has no keys")),
        other => other,
    }
}

fn key(keyring: i32) -> Check {
    let key = add_key(keyring)?;
    let ring = keyctl(KEYCTL_GET_KEYRING_ID, keyring.into(), 0)?;
    rest()?;
    same("keyring", keyctl(KEYCTL_GET_KEYRING_ID, keyring.into(), 0)?, ring)?;
    keyctl(KEYCTL_UNLINK, key, ring).context("the key").map(drop)
}

/// Restricts the calling thread: files must not be executed any more.
fn landlock() -> Check {
    const EXECUTE: u64 = 1;
    let attribute = [EXECUTE];
    // SAFETY: an attribute of the size given.
    let ruleset = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, attribute.as_ptr(), 8, 0) };
    let ruleset = match sys("landlock_create_ruleset", ruleset) {
        Err(e) if matches!(e.downcast_ref(), Some(Errno::ENOSYS | Errno::EOPNOTSUPP)) => {
            return Err(skip("the kernel has no Landlock"));
        }
        other => other?,
    };
    // SAFETY: integers only.
    unsafe {
        sys("prctl", libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        sys("landlock_restrict_self", libc::syscall(libc::SYS_landlock_restrict_self, ruleset, 0))?;
        sys("close", libc::close(ruleset as i32)).map(drop)
    }
}

fn become_user() -> Check {
    if !nix::unistd::Uid::effective().is_root() {
        return Err(skip("becoming another user needs root"));
    }
    nix::unistd::setgroups(&[]).context("setgroups")?;
    let (uid, gid) = (nix::unistd::Uid::from_raw(1000), nix::unistd::Gid::from_raw(1000));
    nix::unistd::setresgid(gid, gid, gid).context("setresgid")?;
    nix::unistd::setresuid(uid, uid, uid).context("setresuid")
}

/// See the module.
pub fn run(args: &[String]) -> Check {
    match args.first().map_or("", String::as_str) {
        "thread-key" => key(OWN),
        "process-key" => key(PROCESS),
        "session-key" => {
            keyctl(KEYCTL_JOIN_SESSION, 0, 0)?;
            key(SESSION)
        }
        // Nothing is lost with it: this one is not refused.
        "empty-session" => {
            keyctl(KEYCTL_JOIN_SESSION, 0, 0)?;
            rest()
        }
        "landlock-root" => landlock().and_then(|()| rest()),
        "landlock-user" => {
            become_user()?;
            landlock()?;
            rest()
        }
        "landlock-thread" => team::run(2, |i| if i == 2 { landlock() } else { Ok(()) }, |_, ()| Ok(())),
        "ports" => {
            // SAFETY: integers only; nothing is written to the port.
            match sys("ioperm", unsafe { libc::ioperm(0x80, 1, 1) }) {
                Err(e) => return Err(skip(format!("no ports can be had here: {e:#}"))),
                Ok(_) => rest()?,
            }
            Ok(())
        }
        "segments" => {
            // struct user_desc: entry 0, base 0, limit 0xfffff, 32 bit, pages, usable.
            let desc: [u32; 4] = [0, 0, 0xf_ffff, 1 | 1 << 4 | 1 << 6];
            // SAFETY: one descriptor.
            match sys("modify_ldt", unsafe { libc::syscall(libc::SYS_modify_ldt, 1, desc.as_ptr(), 16) }) {
                Err(e) => return Err(skip(format!("no local segments can be had here: {e:#}"))),
                Ok(_) => rest()?,
            }
            Ok(())
        }
        other => Err(skip(format!("refused has no {other:?}"))),
    }
}
