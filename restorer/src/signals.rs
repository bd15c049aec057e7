//! Signal actions and pending signals.
//!
//! # Safety
//! Structures handed to the kernel lie in the arena.

use blobrt::syscall::{nr, syscall3, syscall4};
use restorer::{
    ThreadArgs,
    args::Action,
    report::{Call, Object},
};

use crate::{
    fail::{Failed, On},
    image::Task,
};

const SIGCHLD: usize = 17;
/// Bytes of the kernel's signal set.
const SIGSET: usize = 8;

/// Blocks every signal, those that libc keeps for itself (and never blocks) too: from now on one that comes
/// waits for the program.
pub fn block_all() -> Result<(), Failed> {
    const SIG_SETMASK: usize = 2;
    let all = u64::MAX;
    // SAFETY: the mask is a local.
    unsafe { syscall4(nr::RT_SIGPROCMASK, SIG_SETMASK, (&raw const all) as usize, 0, SIGSET) }.on(
        Call::RtSigprocmask,
        Object::Thread,
        0,
        0,
    )?;
    Ok(())
}

/// Sets every action. SIGCHLD is set to its default first: that drops what children that had to die
/// during the restore have left pending.
pub fn actions(task: &Task) -> Result<(), Failed> {
    set(&Action { signal: SIGCHLD as u32, ..Action::default() })?;
    task.table(task.args.actions).iter().try_for_each(set)
}

fn set(action: &Action) -> Result<(), Failed> {
    // SAFETY: handler, flags, restorer and mask stand at the start of the row in the kernel's order.
    unsafe { syscall4(nr::RT_SIGACTION, action.signal as usize, (&raw const *action) as usize, 0, SIGSET) }
        .on(Call::RtSigaction, Object::Action, u64::from(action.signal), 0)?;
    Ok(())
}

/// Signals pending for the process. Only the process itself may queue such that come from the kernel.
pub fn queue_for_process(task: &Task) -> Result<(), Failed> {
    for info in task.table(task.args.queued) {
        let signal = info[0] as u32;
        // SAFETY: a siginfo_t in the arena.
        unsafe {
            syscall3(nr::RT_SIGQUEUEINFO, task.args.pid as usize, signal as usize, info.as_ptr() as usize)
        }
        .on(Call::RtSigqueueinfo, Object::Queued, u64::from(signal), 0)?;
    }
    Ok(())
}

/// Signals pending for one thread.
pub fn queue_for_thread(task: &Task, me: &ThreadArgs) -> Result<(), Failed> {
    for info in task.table(me.queued) {
        let (signal, pid) = (info[0] as u32, task.args.pid as usize);
        // SAFETY: a siginfo_t in the arena.
        unsafe {
            syscall4(nr::RT_TGSIGQUEUEINFO, pid, me.tid as usize, signal as usize, info.as_ptr() as usize)
        }
        .on(Call::RtTgsigqueueinfo, Object::Queued, u64::from(signal), 0)?;
    }
    Ok(())
}
