//! Keyrings of this process (keyrings(7)).
//!
//! # Safety
//! Numbers only.
#![allow(unsafe_code)]

/// Serial number of the session's keyring; `None` where the kernel has no keys.
pub fn own_session() -> Option<i64> {
    const KEYCTL_GET_KEYRING_ID: i32 = 0;
    const SESSION: i32 = -3;
    // SAFETY: numbers only.
    let serial = unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_GET_KEYRING_ID, SESSION, 0) };
    (serial > 0).then_some(serial)
}
