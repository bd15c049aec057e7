//! The calling thread's own registers.
//!
//! # Safety
//! Reads one word that every thread of a libc has.
#![allow(unsafe_code)]

/// Address of the thread control block, which FS points to.
pub fn thread_pointer() -> u64 {
    let pointer: u64;
    // SAFETY: the x86_64 ABI has the block's own address in its first word.
    unsafe { std::arch::asm!("mov {}, fs:0", out(reg) pointer, options(nostack, readonly, preserves_flags)) };
    pointer
}
