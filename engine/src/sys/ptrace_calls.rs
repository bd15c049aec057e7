//! Following the system calls of a tracee: which one it is about to make, with what arguments.
//!
//! # Safety
//! The kernel writes at most as many bytes as the local structure has, whose size travels with the request.
#![allow(unsafe_code)]

use super::ptrace::{plain, request};
use crate::{error::Result, pstree::RealPid};

const LISTEN: libc::c_uint = 0x4208;
const GET_SYSCALL_INFO: libc::c_uint = 0x420e;
/// `AUDIT_ARCH_X86_64`.
const X86_64: u32 = 0xc000_003e;
const OP_ENTRY: u8 = 1;

/// A system call that is about to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry {
    /// Its number; `None` for a call of another kind of code (32-bit, x32).
    pub nr: Option<u64>,
    /// Its arguments.
    pub args: [u64; 6],
}

#[repr(C)]
#[derive(Default)]
struct Info {
    op: u8,
    flags: [u8; 3],
    arch: u32,
    ip: u64,
    sp: u64,
    nr: u64,
    args: [u64; 6],
    rest: u64,
}
const _: () = assert!(size_of::<Info>() == 88);

/// What a thread in a stop for a system call is about to do; `None` on the way out of a call (Linux 5.3).
pub fn entry(tid: RealPid) -> Result<Option<Entry>> {
    let mut info = Info::default();
    let name = "ptrace(PTRACE_GET_SYSCALL_INFO)";
    request(name, GET_SYSCALL_INFO, tid, size_of::<Info>(), (&raw mut info).cast())?;
    // Numbers of x32 have this bit.
    let known = info.arch == X86_64 && info.nr & 0x4000_0000 == 0;
    Ok((info.op == OP_ENTRY).then_some(Entry { nr: known.then_some(info.nr), args: info.args }))
}

/// Lets a thread in a stop of job control stay stopped for everybody else, and tells when that ends.
pub fn listen(tid: RealPid) -> Result<()> {
    plain("ptrace(PTRACE_LISTEN)", LISTEN, tid, 0)
}

/// The number that belongs to an event: the new thread, or the exit code.
pub fn event_message(tid: RealPid) -> Result<u64> {
    let mut message: libc::c_ulong = 0;
    let name = "ptrace(PTRACE_GETEVENTMSG)";
    let what = libc::PTRACE_GETEVENTMSG as libc::c_uint;
    request(name, what, tid, 0, (&raw mut message).cast()).map(|_| message)
}
