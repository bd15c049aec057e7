//! From a libc return value to a [`Result`] with the name of the call.

use std::borrow::Cow;

use crate::error::{Error, Result};

/// The calling thread's errno, right after a failed libc call.
pub fn last() -> i32 {
    nix::errno::Errno::last_raw()
}

/// `ret` unless it is negative; then an error that names `call`.
pub fn check(ret: libc::c_long, call: impl Into<Cow<'static, str>>) -> Result<u64> {
    u64::try_from(ret).map_err(|_| Error::sys(call, last()))
}
