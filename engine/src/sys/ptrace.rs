//! ptrace(2) by thread, in the forms nix lacks.
//!
//! Every request must come from the operating system thread that attached (ptrace(2)), so these are
//! plain functions for use by the one thread that owns the tracees. `ESRCH` means that the thread
//! died (it was attached and stopped, or we would not ask): it becomes [`Kind::TaskDied`].
//!
//! # Safety
//! Each request gets pointers to locals or to slices whose length travels with them; the kernel writes
//! at most that many bytes. Nothing here touches memory of the tracee except by its address.
#![allow(unsafe_code)]

mod settings;
mod signals;

use std::ptr::without_provenance_mut;

pub use settings::{
    RseqConfig, SockFilter, SudConfig, UserDesc, get_rseq_config, get_syscall_user_dispatch, get_thread_area,
    seccomp_get_filter, seccomp_get_metadata, set_syscall_user_dispatch, set_thread_area,
};
pub use signals::{SigInfo, get_siginfo, get_sigmask, peek_siginfo, set_sigmask};

use crate::{
    error::{Error, Kind, Result},
    pstree::RealPid,
    sys::errno,
};

const SEIZE: libc::c_uint = 0x4206;
const INTERRUPT: libc::c_uint = 0x4207;

/// `PTRACE_O_TRACESYSGOOD`: system call stops are told apart from SIGTRAP. Without it the death of the
/// tracer during such a stop would send SIGTRAP to the tracee.
pub const O_TRACESYSGOOD: u64 = 1;
/// `PTRACE_O_TRACEFORK`: a new process of the tracee is traced too.
pub const O_TRACEFORK: u64 = 1 << 1;
/// `PTRACE_O_TRACEVFORK`: likewise for vfork.
pub const O_TRACEVFORK: u64 = 1 << 2;
/// `PTRACE_O_TRACECLONE`: likewise for clone, threads included.
pub const O_TRACECLONE: u64 = 1 << 3;
/// `PTRACE_O_TRACEEXEC`: a stop when the tracee has executed another program.
pub const O_TRACEEXEC: u64 = 1 << 4;
/// `PTRACE_O_TRACEEXIT`: a stop on the way out, while the tracee still has its memory.
pub const O_TRACEEXIT: u64 = 1 << 6;
/// `PTRACE_O_EXITKILL`: should the tracer end, the tracee gets SIGKILL.
pub const O_EXITKILL: u64 = 1 << 20;
/// `PTRACE_O_SUSPEND_SECCOMP`: filters and strict mode sleep while the tracee is traced.
pub const O_SUSPEND_SECCOMP: u64 = 1 << 21;

/// Event of a stop that is neither a signal nor a system call; see `PTRACE_SEIZE` in ptrace(2).
pub const EVENT_STOP: i32 = 128;

/// ELF note type of the general registers.
pub const NT_PRSTATUS: u32 = 1;
/// ELF note type of the x87 and SSE registers.
pub const NT_PRFPREG: u32 = 2;
/// ELF note type of the XSAVE area.
pub const NT_X86_XSTATE: u32 = 0x202;
/// ELF note type of the shadow stack pointer.
pub const NT_X86_SHSTK: u32 = 0x204;

pub(super) fn request(
    name: &'static str,
    request: libc::c_uint,
    tid: RealPid,
    addr: usize,
    data: *mut libc::c_void,
) -> Result<u64> {
    // SAFETY: the callers pass data that is valid for what the request reads or writes.
    let ret = unsafe { libc::ptrace(request, tid.0, without_provenance_mut::<libc::c_void>(addr), data) };
    match errno::check(ret, name) {
        Err(e) if e.errno() == Some(libc::ESRCH) => Err(Error::new(Kind::TaskDied(tid.0))),
        other => other,
    }
}

pub(super) fn plain(name: &'static str, what: libc::c_uint, tid: RealPid, data: usize) -> Result<()> {
    request(name, what, tid, 0, without_provenance_mut(data)).map(drop)
}

