//! Maps of BPF: a hash that two processes use, an array that is frozen, a map of prefixes.
//!
//! # Safety
//!
//! The kernel is given a union of its size, with addresses of locals that outlive the call.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use anyhow::{Result, bail};
use nix::errno::Errno;

use crate::kit::crew::member;
use crate::kit::{Check, rest, same, skip};

const CREATE: i32 = 0;
const LOOKUP: i32 = 1;
const UPDATE: i32 = 2;
const FREEZE: i32 = 22;

fn bpf(command: i32, words: &[(usize, u64)]) -> nix::Result<i32> {
    let mut attr = [0u64; 16];
    words.iter().for_each(|(at, word)| attr[*at] = *word);
    // SAFETY: a union of ours, of the size told.
    let ret = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_mut_ptr(), size_of_val(&attr)) };
    Errno::result(ret).map(|ret| ret as i32)
}

fn create(kind: u32, key: u32, value: u32, entries: u32, flags: u32) -> Result<OwnedFd> {
    let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    match bpf(CREATE, &[(0, pair(kind, key)), (1, pair(value, entries)), (2, flags.into())]) {
        // SAFETY: a new descriptor of ours.
        Ok(fd) => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        Err(Errno::EPERM | Errno::ENOSYS) => Err(skip("no BPF map can be made")),
        Err(e) => bail!("bpf(BPF_MAP_CREATE): {e}"),
    }
}

fn number(map: BorrowedFd<'_>) -> u64 {
    map.as_raw_fd() as u64
}

fn update(map: BorrowedFd<'_>, key: &[u64], value: u64) -> nix::Result<()> {
    let words = [(0, number(map)), (1, key.as_ptr() as u64), (2, &raw const value as u64)];
    bpf(UPDATE, &words).map(drop)
}

fn lookup(map: BorrowedFd<'_>, key: &[u64]) -> nix::Result<u64> {
    let mut value = 0u64;
    bpf(LOOKUP, &[(0, number(map)), (1, key.as_ptr() as u64), (2, &raw mut value as u64)])?;
    Ok(value)
}

/// A prefix of IPv4: bits that count, and the address.
fn prefix(bits: u32, address: [u8; 4]) -> [u64; 1] {
    [u64::from(bits) | u64::from(u32::from_ne_bytes(address)) << 32]
}

/// See the module.
pub fn run(_: &[String]) -> Check {
    use std::os::fd::AsFd;
    let hash = create(1, 8, 8, 5_000, 0)?;
    for key in 0..4_000 {
        update(hash.as_fd(), &[key * 3], key)?;
    }
    let array = create(2, 4, 8, 16, 0)?;
    update(array.as_fd(), &[5], 55)?;
    bpf(FREEZE, &[(0, number(array.as_fd()))])?;
    // Of prefixes: only what is needed is allocated.
    let prefixes = create(11, 8, 8, 100, 1)?;
    update(prefixes.as_fd(), &prefix(8, [10, 0, 0, 0]), 8)?;
    update(prefixes.as_fd(), &prefix(24, [10, 1, 2, 0]), 24)?;
    let child = member(|| {
        rest()?;
        same("an element, in the child", lookup(hash.as_fd(), &[300]), Ok(100))?;
        update(hash.as_fd(), &[1], 4_711)?;
        Ok(())
    })?;
    rest()?;
    for key in 0..4_000 {
        same("an element", lookup(hash.as_fd(), &[key * 3]), Ok(key))?;
    }
    same("no element", lookup(hash.as_fd(), &[2]), Err(Errno::ENOENT))?;
    same("an element of the array", lookup(array.as_fd(), &[5]), Ok(55))?;
    same("one that was never set", lookup(array.as_fd(), &[6]), Ok(0))?;
    same("a frozen map", update(array.as_fd(), &[5], 1), Err(Errno::EPERM))?;
    same("a longer prefix", lookup(prefixes.as_fd(), &prefix(32, [10, 1, 2, 3])), Ok(24))?;
    same("a shorter prefix", lookup(prefixes.as_fd(), &prefix(32, [10, 9, 9, 9])), Ok(8))?;
    child.verify()?;
    same("what the child has set", lookup(hash.as_fd(), &[1]), Ok(4_711))
}
