//! A process of our own that lives on when we end.
//!
//! # Safety
//! Between fork and exit the child runs ordinary code. That is sound in a process of one thread; with more, the
//! C library makes its allocator usable in the child, and the callers' code takes no lock of ours.
#![allow(unsafe_code)]

use nix::{
    sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
    unistd::setsid,
};

use crate::{
    error::{Error, Result},
    sys::errno,
};

/// Runs `body` in a grandchild in a session of its own, which nobody needs to wait for; ends it with the
/// number that `body` gives. Signals have their default actions there.
pub(crate) fn spawn(body: impl FnOnce() -> i32) -> Result<()> {
    // SAFETY: see the module; the child ends by _exit.
    let child = errno::check(unsafe { libc::fork() }.into(), "fork")? as i32;
    if child == 0 {
        let _ = setsid();
        // SAFETY: as above.
        let code = match unsafe { libc::fork() } {
            0 => {
                default_signals();
                body()
            }
            -1 => errno::last(),
            _ => 0,
        };
        // SAFETY: ends this process at once; nothing of the parent's is run.
        unsafe { libc::_exit(code) }
    }
    let mut status = 0;
    loop {
        // SAFETY: our own child; status is a local.
        let ret = unsafe { libc::waitpid(child, &raw mut status, 0) };
        match errno::check(ret.into(), "waitpid") {
            Err(e) if e.errno() == Some(libc::EINTR) => {}
            other => break other.map(drop)?,
        }
    }
    match libc::WEXITSTATUS(status) {
        0 => Ok(()),
        e => Err(Error::sys("fork", e)),
    }
}

fn default_signals() {
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: no handler is installed.
        let _ = unsafe { sigaction(signal, &default) };
    }
}
