//! Settings of the whole address space: merging, locking, write or execute.
//!
//! # Safety
//!
//! Raw calls with integers, and with ranges this program mapped and keeps to its end.

use anyhow::{Result, bail};
use nix::errno::Errno;

use crate::kit::mem::{self, Mapping, PAGE};
use crate::kit::{Check, rest, same, skip, sys};

/// Codes of the `VmFlags:` line of the mapping that `at` lies in.
pub fn vm_flags(at: usize) -> Result<Vec<String>> {
    let smaps = std::fs::read_to_string("/proc/self/smaps")?;
    let mut inside = false;
    for line in smaps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:").filter(|_| inside) {
            return Ok(flags.split_whitespace().map(str::to_string).collect());
        }
        let range = line.split_once(' ').and_then(|(range, _)| range.split_once('-'));
        if let Some((start, end)) = range
            && let (Ok(start), Ok(end)) = (usize::from_str_radix(start, 16), usize::from_str_radix(end, 16))
        {
            inside = (start..end).contains(&at);
        }
    }
    bail!("nothing is mapped at {at:#x}")
}

pub fn has(at: usize, flag: &str) -> Result<bool> {
    Ok(vm_flags(at)?.iter().any(|f| f == flag))
}

fn prctl(option: i32, value: u64) -> Result<i32> {
    // SAFETY: options used here take integers.
    sys("prctl", unsafe { libc::prctl(option, value, 0u64, 0u64, 0u64) })
}

fn advise(memory: Mapping, advice: i32) -> Check {
    // SAFETY: a range of ours.
    sys("madvise", unsafe { libc::madvise(memory.at as *mut libc::c_void, memory.len, advice) }).map(drop)
}

/// Pages of the whole process may be merged, but for a range that does not want it; and with `range`, only
/// those of one range.
pub fn merging(args: &[String]) -> Check {
    const PR_SET_MEMORY_MERGE: i32 = 67;
    const PR_GET_MEMORY_MERGE: i32 = 68;
    let range = args.first().is_some_and(|a| a == "range");
    // Mappings of other protection lie between, so that the kernel does not join them.
    let all = mem::anon(12 * PAGE)?;
    let (some, other) = (all.pages(0, 4), all.pages(8, 4));
    // SAFETY: a range of ours.
    sys("mprotect", unsafe { libc::mprotect((all.at + 4 * PAGE) as *mut _, 4 * PAGE, libc::PROT_NONE) })?;
    some.fill(1);
    other.fill(2);
    let set = if range {
        let e = advise(some, libc::MADV_MERGEABLE);
        e.map(|()| 0)
    } else {
        prctl(PR_SET_MEMORY_MERGE, 1)
    };
    match set {
        Err(e) if matches!(e.downcast_ref(), Some(Errno::EINVAL | Errno::EPERM)) => {
            return Err(skip(format!("pages cannot be merged here: {e:#}")));
        }
        other => other?,
    };
    if !range {
        advise(other, libc::MADV_UNMERGEABLE)?;
    }
    let state = || -> Result<_> {
        let merge = prctl(PR_GET_MEMORY_MERGE, 0).unwrap_or(-1);
        Ok((merge, has(some.at, "mg")?, has(other.at, "mg")?))
    };
    let before = state()?;
    same("as set", (before.1, before.2), (true, false))?;
    rest()?;
    some.check("mergeable memory", 1)?;
    other.check("other memory", 2)?;
    same("merging of the process, of one range, of the other", state()?, before)?;
    let new = mem::anon(PAGE)?;
    new.fill(3);
    same("merging of new memory", has(new.at, "mg")?, !range)
}

/// Memory that is mapped from now on is locked; with `onfault`, when it is touched.
pub fn locking(args: &[String]) -> Check {
    let on_fault = args.first().is_some_and(|a| a == "onfault");
    let old = mem::anon(3 * PAGE)?;
    old.fill(1);
    let flags = libc::MCL_FUTURE | if on_fault { libc::MCL_ONFAULT } else { 0 };
    // SAFETY: integers only.
    sys("mlockall", unsafe { libc::mlockall(flags) })?;
    let later =
        mem::map(5 * PAGE, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS, None)?;
    later.fill(2);
    let state = || -> Result<_> { Ok((has(old.at, "lo")?, has(later.at, "lo")?, has(later.at, "lf")?)) };
    same("as set", state()?, (false, true, on_fault))?;
    rest()?;
    old.check("memory", 1)?;
    later.check("locked memory", 2)?;
    same("locks of old and later memory", state()?, (false, true, on_fault))?;
    let new = mem::anon(7 * PAGE)?;
    let expected = if on_fault { (true, true) } else { (true, false) };
    same("locks of new memory", (has(new.at, "lo")?, has(new.at, "lf")?), expected)
}

/// No memory becomes executable any more.
pub fn write_or_execute(args: &[String]) -> Check {
    const PR_SET_MDWE: i32 = 65;
    const PR_GET_MDWE: i32 = 66;
    let bits = if args.first().is_some_and(|a| a == "no-inherit") { 3 } else { 1 };
    match prctl(PR_SET_MDWE, bits) {
        Err(e) if e.downcast_ref() == Some(&Errno::EINVAL) => {
            return Err(skip("the kernel has no PR_SET_MDWE"));
        }
        other => other?,
    };
    let memory = mem::anon(PAGE)?;
    memory.fill(1);
    rest()?;
    memory.check("memory", 1)?;
    same("PR_GET_MDWE", prctl(PR_GET_MDWE, 0)? as u64, bits)?;
    let executable = libc::PROT_READ | libc::PROT_EXEC;
    // SAFETY: a page of ours, to which nothing jumps.
    let refused = sys("mprotect", unsafe { libc::mprotect(memory.at as *mut _, PAGE, executable) });
    match refused {
        Err(e) if e.downcast_ref() == Some(&Errno::EACCES) => Ok(()),
        other => bail!("making memory executable gave {other:?}"),
    }
}
