//! sethostname(2) and setdomainname(2), which nix has only one of.
//!
//! # Safety
//! The kernel copies as many bytes as it is told from slices that outlive the call.
#![allow(unsafe_code)]

use std::ffi::OsStr;

use crate::{
    error::{Result, SysContext},
    sys::errno,
};

/// Names the host of the calling thread's UTS namespace.
///
/// # Errors
/// EINVAL for more than 64 bytes; EPERM without CAP_SYS_ADMIN in the namespace.
pub fn set_host(name: &OsStr) -> Result<()> {
    nix::unistd::sethostname(name).call("sethostname")
}

/// Names the domain (NIS) of the calling thread's UTS namespace.
///
/// # Errors
/// EINVAL for more than 64 bytes; EPERM without CAP_SYS_ADMIN in the namespace.
pub fn set_domain(name: &[u8]) -> Result<()> {
    // SAFETY: the slice is as long as said.
    let ret = unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) };
    errno::check(ret.into(), "setdomainname").map(drop)
}
