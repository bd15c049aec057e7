//! Attributes that prctl(2) reads and sets for the calling thread or process, and NUMA policies.
//!
//! # Safety
//! Options that take numbers only; where addresses are passed they are of locals and slices that outlive the
//! call, or ranges whose contents the call does not touch.
#![allow(unsafe_code)]

use crate::{
    error::Result,
    sys::{errno, map::Region},
};

const PR_SET_MEMORY_MERGE: i32 = 67;
const PR_SET_VMA: i32 = 0x5356_4d41;
const PR_SET_VMA_ANON_NAME: libc::c_ulong = 0;

/// An option of prctl(2) that answers by its result, with one argument.
fn get(option: i32, argument: u64, call: &'static str) -> Result<u64> {
    // SAFETY: options used here take numbers.
    let ret = unsafe { libc::prctl(option, argument as libc::c_ulong, 0, 0, 0) };
    errno::check(ret.into(), call)
}

/// `PR_GET_TIMERSLACK`, in nanoseconds.
pub fn timer_slack() -> Result<u64> {
    // The answer may not fit the int of libc's wrapper.
    // SAFETY: numbers only.
    let ret = unsafe { libc::syscall(libc::SYS_prctl, libc::PR_GET_TIMERSLACK, 0, 0, 0, 0) };
    errno::check(ret, "prctl(PR_GET_TIMERSLACK)")
}

/// `PR_MCE_KILL_GET`.
pub fn mce_kill() -> Result<u64> {
    get(libc::PR_MCE_KILL_GET, 0, "prctl(PR_MCE_KILL_GET)")
}

/// `PR_GET_SPECULATION_CTRL` of this kind.
///
/// # Errors
/// EINVAL or ENODEV where kernel or processor do not know the kind.
pub fn speculation(which: u32) -> Result<u64> {
    get(libc::PR_GET_SPECULATION_CTRL, which.into(), "prctl(PR_GET_SPECULATION_CTRL)")
}

/// `PR_SET_MEMORY_MERGE` (Linux 6.4).
pub fn set_memory_merge(on: bool) -> Result<()> {
    get(PR_SET_MEMORY_MERGE, on.into(), "prctl(PR_SET_MEMORY_MERGE)").map(drop)
}

/// `PR_SET_VMA_ANON_NAME` on a whole region (Linux 5.17 with `CONFIG_ANON_VMA_NAME`).
///
/// # Errors
/// EINVAL where the kernel has no such names, or for a name it does not take.
pub fn name_mapping(region: &Region, name: &std::ffi::CStr) -> Result<()> {
    // SAFETY: the name outlives the call; memory is not touched.
    let ret = unsafe {
        libc::prctl(
            PR_SET_VMA,
            PR_SET_VMA_ANON_NAME,
            region.start() as libc::c_ulong,
            region.len() as libc::c_ulong,
            name.as_ptr(),
        )
    };
    errno::check(ret.into(), "prctl(PR_SET_VMA_ANON_NAME)").map(drop)
}

/// Whether the kernel has mseal(2) (Linux 6.10).
pub fn can_seal() -> bool {
    const MSEAL: libc::c_long = 462;
    // SAFETY: seals nothing.
    unsafe { libc::syscall(MSEAL, 0, 0, 0) == 0 }
}

/// Whether memory protection keys can be had, pkeys(7). Of this process one more must be free.
pub fn has_protection_keys() -> bool {
    // SAFETY: only integers; the key is for nothing.
    unsafe {
        let key = libc::syscall(libc::SYS_pkey_alloc, 0, 0);
        key > 0 && libc::syscall(libc::SYS_pkey_free, key) == 0
    }
}

/// A set of nodes as the kernel takes it: whole words, and their number of bits plus one, of which it takes one
/// off again.
fn node_words(nodes: &[u8]) -> (Vec<u64>, libc::c_ulong) {
    let mut words: Vec<u64> = Vec::with_capacity(nodes.len().div_ceil(8));
    for chunk in nodes.chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        words.push(u64::from_le_bytes(word));
    }
    let bits = words.len() as libc::c_ulong * 64 + 1;
    (words, bits)
}

/// Sets the calling thread's memory policy, `set_mempolicy(2)`.
pub fn set_memory_policy(mode: u32, nodes: &[u8]) -> Result<()> {
    let (words, bits) = node_words(nodes);
    let at = if words.is_empty() { std::ptr::null() } else { words.as_ptr() };
    // SAFETY: the set is as long as stated.
    let ret = unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, at, bits) };
    errno::check(ret, "set_mempolicy").map(drop)
}

/// Sets the policy of a region, `mbind(2)`. Pages that are there stay where they are.
pub fn set_region_policy(region: &Region, mode: u32, nodes: &[u8]) -> Result<()> {
    let (words, bits) = node_words(nodes);
    let at = if words.is_empty() { std::ptr::null() } else { words.as_ptr() };
    let (start, len) = (region.start(), region.len());
    // SAFETY: the set is as long as stated; contents of the range are not touched.
    let ret = unsafe { libc::syscall(libc::SYS_mbind, start, len, mode, at, bits, 0) };
    errno::check(ret, "mbind").map(drop)
}