/// Attaches without stopping; `options` are `O_*` bits.
///
/// # Errors
/// EPERM for a zombie, a task that is traced already, or one we may not trace; EINVAL when the kernel
/// lacks an option.
pub fn seize(tid: RealPid, options: u64) -> Result<()> {
    plain("ptrace(PTRACE_SEIZE)", SEIZE, tid, options as usize)
}

/// Asks a seized thread to stop; the stop is then to be waited for.
pub fn interrupt(tid: RealPid) -> Result<()> {
    plain("ptrace(PTRACE_INTERRUPT)", INTERRUPT, tid, 0)
}

/// Resumes, delivering `signal` (0 for none; only meaningful in a signal-delivery stop).
pub fn cont(tid: RealPid, signal: i32) -> Result<()> {
    plain("ptrace(PTRACE_CONT)", libc::PTRACE_CONT, tid, signal as usize)
}

/// Resumes until the next entry to or exit from a system call.
pub fn syscall(tid: RealPid, signal: i32) -> Result<()> {
    plain("ptrace(PTRACE_SYSCALL)", libc::PTRACE_SYSCALL, tid, signal as usize)
}

/// Resumes for one instruction.
pub fn single_step(tid: RealPid) -> Result<()> {
    plain("ptrace(PTRACE_SINGLESTEP)", libc::PTRACE_SINGLESTEP, tid, 0)
}

/// Lets go of a stopped thread, delivering `signal` (0 for none).
pub fn detach(tid: RealPid, signal: i32) -> Result<()> {
    plain("ptrace(PTRACE_DETACH)", libc::PTRACE_DETACH, tid, signal as usize)
}

/// Replaces the option bits given to [`seize`].
pub fn set_options(tid: RealPid, options: u64) -> Result<()> {
    plain("ptrace(PTRACE_SETOPTIONS)", libc::PTRACE_SETOPTIONS as libc::c_uint, tid, options as usize)
}

/// Reads a register set into `buf`; gives its length, which the kernel knows.
pub fn get_regset(tid: RealPid, note: u32, buf: &mut [u8]) -> Result<usize> {
    let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    let name = if note == NT_PRSTATUS {
        "ptrace(PTRACE_GETREGSET, NT_PRSTATUS)"
    } else if note == NT_X86_XSTATE {
        "ptrace(PTRACE_GETREGSET, NT_X86_XSTATE)"
    } else {
        "ptrace(PTRACE_GETREGSET)"
    };
    request(name, libc::PTRACE_GETREGSET as libc::c_uint, tid, note as usize, (&raw mut iov).cast())?;
    Ok(iov.iov_len)
}

/// Writes a register set.
pub fn set_regset(tid: RealPid, note: u32, buf: &[u8]) -> Result<()> {
    // The kernel only reads through this pointer in a SETREGSET.
    let mut iov = libc::iovec { iov_base: buf.as_ptr().cast_mut().cast(), iov_len: buf.len() };
    let name = if note == NT_PRSTATUS {
        "ptrace(PTRACE_SETREGSET, NT_PRSTATUS)"
    } else if note == NT_X86_XSTATE {
        "ptrace(PTRACE_SETREGSET, NT_X86_XSTATE)"
    } else {
        "ptrace(PTRACE_SETREGSET)"
    };
    request(name, libc::PTRACE_SETREGSET as libc::c_uint, tid, note as usize, (&raw mut iov).cast()).map(drop)
}

/// Writes one word of the tracee's memory, protected or not.
pub fn poke(tid: RealPid, addr: u64, word: u64) -> Result<()> {
    let data = without_provenance_mut(word as usize);
    request("ptrace(PTRACE_POKEDATA)", libc::PTRACE_POKEDATA as libc::c_uint, tid, addr as usize, data)
        .map(drop)
}
