//! Probes about signals and tracing, on a child made for them.
//!
//! # Safety
//! As in the parent module; ptrace goes to our own stopped child only.
#![allow(unsafe_code)]

use super::{answer, must};
use crate::error::{Error, Result};

/// Runs `probe` on a child that `prepare` was run in and that is then stopped and traced by us.
fn traced(prepare: impl FnOnce() -> bool, probe: impl FnOnce(i32) -> Result<bool>) -> Result<bool> {
    // SAFETY: the child prepares itself by plain system calls and stops.
    let pid = must("fork", i64::from(unsafe { libc::fork() }))? as i32;
    if pid == 0 {
        // SAFETY: plain calls in the child.
        unsafe {
            if libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) != 0 || !prepare() {
                libc::_exit(1);
            }
            libc::raise(libc::SIGSTOP);
            libc::_exit(0)
        }
    }
    let result = stopped(pid).and_then(|signal| match signal {
        Some(libc::SIGSTOP) => probe(pid),
        _ => Err(Error::host("the probe's child did not stop")),
    });
    // SAFETY: our own child, not yet waited for.
    unsafe {
        libc::kill(pid, libc::SIGKILL);
        libc::waitpid(pid, std::ptr::null_mut(), libc::__WALL);
    }
    result
}

/// Waits for the child; the signal that stopped it, or none if it ended.
fn stopped(pid: i32) -> Result<Option<i32>> {
    let mut status = 0;
    // SAFETY: status is a local.
    must("waitpid", i64::from(unsafe { libc::waitpid(pid, &mut status, libc::__WALL) }))?;
    Ok(libc::WIFSTOPPED(status).then(|| libc::WSTOPSIG(status)))
}

/// Pending signals and the blocked mask can be read.
pub(crate) fn peek_signals() -> Result<bool> {
    traced(
        || true,
        |pid| {
            // struct ptrace_peeksiginfo_args { u64 off; u32 flags; s32 nr; }
            let args = [0u64, 1 << 32];
            let mut info = [0u8; 128];
            // SAFETY: one siginfo of 128 bytes at most is written.
            let r = unsafe { libc::ptrace(libc::PTRACE_PEEKSIGINFO, pid, args.as_ptr(), info.as_mut_ptr()) };
            if !answer("ptrace(PEEKSIGINFO)", r, &[libc::EIO, libc::EINVAL])? {
                return Ok(false);
            }
            let mut mask = 0u64;
            // SAFETY: the kernel writes eight bytes.
            let r = unsafe { libc::ptrace(libc::PTRACE_GETSIGMASK, pid, 8, &mut mask) };
            answer("ptrace(GETSIGMASK)", r, &[libc::EIO, libc::EINVAL])
        },
    )
}

pub(crate) fn suspend_seccomp() -> Result<bool> {
    traced(
        || true,
        |pid| {
            // SAFETY: no pointers.
            let r = unsafe { libc::ptrace(libc::PTRACE_SETOPTIONS, pid, 0, libc::PTRACE_O_SUSPEND_SECCOMP) };
            answer("ptrace(PTRACE_O_SUSPEND_SECCOMP)", r, &[libc::EINVAL])
        },
    )
}

/// Filters of seccomp can be read back.
pub(crate) fn seccomp_filters() -> Result<bool> {
    const PTRACE_SECCOMP_GET_FILTER: u32 = 0x420c;
    traced(
        || {
            // One instruction: allow everything.
            let mut filter = libc::sock_filter { code: 6, jt: 0, jf: 0, k: 0x7fff_0000 };
            let program = libc::sock_fprog { len: 1, filter: &mut filter };
            // SAFETY: the kernel copies the program.
            unsafe {
                libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                    && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) == 0
            }
        },
        |pid| {
            // SAFETY: a null buffer: the kernel answers with the length.
            let r = unsafe { libc::ptrace(PTRACE_SECCOMP_GET_FILTER, pid, 0, std::ptr::null_mut::<u8>()) };
            answer("ptrace(SECCOMP_GET_FILTER)", r, &[libc::EIO, libc::EINVAL])
        },
    )
}

/// A signal with any si_code can be sent to oneself.
pub(crate) fn queue_siginfo() -> Result<bool> {
    super::in_child(|| {
        // struct siginfo: signo, errno, code
        let mut info = [0i32; 32];
        info[0] = libc::SIGUSR1;
        info[2] = 1;
        // SAFETY: 128 bytes, read by the kernel.
        unsafe {
            libc::signal(libc::SIGUSR1, libc::SIG_IGN);
            let r = libc::syscall(libc::SYS_rt_sigqueueinfo, libc::getpid(), libc::SIGUSR1, info.as_ptr());
            answer("rt_sigqueueinfo", r, &[libc::EPERM])
        }
    })
}

/// A child of our parent can be the first of a new pid namespace.
pub(crate) fn clone_parent_with_pid_ns() -> Result<bool> {
    super::in_child(|| {
        let flags = libc::CLONE_NEWPID | libc::CLONE_PARENT | libc::SIGCHLD;
        // SAFETY: no stack is given: the child goes on as after fork, and ends.
        let r = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
        if r == 0 {
            // SAFETY: ends the child.
            unsafe { libc::_exit(0) };
        }
        answer("clone(CLONE_PARENT|CLONE_NEWPID)", r, &[libc::EINVAL])
    })
}

/// A hardware breakpoint stops a task: some virtual machines do not have them.
#[cfg(target_arch = "x86_64")]
pub(crate) fn breakpoints() -> Result<bool> {
    use nix::libc::user;
    let debugreg = |n: usize| std::mem::offset_of!(user, u_debugreg) + n * 8;
    traced(
        || true,
        |pid| {
            // Stops when the child returns to user space at its present instruction.
            // SAFETY: reads one word of the child's registers.
            let rip = unsafe {
                libc::ptrace(
                    libc::PTRACE_PEEKUSER,
                    pid,
                    std::mem::offset_of!(user, regs) + std::mem::offset_of!(libc::user_regs_struct, rip),
                    0,
                )
            };
            // Bit 0 of register 7 switches breakpoint 0 on, for execution.
            for (n, value) in [(0, rip as u64), (7, 1)] {
                // SAFETY: writes one debug register of the child.
                let r = unsafe { libc::ptrace(libc::PTRACE_POKEUSER, pid, debugreg(n), value) };
                if !answer("ptrace(POKEUSER)", r, &[libc::ENOSPC, libc::EINVAL, libc::EBUSY])? {
                    return Ok(false);
                }
            }
            // SAFETY: no pointers.
            must("ptrace(CONT)", unsafe { libc::ptrace(libc::PTRACE_CONT, pid, 0, 0) })?;
            Ok(stopped(pid)? == Some(libc::SIGTRAP))
        },
    )
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn breakpoints() -> Result<bool> {
    Ok(false)
}
