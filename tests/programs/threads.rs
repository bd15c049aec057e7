//! Threads: `threads COUNT`. Each has thread-local memory, a signal mask, an alternate stack, a name, a nice
//! value, and waits in a futex.
//!
//! # Safety
//!
//! sigaltstack(2) gets memory that is never freed; setpriority(2) gets integers.

use std::cell::Cell;
use std::fs;
use std::sync::{Arc, Condvar, Mutex};

use anyhow::{Context, anyhow};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};
use nix::unistd::gettid;

use crate::kit::{Check, mem, number, rest, same, sys};

thread_local! {
    static LOCAL: Cell<u64> = const { Cell::new(0) };
}

#[derive(Default)]
struct Gate {
    arrived: Mutex<usize>,
    /// Of `arrived`: only the first thread waits for it. With one condition for both, every arrival would wake all
    /// that came before.
    one_more: Condvar,
    open: Mutex<bool>,
    opened: Condvar,
}

fn altstack() -> anyhow::Result<(usize, i32, usize)> {
    // SAFETY: an all-zero stack_t is a valid value, filled by the call.
    let mut stack: libc::stack_t = unsafe { std::mem::zeroed() };
    // SAFETY: only asks; `stack` outlives the call.
    sys("sigaltstack", unsafe { libc::sigaltstack(std::ptr::null(), &mut stack) })?;
    Ok((stack.ss_sp as usize, stack.ss_flags, stack.ss_size))
}

fn thread(i: usize, gate: &Gate) -> Check {
    LOCAL.set(0xabcd_0000 + i as u64);
    let mut blocked = SigSet::empty();
    [Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGHUP, Signal::SIGALRM]
        .into_iter()
        .enumerate()
        .filter(|(bit, _)| i >> bit & 1 == 1)
        .for_each(|(_, s)| blocked.add(s));
    pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&blocked), None).context("pthread_sigmask")?;
    let stack = mem::anon(8 * mem::PAGE)?;
    let new = libc::stack_t { ss_sp: stack.at as *mut libc::c_void, ss_flags: 0, ss_size: stack.len };
    // SAFETY: the memory is kept until the process ends.
    sys("sigaltstack", unsafe { libc::sigaltstack(&new, std::ptr::null_mut()) })?;
    let tid = gettid();
    // SAFETY: integers only.
    sys("setpriority", unsafe {
        libc::setpriority(libc::PRIO_PROCESS, tid.as_raw() as u32, (i % 10) as i32)
    })?;
    let name = format!("worker {i}");
    fs::write(format!("/proc/self/task/{tid}/comm"), &name).context("comm")?;
    let mask = || SigSet::thread_get_mask().context("mask");
    let before = (mask()?, altstack()?);

    *gate.arrived.lock().map_err(|_| anyhow!("poisoned"))? += 1;
    gate.one_more.notify_all();
    let mut open = gate.open.lock().map_err(|_| anyhow!("poisoned"))?;
    while !*open {
        open = gate.opened.wait(open).map_err(|_| anyhow!("poisoned"))?;
    }
    drop(open);

    same("thread-local memory", LOCAL.get(), 0xabcd_0000 + i as u64)?;
    same("thread id", gettid(), tid)?;
    same("mask and alternate stack", (mask()?, altstack()?), before)?;
    let comm = fs::read_to_string(format!("/proc/self/task/{tid}/comm")).context("comm")?;
    same("name of the thread", comm.trim(), &name)?;
    // SAFETY: integers only.
    let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, tid.as_raw() as u32) };
    same("nice value of the thread", nice, (i % 10) as i32)
}

/// See the module.
pub fn run(args: &[String]) -> Check {
    let count = number(args, 0, 8)?;
    let gate = Arc::new(Gate::default());
    let mut threads = Vec::new();
    for i in 0..count {
        let gate = gate.clone();
        let builder = std::thread::Builder::new().stack_size(128 << 10);
        threads.push(builder.spawn(move || thread(i, &gate)).context("starting a thread")?);
    }
    let mut arrived = gate.arrived.lock().map_err(|_| anyhow!("poisoned"))?;
    while *arrived < count && !threads.iter().any(|t| t.is_finished()) {
        arrived = gate.one_more.wait(arrived).map_err(|_| anyhow!("poisoned"))?;
    }
    drop(arrived);
    rest()?;
    *gate.open.lock().map_err(|_| anyhow!("poisoned"))? = true;
    gate.opened.notify_all();
    for (i, thread) in threads.into_iter().enumerate() {
        thread
            .join()
            .map_err(|_| anyhow!("it panicked"))
            .and_then(|r| r)
            .with_context(|| format!("thread {i}"))?;
    }
    Ok(())
}
