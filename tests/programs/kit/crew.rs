//! Members of a program's tree: forked, waited for until they are ready, asked for their verdict.
//!
//! # Safety
//!
//! fork(2) is called while the process has one thread; a member ends by _exit(2).

use std::io::Write;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, pipe, read, write};

use super::{Check, TELL};

/// A forked process that runs a role and gives a verdict of its own.
#[derive(Debug)]
pub struct Member {
    pub pid: Pid,
}

/// Forks; the child runs `role`, which says it is ready through `kit::rest` or `kit::tell_ready`.
/// Returns when the member is ready; its failing before that is an error.
pub fn member(role: impl FnOnce() -> Check) -> Result<Member> {
    let (from, to) = pipe().context("pipe")?;
    let told_through = to.as_raw_fd();
    let line = std::fs::read_link(format!("/proc/self/fd/{told_through}")).ok();
    // SAFETY: this process has one thread.
    match unsafe { fork() }.context("fork")? {
        ForkResult::Child => {
            drop(from);
            TELL.store(to.into_raw_fd(), Ordering::SeqCst);
            let code = match role() {
                Ok(()) => 0,
                Err(e) => {
                    println!("FAIL in pid {}: {e:#}", Pid::this());
                    1
                }
            };
            let _ = std::io::stdout().flush();
            // SAFETY: ends the process; nothing of the parent's may be run here at exit.
            unsafe { libc::_exit(code) }
        }
        ForkResult::Parent { child } => {
            drop(to);
            let mut byte = [0];
            loop {
                match read(&from, &mut byte) {
                    Ok(1) => {
                        // Whoever is looked at from outside now should have closed its end.
                        let end = format!("/proc/{child}/fd/{told_through}");
                        while line.is_some() && std::fs::read_link(&end).ok() == line {
                            std::thread::yield_now();
                        }
                        return Ok(Member { pid: child });
                    }
                    Ok(_) => bail!("member {child} ended before it was ready"),
                    Err(Errno::EINTR) => {}
                    Err(e) => return Err(e).context("reading a member's readiness"),
                }
            }
        }
    }
}

/// Tells the parent that this member is ready, and gives the descriptor up.
pub(super) fn tell(fd: i32) -> Check {
    // SAFETY: the descriptor was given up by `member` and is nobody else's.
    let to = unsafe { <std::os::fd::OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) };
    debug_assert!(to.as_raw_fd() == fd);
    write(&to, b"r").context("telling readiness").map(drop)
}

impl Member {
    /// Asks for the verdict and waits for it.
    pub fn verify(&self) -> Check {
        self.ask()?;
        self.wait()
    }

    /// Asks for the verdict.
    pub fn ask(&self) -> Check {
        kill(self.pid, Signal::SIGTERM).with_context(|| format!("asking member {}", self.pid))
    }

    /// Waits for the verdict.
    pub fn wait(&self) -> Check {
        match wait(self.pid)? {
            WaitStatus::Exited(_, 0) => Ok(()),
            other => bail!("member {} ended with {other:?}", self.pid),
        }
    }
}

/// waitpid(2) that goes on after a signal.
pub fn wait(pid: Pid) -> Result<WaitStatus> {
    loop {
        match waitpid(pid, None) {
            Err(Errno::EINTR) => {}
            other => return other.with_context(|| format!("waitpid {pid}")),
        }
    }
}
