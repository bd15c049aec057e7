//! User and group ids, groups, capabilities, securebits, no_new_privs; resource limits.
//!
//! # Safety
//!
//! capset(2) and prctl(2) get integers and structures of their size that outlive the call.

use anyhow::{Context, bail};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Gid, Uid, getgroups, getresgid, getresuid, setgroups, setresgid, setresuid};

use crate::kit::{Check, proc_line, rest, same, skip, sys};

const CAP_CHOWN: u32 = 0;
const CAP_NET_BIND_SERVICE: u32 = 10;
const CAP_SYS_PTRACE: u32 = 19;

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

fn prctl(option: i32, argument: u64) -> anyhow::Result<i32> {
    // SAFETY: the options used here take integers.
    sys("prctl", unsafe { libc::prctl(option, argument, 0, 0, 0) })
        .with_context(|| format!("option {option}"))
}

/// `root`: root with a part of its capabilities. `user`: a plain user with groups. `mixed`: different
/// real, effective and saved ids, capabilities kept.
pub fn run(args: &[String]) -> Check {
    if !Uid::effective().is_root() {
        return Err(skip("setting credentials needs root"));
    }
    let bit = |cap: u32| 1u32 << cap;
    let kept = bit(CAP_CHOWN) | bit(CAP_NET_BIND_SERVICE);
    let groups: Vec<Gid> = [4, 100, 3_000_000].map(Gid::from_raw).to_vec();
    setgroups(&groups).context("setgroups")?;
    // Not every capability may be in the bounding set of a container; dropping one is always allowed.
    prctl(libc::PR_CAPBSET_DROP, u64::from(CAP_SYS_PTRACE))?;
    let (uid, gid) = match args.first().map(String::as_str) {
        Some("user") => ([1000; 3], [1000; 3]),
        Some("mixed") => ([1001, 0, 1003], [1001, 1002, 1003]),
        _ => ([0; 3], [0; 3]),
    };
    if args.first().is_some_and(|a| a == "mixed") {
        prctl(libc::PR_SET_SECUREBITS, (libc::SECBIT_KEEP_CAPS | libc::SECBIT_NO_SETUID_FIXUP) as u64)?;
    }
    setresgid(Gid::from_raw(gid[0]), Gid::from_raw(gid[1]), Gid::from_raw(gid[2])).context("setresgid")?;
    setresuid(Uid::from_raw(uid[0]), Uid::from_raw(uid[1]), Uid::from_raw(uid[2])).context("setresuid")?;
    if uid[0] != 1000 {
        let header = CapHeader { version: 0x2008_0522, pid: 0 };
        let caps = CapData { effective: bit(CAP_CHOWN), permitted: kept, inheritable: bit(CAP_CHOWN) };
        let data = [caps, CapData::default()];
        // SAFETY: header and data have the form of the version they name.
        sys("capset", unsafe { libc::syscall(libc::SYS_capset, &header, data.as_ptr()) })?;
        prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE as u64).ok();
    }
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1)?;
    let securebits = prctl(libc::PR_GET_SECUREBITS, 0)?;
    let dumpable = prctl(libc::PR_GET_DUMPABLE, 0)?;
    rest()?;
    let (u, g) = (getresuid().context("getresuid")?, getresgid().context("getresgid")?);
    same("user ids", [u.real, u.effective, u.saved].map(Uid::as_raw), uid)?;
    same("group ids", [g.real, g.effective, g.saved].map(Gid::as_raw), gid)?;
    same("groups", getgroups().context("getgroups")?, groups)?;
    same("securebits", prctl(libc::PR_GET_SECUREBITS, 0)?, securebits)?;
    same("dumpable", prctl(libc::PR_GET_DUMPABLE, 0)?, dumpable)?;
    same("no_new_privs", prctl(libc::PR_GET_NO_NEW_PRIVS, 0)?, 1)?;
    same("CAP_SYS_PTRACE in the bounding set", prctl(libc::PR_CAPBSET_READ, u64::from(CAP_SYS_PTRACE))?, 0)?;
    if uid[0] != 1000 {
        let effective =
            u64::from_str_radix(&proc_line("/proc/self/status", "CapEff")?, 16).context("CapEff")?;
        same("effective capabilities", effective, u64::from(bit(CAP_CHOWN)))?;
    }
    Ok(())
}

/// Resource limits, soft and hard, some lowered.
pub fn limits(_: &[String]) -> Check {
    let lowered = [
        (Resource::RLIMIT_NOFILE, 600),
        (Resource::RLIMIT_CORE, 4 << 20),
        (Resource::RLIMIT_STACK, 6 << 20),
        (Resource::RLIMIT_CPU, 1 << 20),
        (Resource::RLIMIT_FSIZE, 1 << 40),
        (Resource::RLIMIT_SIGPENDING, 500),
    ];
    for (resource, limit) in lowered {
        let (_, hard) = getrlimit(resource).context("getrlimit")?;
        setrlimit(resource, (limit / 2).min(hard), limit.min(hard))
            .with_context(|| format!("{resource:?}"))?;
    }
    let all = || -> anyhow::Result<Vec<_>> { lowered.iter().map(|(r, _)| Ok(getrlimit(*r)?)).collect() };
    let before = all()?;
    rest()?;
    same("limits", all()?, before)?;
    // A limit holds: descriptors above it are refused.
    // SAFETY: integers; the call fails.
    match unsafe { libc::dup2(1, 300) } {
        -1 => Ok(()),
        _ => bail!("descriptor 300 was given although the limit is 300"),
    }
}
