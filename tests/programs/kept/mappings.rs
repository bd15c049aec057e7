//! What is set for single mappings, and memory policies of threads.
//!
//! # Safety
//!
//! Raw calls with ranges this program mapped and keeps to its end, and with buffers of the length passed along.

use anyhow::{Context, Result, bail};
use nix::errno::Errno;

use super::memory::has;
use crate::kit::mem::{self, Mapping, PAGE};
use crate::kit::{Check, crew, rest, same, skip, sys, team};

const MSEAL: i64 = 462;

/// Sealed ranges: private, shared, of a file, without access, the middle of a mapping.
pub fn seals(_: &[String]) -> Check {
    let seal = |m: Mapping| -> Check {
        // SAFETY: a range of ours that stays.
        match sys("mseal", unsafe { libc::syscall(MSEAL, m.at, m.len, 0) }) {
            Err(e) if matches!(e.downcast_ref(), Some(Errno::ENOSYS)) => Err(skip("the kernel has no mseal")),
            other => other.map(drop),
        }
    };
    let private = mem::anon(9 * PAGE)?;
    private.fill(1);
    seal(private.pages(3, 3))?;
    let shared = mem::shared(2 * PAGE)?;
    shared.fill(2);
    seal(shared)?;
    let none = mem::map(PAGE, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None)?;
    seal(none)?;
    let exe = std::fs::File::open("/proc/self/exe").context("exe")?;
    let file = mem::map(2 * PAGE, libc::PROT_READ, libc::MAP_PRIVATE, Some((&exe, 0)))?;
    seal(file)?;
    let sealed = [private.pages(3, 3), shared, none, file];
    rest()?;
    private.check("private memory", 1)?;
    shared.check("shared memory", 2)?;
    for (i, m) in sealed.iter().enumerate() {
        same(&format!("seal of range {i}"), has(m.at, "sl")?, true)?;
        // SAFETY: refused, or a range of ours that nothing uses any more.
        match sys("munmap", unsafe { libc::munmap(m.at as *mut _, m.len) }) {
            Err(e) if e.downcast_ref() == Some(&Errno::EPERM) => {}
            other => bail!("unmapping sealed range {i} gave {other:?}"),
        }
    }
    same("seal of what lies before", has(private.at, "sl")?, false)?;
    same("seal of what lies behind", has(private.at + 6 * PAGE, "sl")?, false)
}

/// Names of anonymous mappings, private and shared, inherited and changed by a child.
pub fn names(_: &[String]) -> Check {
    const PR_SET_VMA: i32 = 0x5356_4d41;
    let name = |m: Mapping, name: &std::ffi::CStr| -> Check {
        // SAFETY: a range of ours and a string.
        let done = unsafe { libc::prctl(PR_SET_VMA, 0u64, m.at, m.len, name.as_ptr()) };
        match sys("prctl", done) {
            Err(e) if e.downcast_ref() == Some(&Errno::EINVAL) => {
                Err(skip("the kernel has no names of mappings (CONFIG_ANON_VMA_NAME)"))
            }
            other => other.map(drop),
        }
    };
    let all = mem::anon(6 * PAGE)?;
    all.fill(1);
    name(all.pages(0, 2), c"first (odd) name")?;
    name(all.pages(2, 2), c"second")?;
    let shared = mem::shared(PAGE)?;
    name(shared, c"shared one")?;
    let named = || -> Result<Vec<String>> {
        let maps = std::fs::read_to_string("/proc/self/maps").context("maps")?;
        Ok(maps.lines().filter_map(|l| Some(l.split_once("[anon")?.1.to_string())).collect())
    };
    let before = named()?;
    same("number of names", before.len() >= 3, true)?;
    rest()?;
    all.check("memory", 1)?;
    same("names of mappings", named()?, before)
}

/// Locked when touched, beside locked at once.
pub fn lock_on_fault(_: &[String]) -> Check {
    let all = mem::anon(30 * PAGE)?;
    let (late, now) = (all.pages(0, 10), all.pages(20, 10));
    // SAFETY: ranges of ours.
    unsafe {
        sys("mlock2", libc::mlock2(late.at as *const _, late.len, libc::MLOCK_ONFAULT))?;
        sys("mlock", libc::mlock(now.at as *const _, now.len))?;
    }
    late.pages(2, 3).fill(1);
    now.fill(2);
    let state = || -> Result<_> {
        let pair = |m: Mapping| Ok::<_, anyhow::Error>((has(m.at, "lo")?, has(m.at, "lf")?));
        let resident = mem_resident(late)?;
        Ok((pair(late)?, pair(now)?, resident))
    };
    let before = state()?;
    same("as set", before, ((true, true), (true, false), 3))?;
    rest()?;
    let after = state()?;
    late.pages(2, 3).check("memory locked on fault", 1)?;
    now.check("locked memory", 2)?;
    same("locks, and pages that are there", after, before)
}

