//! Children that have ended and were not waited for keep their status: exit codes and signals.
//!
//! # Safety
//!
//! fork(2) is called from one thread; the children end by _exit(2).

use anyhow::{Context, bail};
use nix::errno::Errno;
use nix::sys::signal::{Signal, raise};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{Pid, fork, setpgid, setsid};

use crate::kit::crew::{Member, member, wait};
use crate::kit::{Check, rest, same};

/// Ends in the given way, becoming a zombie of the caller.
fn zombie(end: impl FnOnce()) -> anyhow::Result<Pid> {
    // SAFETY: this process has one thread.
    match unsafe { fork() }.context("fork")? {
        nix::unistd::ForkResult::Parent { child } => {
            let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
            waitid(Id::Pid(child), flags).context("waitid")?;
            Ok(child)
        }
        nix::unistd::ForkResult::Child => {
            end();
            // SAFETY: ends the process.
            unsafe { libc::_exit(0) }
        }
    }
}

fn set() -> anyhow::Result<Vec<(Pid, WaitStatus)>> {
    // SAFETY: ends the process.
    let exit = |code| move || unsafe { libc::_exit(code) };
    let killed = |signal: Signal| {
        move || {
            // No core file wherever the machine would put it.
            let _ = nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0);
            let _ = raise(signal);
        }
    };
    let (a, b) = (zombie(exit(0))?, zombie(exit(77))?);
    let (c, d) = (zombie(killed(Signal::SIGKILL))?, zombie(killed(Signal::SIGQUIT))?);
    let leader = zombie(|| _ = setsid())?;
    let grouped = zombie(|| _ = setpgid(Pid::from_raw(0), Pid::from_raw(0)))?;
    Ok(vec![
        (a, WaitStatus::Exited(a, 0)),
        (b, WaitStatus::Exited(b, 77)),
        (c, WaitStatus::Signaled(c, Signal::SIGKILL, false)),
        (d, WaitStatus::Signaled(d, Signal::SIGQUIT, false)),
        (leader, WaitStatus::Exited(leader, 0)),
        (grouped, WaitStatus::Exited(grouped, 0)),
    ])
}

fn collect(zombies: Vec<(Pid, WaitStatus)>) -> Check {
    for (pid, status) in zombies {
        same("status of a zombie", wait(pid)?, status)?;
    }
    match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
        Err(Errno::ECHILD) | Ok(WaitStatus::StillAlive) => Ok(()),
        other => bail!("another child has ended: {other:?}"),
    }
}

/// Zombies of the root and of a member of the tree.
pub fn run(_: &[String]) -> Check {
    let zombies = set()?;
    let member: Member = member(|| {
        let zombies = set()?;
        rest()?;
        collect(zombies)
    })?;
    rest()?;
    collect(zombies)?;
    member.verify()
}
