//! A program that becomes another one when SIGUSR1 asks for it: `changeling MIB`. Its memory is written once and
//! checked at the end; the other program is a sleeper.
//!
//! # Safety
//!
//! The handler is one atomic store.

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use crate::kit::{Check, mem, number, tell_ready, wait_term};

static CHANGE: AtomicBool = AtomicBool::new(false);

extern "C" fn change(_: i32) {
    CHANGE.store(true, Ordering::Release);
}

fn become_another() -> Result<()> {
    while !CHANGE.load(Ordering::Acquire) {
        std::thread::yield_now();
    }
    Err(Command::new("/proc/self/exe").arg("sleeper").exec()).context("exec")
}

/// See the module.
pub fn run(args: &[String]) -> Check {
    let memory = mem::anon(number(args, 0, 16)? << 20)?;
    memory.fill(7);
    let action = SigAction::new(SigHandler::Handler(change), SaFlags::SA_RESTART, SigSet::empty());
    // SAFETY: the handler only stores to an atomic.
    unsafe { sigaction(Signal::SIGUSR1, &action) }.context("sigaction")?;
    std::thread::spawn(become_another);
    tell_ready()?;
    wait_term()?;
    memory.check("memory of the program that becomes another", 7)
}
