//! open_by_handle_at(2): a file by what the file system itself calls it.
//!
//! # Safety
//! The handle is a local buffer of the layout the kernel reads, with room for the largest handle there is; a
//! descriptor the kernel returns is new and ours.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::{
    error::{Error, Result},
    sys::errno,
};

/// `MAX_HANDLE_SZ`: bytes of the largest handle.
pub(crate) const MAX: usize = 128;

/// `struct file_handle` with room for the largest.
#[repr(C)]
struct Handle {
    bytes: u32,
    kind: i32,
    data: [u8; MAX],
}

/// Opens the file with `flags`; `mount` is any folder on the file system. Needs CAP_DAC_READ_SEARCH.
///
/// # Errors
/// ESTALE if there is no such file any more; EOPNOTSUPP, ENODEV from file systems without handles.
pub(crate) fn open(mount: BorrowedFd<'_>, kind: i32, data: &[u8], flags: i32) -> Result<OwnedFd> {
    let mut handle = Handle { bytes: data.len() as u32, kind, data: [0; MAX] };
    match handle.data.get_mut(..data.len()) {
        Some(room) => room.copy_from_slice(data),
        None => return Err(Error::image(format!("a file handle of {} bytes", data.len()))),
    }
    let flags = flags | libc::O_CLOEXEC;
    // SAFETY: the handle is a local that holds as many bytes as it says.
    let ret =
        unsafe { libc::syscall(libc::SYS_open_by_handle_at, mount.as_raw_fd(), &raw mut handle, flags) };
    let fd = errno::check(ret, "open_by_handle_at")?;
    // SAFETY: a new descriptor of ours.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
