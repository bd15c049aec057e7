//! Whether the kernel has Landlock (Linux 5.13).
//!
//! # Safety
//! The call only asks for a version.
#![allow(unsafe_code)]

/// Built in and switched on.
pub fn is_enabled() -> bool {
    const VERSION: u32 = 1;
    // SAFETY: no attribute is passed, nothing is made.
    unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0, VERSION) > 0 }
}
