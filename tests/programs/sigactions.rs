//! Signal actions with their flags, masks and handlers; a handler on the alternate stack still runs.
//!
//! # Safety
//!
//! rt_sigaction(2) is called with the kernel's own structure, so that the restorer and every flag can be
//! read; the handler only stores to an atomic.

use std::sync::atomic::{AtomicI32, Ordering};

use anyhow::Context;
use nix::sys::signal::{SigSet, Signal, raise};

use crate::kit::{Check, mem, rest, same, sys};

#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct KernelAction {
    handler: usize,
    flags: u64,
    restorer: usize,
    mask: u64,
}

static SEEN: AtomicI32 = AtomicI32::new(0);
static ON_STACK: AtomicI32 = AtomicI32::new(0);

extern "C" fn handler(signal: i32) {
    let here = 0u8;
    let at = &raw const here as usize;
    SEEN.store(signal, Ordering::SeqCst);
    ON_STACK.store(i32::from(STACK.load(Ordering::SeqCst) == at >> 16), Ordering::SeqCst);
}

/// Address of the alternate stack by 64 KiB.
static STACK: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);

fn get(signal: i32) -> anyhow::Result<KernelAction> {
    let mut action = KernelAction::default();
    let none = std::ptr::null::<KernelAction>();
    // SAFETY: the structure is the kernel's and outlives the call.
    sys("rt_sigaction", unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, none, &mut action, 8) })?;
    Ok(action)
}

/// All 64 signals.
pub fn run(_: &[String]) -> Check {
    let stack = mem::anon(128 << 10)?;
    let aligned = (stack.at + 0xffff) & !0xffff;
    STACK.store(aligned >> 16, Ordering::SeqCst);
    let alt = libc::stack_t { ss_sp: aligned as *mut libc::c_void, ss_flags: 0, ss_size: 64 << 10 };
    // SAFETY: the memory is kept until the process ends.
    sys("sigaltstack", unsafe { libc::sigaltstack(&alt, std::ptr::null_mut()) })?;
    let flags = [
        0,
        libc::SA_NODEFER,
        libc::SA_RESTART | libc::SA_ONSTACK,
        libc::SA_NOCLDSTOP | libc::SA_NOCLDWAIT,
        libc::SA_SIGINFO | libc::SA_RESETHAND,
    ];
    for signal in (1..=64).filter(|s| ![libc::SIGKILL, libc::SIGSTOP, libc::SIGTERM, 32, 33].contains(s)) {
        // SAFETY: an all-zero sigaction is a valid value.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = match signal % 4 {
            0 => libc::SIG_IGN,
            1 => libc::SIG_DFL,
            _ => handler as *const () as usize,
        };
        action.sa_flags = flags[signal as usize % flags.len()];
        if signal == libc::SIGUSR2 {
            action.sa_flags = libc::SA_ONSTACK;
            action.sa_sigaction = handler as *const () as usize;
        }
        // SAFETY: a mask of our own structure.
        unsafe { libc::sigaddset(&mut action.sa_mask, (signal % 31) + 1) };
        // SAFETY: the handler is async-signal-safe.
        sys("sigaction", unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) })?;
    }
    let all = || (1..=64).map(get).collect::<anyhow::Result<Vec<_>>>();
    let before = all()?;
    rest()?;
    for (i, (is, was)) in all()?.into_iter().zip(before).enumerate() {
        same(&format!("action of signal {}", i + 1), is, was)?;
    }
    let mut usr2 = SigSet::empty();
    usr2.add(Signal::SIGUSR2);
    usr2.thread_unblock().context("unblock")?;
    raise(Signal::SIGUSR2).context("raise")?;
    same("signal the handler saw", SEEN.load(Ordering::SeqCst), libc::SIGUSR2)?;
    same("handler ran on the alternate stack", ON_STACK.load(Ordering::SeqCst), 1)
}
