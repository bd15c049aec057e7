//! Keyrings of this process (keyrings(7)).
//!
//! # Safety
//! Numbers, and buffers that live longer than the call with their length.
#![allow(unsafe_code)]

use std::ffi::CStr;

use crate::error::{Error, Result};

const GET_KEYRING_ID: u32 = 0;
const JOIN_SESSION_KEYRING: u32 = 1;
const SETPERM: u32 = 5;
const LINK: u32 = 8;
/// `KEY_SPEC_SESSION_KEYRING` and `KEY_SPEC_USER_KEYRING`.
const SESSION: i32 = -3;
const USER: i32 = -4;

fn keyctl(name: &'static str, operation: u32, key: i64, more: u64) -> Result<i64> {
    // SAFETY: numbers only.
    let done = unsafe { libc::syscall(libc::SYS_keyctl, operation, key, more, 0, 0) };
    if done < 0 { Err(Error::io(name, &std::io::Error::last_os_error())) } else { Ok(done) }
}

/// Serial number of the session's keyring; `None` where the kernel has no keys.
pub fn own_session() -> Option<i64> {
    keyctl("keyctl(KEYCTL_GET_KEYRING_ID)", GET_KEYRING_ID, SESSION.into(), 0)
        .ok()
        .filter(|serial| *serial > 0)
}

/// Gives this process a session keyring of its own, empty and without a name; its serial number.
///
/// # Errors
/// EDQUOT if its user has too many keys.
pub fn new_session() -> Result<i64> {
    keyctl("keyctl(KEYCTL_JOIN_SESSION_KEYRING)", JOIN_SESSION_KEYRING, 0, 0)
}

/// Links the keyring of this process's user to its session.
pub fn link_users() -> Result<()> {
    keyctl("keyctl(KEYCTL_LINK)", LINK, USER.into(), i64::from(SESSION).cast_unsigned()).map(drop)
}

/// Sets who may do what with a key.
pub fn set_perm(key: i64, perm: u32) -> Result<()> {
    keyctl("keyctl(KEYCTL_SETPERM)", SETPERM, key, perm.into()).map(drop)
}

/// Adds a key of type user to the session; its serial number.
pub fn add(name: &CStr, payload: &[u8]) -> Result<i64> {
    // SAFETY: two strings, and a buffer with its length.
    let key = unsafe {
        libc::syscall(
            libc::SYS_add_key,
            c"user".as_ptr(),
            name.as_ptr(),
            payload.as_ptr(),
            payload.len(),
            SESSION,
        )
    };
    if key < 0 { Err(Error::io("add_key", &std::io::Error::last_os_error())) } else { Ok(key) }
}
