//! fork(2) of a process with one thread.
//!
//! # Safety
//! The child of a process with several threads may find locks held by threads that it has not got: there must be
//! one thread only, which is checked.
#![allow(unsafe_code)]

use nix::unistd::ForkResult;

use crate::{
    error::{Result, SysContext},
    pstree::RealPid,
    restore::fork::check_single_threaded,
    sys::clone3::Side,
};

/// Forks. The child must end by [`leave`](crate::restore::fork::leave) or by returning all the way.
///
/// # Errors
/// There are other threads.
pub fn fork() -> Result<Side> {
    check_single_threaded()?;
    // SAFETY: this is the only thread.
    match unsafe { nix::unistd::fork() }.call("fork")? {
        ForkResult::Parent { child } => Ok(Side::Parent(RealPid(child.as_raw()))),
        ForkResult::Child => Ok(Side::Child),
    }
}
