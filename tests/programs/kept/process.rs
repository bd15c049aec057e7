//! Settings of a whole process: core dumps, personality, huge pages, an ignored SIGTRAP.
//!
//! # Safety
//!
//! Raw calls with integers only.

use std::fs;

use anyhow::Context;
use nix::errno::Errno;
use nix::sys::signal::{SigHandler, SigSet, Signal, signal};

use crate::kit::{Check, proc_line, rest, same, skip, sys};

/// Which mappings a core dump holds.
pub fn coredump_filter(_: &[String]) -> Check {
    let path = "/proc/self/coredump_filter";
    fs::write(path, "0x1ab").context(path)?;
    rest()?;
    same("coredump_filter", fs::read_to_string(path).context(path)?.trim(), "000001ab")
}

/// A personality whose number has letters among its digits.
pub fn personality(_: &[String]) -> Check {
    const BITS: u64 = libc::ADDR_NO_RANDOMIZE as u64
        | libc::SHORT_INODE as u64
        | libc::WHOLE_SECONDS as u64
        | libc::STICKY_TIMEOUTS as u64
        | 0x0800_0000;
    // SAFETY: integers only.
    sys("personality", unsafe { libc::personality(BITS) })?;
    rest()?;
    // SAFETY: 0xffffffff only asks.
    let now = sys("personality", unsafe { libc::personality(0xffff_ffff) })?;
    same("personality", now as u64, BITS)
}

/// Transparent huge pages off, but for ranges that ask for them.
pub fn huge_pages(_: &[String]) -> Check {
    const EXCEPT_ADVISED: u64 = 2;
    // SAFETY: integers only.
    let set = unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1u64, EXCEPT_ADVISED, 0u64, 0u64) };
    match sys("prctl", set) {
        Err(e) if e.downcast_ref() == Some(&Errno::EINVAL) => {
            return Err(skip("the kernel has no PR_THP_DISABLE_EXCEPT_ADVISED"));
        }
        other => other?,
    };
    // SAFETY: integers only.
    let get = || unsafe { libc::prctl(libc::PR_GET_THP_DISABLE, 0, 0, 0, 0) };
    same("as set", get(), 3)?;
    rest()?;
    same("PR_GET_THP_DISABLE", get(), 3)
}

/// SIGTRAP ignored, and blocked as well: a single step of a debugger would reset it.
pub fn ignored_trap(_: &[String]) -> Check {
    // SAFETY: no handler.
    unsafe { signal(Signal::SIGTRAP, SigHandler::SigIgn) }.context("signal")?;
    let mut trap = SigSet::empty();
    trap.add(Signal::SIGTRAP);
    trap.thread_block().context("sigprocmask")?;
    rest()?;
    let bit = 1 << (libc::SIGTRAP - 1);
    for line in ["SigIgn", "SigBlk"] {
        let mask = u64::from_str_radix(&proc_line("/proc/self/status", line)?, 16).context("mask")?;
        same(line, mask & bit, bit)?;
    }
    // It does not end us.
    nix::sys::signal::raise(Signal::SIGTRAP).context("raise")?;
    trap.thread_unblock().context("sigprocmask")
}
