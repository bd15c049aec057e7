//! What belongs to the process as a whole: attributes, limits, whether it may be dumped.
//!
//! # Safety
//! Calls with numbers, and with structures in the arena.

use blobrt::syscall::{Errno, nr, syscall1, syscall3, syscall4};
use restorer::{
    args::{NONE, flag},
    report::{Call, Object},
};

use crate::{
    fail::{Failed, On},
    image::Task,
    memory::prctl,
};

const PR_SET_DUMPABLE: usize = 4;
const PR_GET_DUMPABLE: usize = 3;
const PR_SET_CHILD_SUBREAPER: usize = 36;
const PR_SET_THP_DISABLE: usize = 41;
const ENOSYS: i32 = 38;

/// What must be set before there are threads, or is inherited by them.
pub fn attributes(task: &Task) -> Result<(), Failed> {
    let args = task.args;
    if args.flags & flag::THP_DISABLED != 0 {
        prctl(PR_SET_THP_DISABLE, 1, Object::Prctl)?;
    }
    if args.flags & flag::SUBREAPER != 0 {
        prctl(PR_SET_CHILD_SUBREAPER, 1, Object::Prctl)?;
    }
    // With one thread a registration costs no grace period.
    for bit in (0..32).map(|n| 1u32 << n).filter(|bit| args.membarrier & bit != 0) {
        // SAFETY: numbers only.
        unsafe { syscall3(nr::MEMBARRIER, bit as usize, 0, 0) }.on(
            Call::Membarrier,
            Object::Membarrier,
            u64::from(bit),
            0,
        )?;
    }
    // SAFETY: a number; threads inherit it.
    unsafe { syscall1(nr::PERSONALITY, args.personality as usize) }.on(
        Call::Personality,
        Object::Prctl,
        0,
        u64::from(args.personality),
    )?;
    Ok(())
}

/// Closes what the engine and the restorer had for themselves. A task that shares the table may have done so
/// already: then there is nothing left in the range.
pub fn close(task: &Task) -> Result<(), Failed> {
    for &[first, last] in task.table(task.args.close) {
        // SAFETY: no number in the range is the task's.
        let done = unsafe { syscall3(nr::CLOSE_RANGE, first as usize, last as usize, 0) };
        match done {
            // Linux before 5.9. Ranges are short; EBADF means not open.
            Err(Errno(ENOSYS)) => (first..=last).for_each(|fd| {
                // SAFETY: as above.
                let _ = unsafe { syscall1(nr::CLOSE, fd as usize) };
            }),
            other => drop(other.on(Call::Close, Object::Fd, u64::from(first), u64::from(last))?),
        }
    }
    Ok(())
}

/// Calls on descriptors that waited until nothing is opened or closed any more.
pub fn late(task: &Task) -> Result<(), Failed> {
    for late in task.table(task.args.late) {
        let call = match late.call as usize {
            nr::FCNTL => Call::Fcntl,
            nr::IOCTL => Call::Ioctl,
            nr::TIMERFD_SETTIME => Call::TimerfdSettime,
            _ => Call::Build,
        };
        let (fd, arg, data) = (late.fd as usize, late.arg as usize, late.data.as_ptr() as usize);
        // SAFETY: the structure lies in the arena and is large enough for each of these calls.
        unsafe { syscall4(late.call as usize, fd, arg, data, 0) }.on(
            call,
            Object::Fd,
            u64::from(late.fd),
            late.arg,
        )?;
    }
    Ok(())
}

/// Resource limits. They hold for the process, so they come when it has all it needs.
pub fn limits(task: &Task) -> Result<(), Failed> {
    for limit in task.table(task.args.limits) {
        // SAFETY: soft and hard limit stand at the start of the row, as struct rlimit64 has them.
        unsafe { syscall4(nr::PRLIMIT64, 0, limit.resource as usize, (&raw const *limit) as usize, 0) }.on(
            Call::Prlimit,
            Object::Rlimit,
            u64::from(limit.resource),
            limit.hard,
        )?;
    }
    Ok(())
}

/// Whether the process may dump core and be traced by its user. Every change of credentials resets it,
/// so each thread sets it after its own.
pub fn dumpable(task: &Task) -> Result<(), Failed> {
    let wanted = task.args.dumpable as usize;
    match task.args.dumpable {
        NONE => Ok(()),
        0 | 1 => prctl(PR_SET_DUMPABLE, wanted, Object::Prctl).map(drop),
        // 2 cannot be asked for. Where the change of credentials did not lead to it, 0 is the value that
        // allows no more.
        _ if prctl(PR_GET_DUMPABLE, 0, Object::Prctl)? == wanted => Ok(()),
        _ => prctl(PR_SET_DUMPABLE, 0, Object::Prctl).map(drop),
    }
}