fn mem_resident(m: Mapping) -> Result<usize> {
    let mut pages = vec![0u8; m.len / PAGE];
    // SAFETY: one byte for each page.
    sys("mincore", unsafe { libc::mincore(m.at as *mut _, m.len, pages.as_mut_ptr()) })?;
    Ok(pages.iter().filter(|page| **page & 1 != 0).count())
}

/// `MPOL_*`.
const PREFERRED: i32 = 1;
const BIND: i32 = 2;
const INTERLEAVE: i32 = 3;
const LOCAL: i32 = 4;
const STATIC: i32 = 0x8000;

/// The policy of the thread, or of the mapping at an address: mode and nodes 0 to 63.
fn policy(at: usize) -> Result<(i32, u64)> {
    let (mut mode, mut nodes) = (0i32, [0u64; 16]);
    let flags = if at == 0 { 0 } else { 2 };
    // SAFETY: a set of 1024 bits and one int.
    sys("get_mempolicy", unsafe {
        libc::syscall(libc::SYS_get_mempolicy, &raw mut mode, nodes.as_mut_ptr(), 1024, at, flags)
    })?;
    Ok((mode, nodes[0]))
}

fn without_numa(e: anyhow::Error) -> anyhow::Error {
    match e.downcast_ref() {
        Some(Errno::ENOSYS) => skip("the kernel has no NUMA policies"),
        _ => e,
    }
}

/// Policies of threads: bound, interleaved, preferred, local, none.
pub fn thread_policies(_: &[String]) -> Check {
    fn set(i: usize) -> Result<(i32, u64)> {
        let (mode, nodes) = [(BIND | STATIC, 1u64), (INTERLEAVE, 1), (PREFERRED, 1), (LOCAL, 0), (0, 0)][i];
        // SAFETY: a set of 64 bits.
        sys("set_mempolicy", unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, &raw const nodes, 65) })
            .map_err(without_numa)?;
        policy(0)
    }
    team::run(4, set, |_, was| same("memory policy", policy(0)?, was))
}

/// Policies of mappings, in a tree in which the child has changed what it inherited.
pub fn range_policies(_: &[String]) -> Check {
    let bind = |m: Mapping, mode: i32, nodes: u64| -> Check {
        // SAFETY: a range of ours and a set of 64 bits.
        sys("mbind", unsafe { libc::syscall(libc::SYS_mbind, m.at, m.len, mode, &raw const nodes, 65, 0) })
            .map_err(without_numa)
            .map(drop)
    };
    let private = mem::anon(8 * PAGE)?;
    private.fill(1);
    let untouched = mem::anon(8 * PAGE)?;
    let shared = mem::shared(4 * PAGE)?;
    shared.fill(2);
    bind(private.pages(2, 2), BIND, 1)?;
    bind(untouched, INTERLEAVE, 1)?;
    bind(shared, PREFERRED, 1)?;
    let child = crew::member(move || {
        bind(private.pages(2, 2), 0, 0)?;
        bind(untouched, BIND | STATIC, 1)?;
        let state = || -> Result<_> { Ok((policy(private.at + 2 * PAGE)?, policy(untouched.at)?)) };
        let before = state()?;
        same("as set in the child", before.0, (0, 0))?;
        rest()?;
        same("policies of the child", state()?, before)
    })?;
    let state = || -> Result<Vec<(i32, u64)>> {
        [private.at, private.at + 2 * PAGE, private.at + 4 * PAGE, untouched.at, shared.at]
            .iter()
            .map(|at| policy(*at))
            .collect()
    };
    let before = state()?;
    same("as set", before[1], (BIND, 1))?;
    rest()?;
    private.check("memory", 1)?;
    shared.check("shared memory", 2)?;
    same("policies of mappings", state()?, before)?;
    child.verify()
}
