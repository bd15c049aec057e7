//! A copy of the process that only holds its memory, as it is at this moment.
//!
//! The process forks a go-between that shares its memory (vfork), which forks the copy and ends: the copy is then
//! nobody's child here, and its end is seen by whoever adopts orphans, not by the process. It closes its
//! descriptors and sleeps; it never runs code of the program.
//!
//! # Safety
//! Everything between the forks is one piece of assembly that uses registers only: the go-between runs on the
//! stack of the caller, who waits for it. All signals are blocked by the engine before it enters the blob, and the
//! copy inherits that.

use core::arch::asm;

use blobrt::syscall::{Errno, Result, nr, syscall4};

/// Shares memory, files and folders; the caller sleeps until it has ended.
const GO_BETWEEN: u64 = 0x100 | 0x200 | 0x400 | 0x4000;
const WCLONE: usize = 0x8000_0000;
/// Seconds after which a copy that nobody has taken ends by itself.
const ALONE: u64 = 30;

/// Makes the copy; its pid in the process's pid namespace.
///
/// # Errors
/// What fork(2) gives: EAGAIN (RLIMIT_NPROC, a limit of a control group), ENOMEM.
///
/// # Safety
/// Only inside the blob: all signals are blocked, and no other thread of the process runs.
pub unsafe fn make() -> Result<u64> {
    let nap: [u64; 2] = [ALONE, 0];
    let mut copy: i64 = 0;
    let between: i64;
    // SAFETY: see the header. The go-between writes `copy`, the copy reads its own `nap`; both end here.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 3f",
            // The go-between.
            "mov eax, {clone}",
            "xor edi, edi",
            "xor esi, esi",
            "xor edx, edx",
            "xor r10d, r10d",
            "xor r8d, r8d",
            "syscall",
            "test rax, rax",
            "jz 2f",
            "mov [r12], rax",
            "xor edi, edi",
            "mov eax, {exit}",
            "syscall",
            "ud2",
            // The copy: descriptors first, others may wait for their end.
            "2:",
            "mov eax, {close_range}",
            "xor edi, edi",
            "mov esi, -1",
            "xor edx, edx",
            "syscall",
            "mov eax, {nanosleep}",
            "mov rdi, r13",
            "xor esi, esi",
            "syscall",
            "mov eax, {exit_group}",
            "xor edi, edi",
            "syscall",
            "ud2",
            "3:",
            clone = const nr::CLONE,
            exit = const nr::EXIT,
            close_range = const nr::CLOSE_RANGE,
            nanosleep = const nr::NANOSLEEP,
            exit_group = const nr::EXIT_GROUP,
            inlateout("rax") nr::CLONE as i64 => between,
            inlateout("rdi") GO_BETWEEN => _,
            inlateout("rsi") 0u64 => _,
            inlateout("rdx") 0u64 => _,
            inlateout("r10") 0u64 => _,
            inlateout("r8") 0u64 => _,
            in("r12") &raw mut copy,
            in("r13") &raw const nap,
            out("rcx") _,
            out("r11") _,
        );
    }
    if between < 0 {
        return Err(Errno(-between as i32));
    }
    // SAFETY: no addresses are passed.
    unsafe { syscall4(nr::WAIT4, between as usize, 0, WCLONE, 0) }?;
    if copy <= 0 { Err(Errno(-copy as i32)) } else { Ok(copy as u64) }
}
