//! What a thread has asked of the kernel, or been given by it, that can be read from outside only by its tracer:
//! restartable sequences, seccomp filters, the dispatch of system calls, segments for thread-local storage.
//!
//! # Safety
//! The kernel writes at most as many bytes as the local structure has, whose size is fixed or travels with the
//! request; a filter is as long as the kernel has just said.

use std::ptr::null_mut;

use super::request;
use crate::{
    error::{Error, Result},
    pstree::RealPid,
};

const SECCOMP_GET_FILTER: libc::c_uint = 0x420c;
const SECCOMP_GET_METADATA: libc::c_uint = 0x420d;
const GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
const SET_SYSCALL_USER_DISPATCH_CONFIG: libc::c_uint = 0x4210;
const GET_SYSCALL_USER_DISPATCH_CONFIG: libc::c_uint = 0x4211;
const GET_THREAD_AREA: libc::c_uint = 25;
const SET_THREAD_AREA: libc::c_uint = 26;

/// A thread's registration for restartable sequences.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct RseqConfig {
    /// Address of its `struct rseq`; 0 when not registered.
    pub pointer: u64,
    /// Length it was registered with.
    pub size: u32,
    /// Signature that precedes abort handlers.
    pub signature: u32,
    /// Flags of the registration.
    pub flags: u32,
    pad: u32,
}

impl RseqConfig {
    /// A registration found by other means than [`get_rseq_config`].
    pub fn new(pointer: u64, size: u32, signature: u32) -> Self {
        RseqConfig { pointer, size, signature, flags: 0, pad: 0 }
    }
}

/// The thread's rseq registration (Linux 5.13).
pub fn get_rseq_config(tid: RealPid) -> Result<RseqConfig> {
    let mut conf = RseqConfig::default();
    request(
        "ptrace(PTRACE_GET_RSEQ_CONFIGURATION)",
        GET_RSEQ_CONFIGURATION,
        tid,
        size_of::<RseqConfig>(),
        (&raw mut conf).cast(),
    )?;
    Ok(conf)
}

/// One instruction of a classic BPF program, as in `struct sock_filter`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct SockFilter {
    /// Operation.
    pub code: u16,
    /// Jump if true.
    pub jt: u8,
    /// Jump if false.
    pub jf: u8,
    /// Operand.
    pub k: u32,
}

/// The thread's seccomp filter number `index`, 0 being the one installed first; `None` past the last.
///
/// # Errors
/// EINVAL for a thread that has no filters; EACCES without CAP_SYS_ADMIN or under a filter of our own.
pub fn seccomp_get_filter(tid: RealPid, index: u64) -> Result<Option<Vec<SockFilter>>> {
    let name = "ptrace(PTRACE_SECCOMP_GET_FILTER)";
    let count = match request(name, SECCOMP_GET_FILTER, tid, index as usize, null_mut()) {
        Ok(count) => count as usize,
        Err(e) if e.errno() == Some(libc::ENOENT) => return Ok(None),
        Err(e) => return Err(e),
    };
    // The kernel bounds programs at BPF_MAXINSNS.
    if count > 4096 {
        return Err(Error::bug(format!("seccomp filter of {count} instructions")));
    }
    let mut filter = vec![SockFilter::default(); count];
    let got = request(name, SECCOMP_GET_FILTER, tid, index as usize, filter.as_mut_ptr().cast())? as usize;
    filter.truncate(got);
    Ok(Some(filter))
}

/// `SECCOMP_FILTER_FLAG_*` bits of filter number `index` that the kernel reports (Linux 4.16).
pub fn seccomp_get_metadata(tid: RealPid, index: u64) -> Result<u64> {
    #[repr(C)]
    struct Metadata {
        filter_off: u64,
        flags: u64,
    }
    let mut data = Metadata { filter_off: index, flags: 0 };
    request(
        "ptrace(PTRACE_SECCOMP_GET_METADATA)",
        SECCOMP_GET_METADATA,
        tid,
        size_of::<Metadata>(),
        (&raw mut data).cast(),
    )?;
    Ok(data.flags)
}

/// Syscall user dispatch of a thread (prctl(PR_SET_SYSCALL_USER_DISPATCH)).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct SudConfig {
    /// 0 off, 1 on.
    pub mode: u64,
    /// Address of the selector byte, or 0.
    pub selector: u64,
    /// Start of the code that may make system calls.
    pub offset: u64,
    /// Its length.
    pub len: u64,
}

/// Reads syscall user dispatch (Linux 6.4; EIO before).
pub fn get_syscall_user_dispatch(tid: RealPid) -> Result<SudConfig> {
    let mut conf = SudConfig::default();
    request(
        "ptrace(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG)",
        GET_SYSCALL_USER_DISPATCH_CONFIG,
        tid,
        size_of::<SudConfig>(),
        (&raw mut conf).cast(),
    )?;
    Ok(conf)
}

/// Sets syscall user dispatch (Linux 6.4).
pub fn set_syscall_user_dispatch(tid: RealPid, conf: &SudConfig) -> Result<()> {
    let mut conf = *conf;
    request(
        "ptrace(PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG)",
        SET_SYSCALL_USER_DISPATCH_CONFIG,
        tid,
        size_of::<SudConfig>(),
        (&raw mut conf).cast(),
    )
    .map(drop)
}

/// A segment descriptor for thread-local storage, as set_thread_area(2) has it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct UserDesc {
    /// Index in the descriptor table (12, 13 or 14 on x86_64).
    pub entry_number: u32,
    /// Start.
    pub base_addr: u32,
    /// Limit.
    pub limit: u32,
    /// seg_32bit, contents (2 bits), read_exec_only, limit_in_pages, seg_not_present, useable, from bit 0.
    pub flags: u32,
}

/// Reads TLS descriptor `entry_number` of a thread. EIO where the kernel runs no 32-bit programs.
pub fn get_thread_area(tid: RealPid, entry_number: u32) -> Result<UserDesc> {
    let mut desc = UserDesc::default();
    request(
        "ptrace(PTRACE_GET_THREAD_AREA)",
        GET_THREAD_AREA,
        tid,
        entry_number as usize,
        (&raw mut desc).cast(),
    )?;
    Ok(desc)
}

/// Sets TLS descriptor `desc.entry_number` of a thread.
pub fn set_thread_area(tid: RealPid, desc: &UserDesc) -> Result<()> {
    let mut desc = *desc;
    let entry = desc.entry_number as usize;
    request("ptrace(PTRACE_SET_THREAD_AREA)", SET_THREAD_AREA, tid, entry, (&raw mut desc).cast()).map(drop)
}

const _: () = {
    assert!(size_of::<RseqConfig>() == 24);
    assert!(size_of::<SockFilter>() == 8);
    assert!(size_of::<SudConfig>() == 32);
    assert!(size_of::<UserDesc>() == 16);
};
