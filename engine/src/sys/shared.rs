//! Counters in memory that tasks made by fork share with the engine; shared anonymous memory as a file.
//!
//! # Safety
//! The mapping is anonymous, page aligned and zeroed, lives as long as the value, and is only ever seen as
//! `AtomicU32`, for which every bit pattern is valid and access from several processes is defined.
#![allow(unsafe_code)]

use std::{
    fs::{File, OpenOptions},
    ops::Deref,
    os::unix::fs::OpenOptionsExt,
    ptr::NonNull,
    sync::atomic::AtomicU32,
};

use crate::error::{Error, Result, SysContext};

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
        Ok(SharedWords { at: map(bytes)?.cast(), len })
    }
}

/// Maps shared anonymous memory at an address of the kernel's choice.
fn map(bytes: usize) -> Result<NonNull<u8>> {
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
        Some(at) if at.as_ptr() != libc::MAP_FAILED.cast() => Ok(at),
        _ => Err(Error::io("mmap", &std::io::Error::last_os_error())),
    }
}

/// New shared anonymous memory of `bytes` bytes (whole pages) as a file, open for reading and writing. Mapped,
/// it is called `/dev/zero (deleted)`, as after mmap(2) with `MAP_SHARED | MAP_ANONYMOUS`.
///
/// # Errors
/// ENOMEM; EPERM without CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE (proc_pid_map_files(5)).
pub(crate) fn anonymous_file(bytes: usize) -> Result<File> {
    let at = map(bytes)?;
    let start = at.as_ptr() as usize;
    let path = format!("/proc/self/map_files/{start:x}-{:x}", start + bytes);
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(&path);
    // SAFETY: mapped above with this length, and nobody has its address.
    unsafe { libc::munmap(at.as_ptr().cast(), bytes) };
    file.call("open(/proc/self/map_files)")
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
