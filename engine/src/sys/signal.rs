//! Dispositions and mask of signals of this process.
//!
//! # Safety
//! The one handler only stores into an atomic, which is async-signal-safe; sigset and sigaction live on the
//! stack for the length of the call.
#![allow(unsafe_code)]

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, sigaction, sigprocmask};

use crate::error::{Result, SysContext};

extern "C" fn on_signal(signal: libc::c_int) {
    crate::interrupt::raise(signal);
}

/// See [`crate::process::prepare_signals`].
pub(crate) fn prepare() -> Result<()> {
    let set = |signal, handler, flags| {
        let action = SigAction::new(handler, flags, SigSet::empty());
        // SAFETY: the handler is async-signal-safe.
        unsafe { sigaction(signal, &action) }.call("sigaction")
    };
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // No SA_RESTART: a blocking call must return so that the engine comes to its next check.
        let old = set(signal, SigHandler::Handler(on_signal), SaFlags::empty())?;
        if matches!(old.handler(), SigHandler::SigIgn) {
            set(signal, SigHandler::SigIgn, SaFlags::empty())?;
        }
    }
    set(Signal::SIGPIPE, SigHandler::SigIgn, SaFlags::empty())?;
    set(Signal::SIGCHLD, SigHandler::SigDfl, SaFlags::empty())?;
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None).call("sigprocmask")
}

/// Runs `f` with SIGTTOU blocked: settings of a terminal can then be changed from a background group.
pub(crate) fn without_sigttou<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGTTOU);
    let old = set.thread_swap_mask(SigmaskHow::SIG_BLOCK).call("sigprocmask")?;
    let result = f();
    old.thread_set_mask().call("sigprocmask")?;
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn sigterm_asks_the_operation_to_stop() {
        // In a child: flag and dispositions belong to the whole process.
        // SAFETY: the child only makes plain calls and exits.
        match unsafe { libc::fork() } {
            0 => {
                let ok = prepare().is_ok()
                    && nix::sys::signal::raise(Signal::SIGTERM).is_ok()
                    && matches!(crate::interrupt::check(), Err(e) if *e.kind() == Kind::Interrupted(15));
                // SAFETY: ends the child without running the test harness.
                unsafe { libc::_exit(i32::from(!ok)) }
            }
            child => {
                let mut status = 0;
                // SAFETY: our own child; status is a local.
                unsafe { libc::waitpid(child, &mut status, 0) };
                assert_eq!(status, 0);
            }
        }
    }
}
