//! The first process of a pid namespace, with a program below it: passes the request for the verdict on, takes orphans
//! over, and ends as the program ends.
//!
//! # Safety
//!
//! fork(2) is called while the process has one thread.

use std::process::ExitCode;

use anyhow::Context;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, setsid};

/// Runs `program` in a child that leads a session of its own.
pub fn run(program: impl FnOnce() -> ExitCode) -> anyhow::Result<ExitCode> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGCHLD);
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&signals), None).context("sigprocmask")?;
    // SAFETY: this process has one thread.
    match unsafe { fork() }.context("fork")? {
        ForkResult::Child => {
            sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None).context("sigprocmask")?;
            setsid().context("setsid")?;
            Ok(program())
        }
        ForkResult::Parent { child } => loop {
            match signals.wait() {
                Ok(Signal::SIGTERM) => kill(child, Signal::SIGTERM).context("kill")?,
                Ok(_) | Err(nix::errno::Errno::EINTR) => {
                    if let Some(code) = reap(child) {
                        return Ok(code);
                    }
                }
                Err(e) => return Err(e).context("sigwait"),
            }
        },
    }
}

/// Takes all who have ended; how the program did, if it is among them.
fn reap(program: Pid) -> Option<ExitCode> {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) if pid == program => return Some(ExitCode::from(code as u8)),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == program => {
                println!("the program died of {signal}");
                return Some(ExitCode::FAILURE);
            }
            Ok(WaitStatus::StillAlive) | Err(_) => return None,
            Ok(_) => {}
        }
    }
}
