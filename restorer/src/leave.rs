//! The last instructions of a restore.
//!
//! # Safety
//! Replaces the stack pointer and lets the kernel load every register from the frame there.

use core::arch::asm;

use blobrt::syscall::nr;

/// Uses a tile. Only then has the kernel room for this thread's tile data, and takes them from a frame
/// (Documentation/arch/x86/xstate.rst).
///
/// # Safety
/// The process was given leave to use them (`ARCH_REQ_XCOMP_PERM`); what tiles hold is lost.
pub unsafe fn take_tiles() {
    /// Palette 1, tile 0 with one row of four bytes.
    #[repr(align(64))]
    struct Config([u8; 64]);
    let mut config = Config([0; 64]);
    (config.0[0], config.0[16], config.0[48]) = (1, 4, 1);
    // SAFETY: a configuration that the processor takes; as the caller says.
    unsafe {
        asm!(
            // ldtilecfg [rax]; tilezero tmm0; tilerelease: not every assembler knows them.
            ".byte 0xc4, 0xe2, 0x78, 0x49, 0x00",
            ".byte 0xc4, 0xe2, 0x7b, 0x49, 0xc0",
            ".byte 0xc4, 0xe2, 0x78, 0x49, 0xc0",
            in("rax") config.0.as_ptr(),
            options(nostack),
        )
    }
}

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
