//! Syscall user dispatch: calls from outside of a range become SIGSYS while a byte says so.
//!
//! # Safety
//!
//! The handler touches atomics only. The byte that switches dispatch on lives to the end of the process.

use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use anyhow::{Context, Result};
use nix::errno::Errno;

use crate::kit::{Check, same, skip, sys, team};

const PR_SET_SYSCALL_USER_DISPATCH: i32 = 59;
const ALLOW: u8 = 0;
const BLOCK: u8 = 1;

static SELECTOR: [AtomicU8; 3] = [const { AtomicU8::new(ALLOW) }; 3];
static CAUGHT: AtomicUsize = AtomicUsize::new(0);

extern "C" fn on_sigsys(_: i32) {
    // What returns from here makes calls.
    SELECTOR.iter().for_each(|s| s.store(ALLOW, Ordering::SeqCst));
    CAUGHT.fetch_add(1, Ordering::SeqCst);
}

fn install() -> Check {
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
    let action = SigAction::new(SigHandler::Handler(on_sigsys), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler touches atomics only.
    unsafe { sigaction(Signal::SIGSYS, &action) }.context("sigaction").map(drop)
}

fn switch_on(i: usize) -> Result<()> {
    install()?;
    // The first two have dispatch; the first one with a range of its own that lets nothing useful through.
    let (offset, len) = if i == 0 { (0x1000, 0x1000) } else { (0, 0) };
    if i < 2 {
        let selector = SELECTOR[i].as_ptr();
        // SAFETY: the selector lives to the end of the process.
        let done =
            unsafe { libc::prctl(PR_SET_SYSCALL_USER_DISPATCH, 1u64, offset as u64, len as u64, selector) };
        match sys("prctl", done) {
            Err(e) if e.downcast_ref() == Some(&Errno::EINVAL) => {
                return Err(skip("the kernel has no syscall user dispatch"));
            }
            other => other?,
        };
    }
    Ok(())
}

/// Dispatch in two of three threads: each tries it when the verdict is asked for.
pub fn run(_: &[String]) -> Check {
    team::run(2, switch_on, |i, ()| {
        let before = CAUGHT.load(Ordering::SeqCst);
        SELECTOR[i].store(BLOCK, Ordering::SeqCst);
        // SAFETY: takes no argument.
        unsafe { libc::syscall(libc::SYS_getppid) };
        SELECTOR[i].store(ALLOW, Ordering::SeqCst);
        same("calls that were dispatched", CAUGHT.load(Ordering::SeqCst) - before, usize::from(i < 2))
    })
}
