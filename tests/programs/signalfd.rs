//! signalfd: mask and flags, and a signal that waits to be read.

use anyhow::Context;
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal, raise};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::kit::{Check, rest, same};

/// See the module.
pub fn run(_: &[String]) -> Check {
    let set = |signals: &[Signal]| signals.iter().copied().collect::<SigSet>();
    let mine = set(&[Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGHUP]);
    mine.thread_block().context("block")?;
    let first = SignalFd::with_flags(&set(&[Signal::SIGUSR1, Signal::SIGUSR2]), SfdFlags::SFD_NONBLOCK);
    let first = first.context("signalfd")?;
    let second =
        SignalFd::with_flags(&set(&[Signal::SIGHUP]), SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC);
    let second = second.context("signalfd")?;
    raise(Signal::SIGUSR2).context("raise")?;
    rest()?;
    let read = |fd: &SignalFd| fd.read_signal().map(|s| s.map(|s| (s.ssi_signo, s.ssi_pid)));
    let me = std::process::id();
    same("signal that was pending", read(&first), Ok(Some((libc::SIGUSR2 as u32, me))))?;
    same("then none", read(&first), Ok(None))?;
    raise(Signal::SIGHUP).context("raise")?;
    raise(Signal::SIGUSR1).context("raise")?;
    same("the second's signal", read(&second), Ok(Some((libc::SIGHUP as u32, me))))?;
    same("the first's signal", read(&first), Ok(Some((libc::SIGUSR1 as u32, me))))?;
    same("an empty read", read(&second), Ok::<_, Errno>(None))
}
