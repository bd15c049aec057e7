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

use std::ptr::{null_mut, without_provenance_mut};

use crate::{
    error::{Error, Kind, Result},
    pstree::RealPid,
    sys::errno,
};

const SEIZE: libc::c_uint = 0x4206;
const INTERRUPT: libc::c_uint = 0x4207;
const PEEKSIGINFO: libc::c_uint = 0x4209;
const GETSIGMASK: libc::c_uint = 0x420a;
const SETSIGMASK: libc::c_uint = 0x420b;
const SECCOMP_GET_FILTER: libc::c_uint = 0x420c;
const SECCOMP_GET_METADATA: libc::c_uint = 0x420d;
const GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
const SET_SYSCALL_USER_DISPATCH_CONFIG: libc::c_uint = 0x4210;
const GET_SYSCALL_USER_DISPATCH_CONFIG: libc::c_uint = 0x4211;
const GET_THREAD_AREA: libc::c_uint = 25;
const SET_THREAD_AREA: libc::c_uint = 26;

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
