//! Users and groups of the calling thread alone, where libc would change those of all threads.
//!
//! # Safety
//! Numbers only, and an empty list of groups.
#![allow(unsafe_code)]

use std::ptr::null;

use crate::{
    error::{Context, Result, SysContext},
    sys::errno,
};

/// Leaves an id as it is.
const SAME: u32 = u32::MAX;
/// `_LINUX_CAPABILITY_VERSION_3`.
const CAPABILITIES_V3: u32 = 0x2008_0522;

/// Becomes user and group 0 of the user namespace of the calling thread, in no other group.
///
/// Where the user namespace denies setgroups(2), its groups stay, as those of all who live there.
///
/// # Errors
/// EINVAL if 0 is not mapped there; EPERM without CAP_SETUID and CAP_SETGID.
pub fn become_root() -> Result<()> {
    drop_groups()?;
    // SAFETY: numbers only.
    errno::check(unsafe { libc::syscall(libc::SYS_setresgid, 0, 0, 0) }, "setresgid")?;
    // SAFETY: numbers only.
    errno::check(unsafe { libc::syscall(libc::SYS_setresuid, 0, 0, 0) }, "setresuid").map(drop)
}

/// Becomes user `uid` and group `gid` of the user namespace of the calling thread, in no other group, with all
/// capabilities that it has there.
///
/// # Errors
/// EINVAL for an id without a mapping; EPERM without CAP_SETUID and CAP_SETGID.
pub fn become_user(uid: u32, gid: u32) -> Result<()> {
    drop_groups()?;
    // SAFETY: numbers only.
    errno::check(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) }, "setresgid")?;
    // Who stops being root loses them else.
    nix::sys::prctl::set_keepcaps(true).call("prctl(PR_SET_KEEPCAPS)")?;
    // SAFETY: numbers only.
    errno::check(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) }, "setresuid")?;
    nix::sys::prctl::set_keepcaps(false).call("prctl(PR_SET_KEEPCAPS)")?;
    raise_capabilities()
}

/// Leaves all groups but the own one, where the user namespace allows that.
fn drop_groups() -> Result<()> {
    // SAFETY: the list is empty.
    match errno::check(unsafe { libc::syscall(libc::SYS_setgroups, 0usize, null::<u32>()) }, "setgroups") {
        Err(e) if e.errno() == Some(libc::EPERM) => log::debug!("Groups stay: {e}"),
        other => drop(other?),
    }
    Ok(())
}

/// Does `act` with `uid` and `gid` as the effective ids of the calling thread, as what it makes is to be theirs.
///
/// Another user has no effective capabilities. Afterwards the thread has all its permitted ones in effect again if
/// it is root, and the process can be looked at through /proc as before.
///
/// # Errors
/// EPERM without CAP_SETUID and CAP_SETGID; EINVAL for an id without a mapping; what `act` returns.
pub fn acting_as<T>(uid: u32, gid: u32, act: impl FnOnce() -> Result<T>) -> Result<T> {
    let (own_uid, own_gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
    if (uid, gid) == (own_uid, own_gid) {
        return act();
    }
    // The kernel takes it away with a change of ids.
    let dumpable = nix::sys::prctl::get_dumpable().call("prctl(PR_GET_DUMPABLE)")?;
    let become_other = || effective(SAME, gid).and_then(|()| effective(uid, SAME));
    let done = become_other().and_then(|()| act());
    let back = effective(own_uid, SAME).and_then(|()| effective(SAME, own_gid)).and_then(|()| {
        // The rarer third state is not for a program to set.
        if dumpable { nix::sys::prctl::set_dumpable(true).call("prctl(PR_SET_DUMPABLE)") } else { Ok(()) }
    });
    let done = done?;
    back.during(|| format!("back from user {uid}"))?;
    Ok(done)
}

/// As [`acting_as`], with all permitted capabilities in effect: only what the kernel notes of the one who acts is
/// somebody else's.
pub fn acting_with_rights<T>(uid: u32, gid: u32, act: impl FnOnce() -> Result<T>) -> Result<T> {
    acting_as(uid, gid, || {
        raise_capabilities()?;
        act()
    })
}

/// All permitted capabilities of the calling thread take effect.
fn raise_capabilities() -> Result<()> {
    let mut header = [CAPABILITIES_V3, 0];
    let mut sets = [0u32; 6];
    // SAFETY: a header and the two triples of its version.
    let got = unsafe { libc::syscall(libc::SYS_capget, header.as_mut_ptr(), sets.as_mut_ptr()) };
    errno::check(got, "capget")?;
    (sets[0], sets[3]) = (sets[1], sets[4]);
    // SAFETY: the same.
    errno::check(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) }, "capset")
        .map(drop)
}

fn effective(uid: u32, gid: u32) -> Result<()> {
    if uid != SAME {
        // SAFETY: numbers only.
        errno::check(unsafe { libc::syscall(libc::SYS_setresuid, SAME, uid, SAME) }, "setresuid")?;
    }
    if gid != SAME {
        // SAFETY: numbers only.
        errno::check(unsafe { libc::syscall(libc::SYS_setresgid, SAME, gid, SAME) }, "setresgid")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::{getegid, geteuid};

    #[test]
    fn one_thread_acts_as_another_and_comes_back() {
        if !geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let other = std::thread::spawn(|| {
            let seen = acting_as(12, 34, || Ok((geteuid().as_raw(), getegid().as_raw()))).unwrap();
            assert_eq!(seen, (12, 34));
            assert!(acting_as(12, 34, || -> Result<()> { Err(crate::Error::bug("no")) }).is_err());
            assert_eq!((geteuid().as_raw(), getegid().as_raw()), (0, 0));
            assert!(nix::sys::prctl::get_dumpable().unwrap());
        });
        other.join().unwrap();
    }
}
