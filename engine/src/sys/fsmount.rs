//! fsopen(2), fsconfig(2), fsmount(2): a mounted file system that stands nowhere and goes with its descriptor.
//!
//! # Safety
//! Every pointer is to a C string or a local that outlives its call; what the kernel returns is a new descriptor.
#![allow(unsafe_code)]

use std::{
    ffi::CString,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use crate::{
    error::{Error, Result},
    sys::errno,
};

const FSOPEN_CLOEXEC: u32 = 1;
const FSMOUNT_CLOEXEC: u32 = 1;
const FSCONFIG_SET_FLAG: u32 = 0;
const FSCONFIG_SET_STRING: u32 = 1;
const FSCONFIG_CMD_CREATE: u32 = 6;

/// One parameter of a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parameter<'a> {
    /// Is set or not.
    Flag(&'a str),
    /// Has a value.
    Value(&'a str, &'a str),
}

/// Mounts a file system of `kind` without a place; the descriptor is its root folder.
///
/// # Errors
/// ENOSYS before Linux 5.2; EPERM without CAP_SYS_ADMIN; whatever the file system finds wrong.
pub fn detached(kind: &str, parameters: &[Parameter<'_>]) -> Result<OwnedFd> {
    let kind_c = text(kind)?;
    // SAFETY: the string lives until the call is over.
    let fs = unsafe { libc::syscall(libc::SYS_fsopen, kind_c.as_ptr(), FSOPEN_CLOEXEC) };
    let fs = descriptor("fsopen", fs)?;
    for parameter in parameters {
        let (key, value) = match parameter {
            Parameter::Flag(key) => (text(key)?, None),
            Parameter::Value(key, value) => (text(key)?, Some(text(value)?)),
        };
        config(
            &fs,
            if value.is_some() { FSCONFIG_SET_STRING } else { FSCONFIG_SET_FLAG },
            Some(&key),
            value.as_ref(),
        )?;
    }
    config(&fs, FSCONFIG_CMD_CREATE, None, None)?;
    // SAFETY: numbers only.
    let mount = unsafe { libc::syscall(libc::SYS_fsmount, fs.as_raw_fd(), FSMOUNT_CLOEXEC, 0) };
    descriptor("fsmount", mount)
}

fn text(s: &str) -> Result<CString> {
    CString::new(s).map_err(|_| Error::usage("a mount parameter contains a zero byte"))
}

fn config(fs: &OwnedFd, command: u32, key: Option<&CString>, value: Option<&CString>) -> Result<()> {
    let pointer = |s: Option<&CString>| s.map_or(std::ptr::null(), |s| s.as_ptr());
    // SAFETY: both strings live until the call is over; null where the command takes none.
    let r = unsafe {
        libc::syscall(libc::SYS_fsconfig, fs.as_raw_fd(), command, pointer(key), pointer(value), 0)
    };
    if r < 0 { Err(Error::sys("fsconfig", errno::last())) } else { Ok(()) }
}

fn descriptor(call: &'static str, r: libc::c_long) -> Result<OwnedFd> {
    match i32::try_from(r) {
        // SAFETY: the kernel has just made it for us.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(Error::sys(call, errno::last())),
    }
}
