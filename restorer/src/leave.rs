//! The last instruction of a restore.
//!
//! # Safety
//! Replaces the stack pointer and lets the kernel load every register from the frame there.

use core::arch::asm;

use blobrt::syscall::nr;

/// Leaves through the signal frame at `frame`, whose first word is the return address slot.
///
/// # Safety
/// A complete frame of this thread is at `frame`, and its alternate stack, mask and registers are
/// valid for the address space as it is now.
pub unsafe fn sigreturn(frame: u64) -> ! {
    // SAFETY: the kernel takes everything from the frame; nothing of ours is used afterwards.
    unsafe {
        asm!(
            "mov rsp, {frame}",
            "syscall",
            "ud2",
            frame = in(reg) frame + 8,
            in("rax") nr::RT_SIGRETURN,
            options(noreturn),
        )
    }
}
