//! Whether bytes of a file can be read without waiting for a disk.
//!
//! # Safety
//! The one byte that is read goes into a local.
#![allow(unsafe_code)]

use std::{fs::File, os::fd::AsRawFd};

use crate::{
    error::{Error, Result},
    sys::errno,
};

/// Whether the byte at `offset` is in the page cache; where that cannot be told (file systems without
/// `RWF_NOWAIT`), or behind the end, it is.
pub fn has(file: &File, offset: u64) -> Result<bool> {
    let mut byte = 0u8;
    let to = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    loop {
        // SAFETY: one buffer of one byte, which outlives the call.
        let n = unsafe {
            libc::preadv2(file.as_raw_fd(), &raw const to, 1, offset.cast_signed(), libc::RWF_NOWAIT)
        };
        return match errno::last() {
            _ if n >= 0 => Ok(true),
            libc::EINTR => continue,
            libc::EAGAIN => Ok(false),
            libc::EOPNOTSUPP | libc::ENOSYS => Ok(true),
            e => Err(Error::sys("preadv2", e)),
        };
    }
}
