//! Counters in memory that tasks made by fork share with the engine.
//!
//! # Safety
//! The mapping is anonymous, page aligned and zeroed, lives as long as the value, and is only ever seen as
//! `AtomicU32`, for which every bit pattern is valid and access from several processes is defined.
#![allow(unsafe_code)]

use std::{ops::Deref, ptr::NonNull, sync::atomic::AtomicU32};

use crate::error::{Error, Result};

/// Zeroed words shared across fork.
#[derive(Debug)]
pub(crate) struct SharedWords {
    at: NonNull<AtomicU32>,
    len: usize,
}

// SAFETY: atomics may be used from any thread; the mapping is not tied to one.
unsafe impl Send for SharedWords {}
// SAFETY: as above.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// `len` words, all 0.
    ///
    /// # Errors
    /// ENOMEM.
    pub(crate) fn new(len: usize) -> Result<Self> {
        let bytes = len.max(1).checked_mul(4).ok_or_else(|| Error::sys("mmap", libc::ENOMEM))?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        match NonNull::new(at.cast()) {
            Some(at) if at.as_ptr() != libc::MAP_FAILED.cast() => Ok(SharedWords { at, len }),
            _ => Err(Error::io("mmap", &std::io::Error::last_os_error())),
        }
    }
}

impl Deref for SharedWords {
    type Target = [AtomicU32];

    fn deref(&self) -> &[AtomicU32] {
        // SAFETY: the mapping holds `len` words and lives as long as self.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), self.len) }
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length; nobody can hold a reference past self.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.len.max(1) * 4) };
    }
}
