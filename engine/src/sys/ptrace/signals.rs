//! The signals of a tracee: which are blocked, which are pending, and which one it is stopped for.
//!
//! # Safety
//! The kernel writes at most as many bytes as the local mask, structure or array has: the size is part of the
//! request, or goes with it.

use super::request;
use crate::{error::Result, pstree::RealPid};

const PEEKSIGINFO: libc::c_uint = 0x4209;
const GETSIGMASK: libc::c_uint = 0x420a;
const SETSIGMASK: libc::c_uint = 0x420b;

/// Blocked signals, bit n - 1 for signal n.
pub fn get_sigmask(tid: RealPid) -> Result<u64> {
    let mut mask = 0u64;
    request("ptrace(PTRACE_GETSIGMASK)", GETSIGMASK, tid, size_of::<u64>(), (&raw mut mask).cast())?;
    Ok(mask)
}

/// Sets the blocked signals; the kernel leaves out SIGKILL and SIGSTOP.
pub fn set_sigmask(tid: RealPid, mask: u64) -> Result<()> {
    let mut mask = mask;
    request("ptrace(PTRACE_SETSIGMASK)", SETSIGMASK, tid, size_of::<u64>(), (&raw mut mask).cast()).map(drop)
}

/// A `siginfo_t` as the kernel keeps it, byte for byte.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct SigInfo(pub [u8; 128]);

impl SigInfo {
    fn word(&self, at: usize) -> i32 {
        let mut w = [0; 4];
        w.copy_from_slice(&self.0[at..at + 4]);
        i32::from_ne_bytes(w)
    }
    /// Signal number.
    pub fn signo(&self) -> i32 {
        self.word(0)
    }
    /// Where it came from; positive from the kernel, see sigaction(2).
    pub fn code(&self) -> i32 {
        self.word(8)
    }
    /// Sender, for signals that have one, as the receiver's pid namespace numbers it.
    pub fn pid(&self) -> i32 {
        self.word(16)
    }
    /// Fault address, for the signals of a fault.
    pub fn addr(&self) -> u64 {
        let mut w = [0; 8];
        w.copy_from_slice(&self.0[16..24]);
        u64::from_ne_bytes(w)
    }
}

impl std::fmt::Debug for SigInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SigInfo {{ signo: {}, code: {}, pid: {} }}", self.signo(), self.code(), self.pid())
    }
}

/// The signal a thread is stopped for. EINVAL in stops that have none (a group stop).
pub fn get_siginfo(tid: RealPid) -> Result<SigInfo> {
    let mut info = SigInfo([0; 128]);
    request(
        "ptrace(PTRACE_GETSIGINFO)",
        libc::PTRACE_GETSIGINFO as libc::c_uint,
        tid,
        0,
        (&raw mut info).cast(),
    )?;
    Ok(info)
}

/// Pending signals with their information, oldest first: those of the thread, or with `shared` those
/// of its process. A signal that was queued without information (queue limit) is not listed.
pub fn peek_siginfo(tid: RealPid, shared: bool) -> Result<Vec<SigInfo>> {
    #[repr(C)]
    struct Args {
        off: u64,
        flags: u32,
        nr: i32,
    }
    const CHUNK: usize = 32;
    let mut all = Vec::new();
    loop {
        let mut args = Args { off: all.len() as u64, flags: shared.into(), nr: CHUNK as i32 };
        let mut chunk = [SigInfo([0; 128]); CHUNK];
        // The address argument points to the description, data to room for `nr` entries.
        let got = request(
            "ptrace(PTRACE_PEEKSIGINFO)",
            PEEKSIGINFO,
            tid,
            (&raw mut args).expose_provenance(),
            chunk.as_mut_ptr().cast(),
        )? as usize;
        all.extend_from_slice(&chunk[..got.min(CHUNK)]);
        if got < CHUNK {
            return Ok(all);
        }
    }
}
