//! Interval timers and POSIX timers.
//!
//! # Safety
//! Structures handed to the kernel lie in the arena or on the stack.

use blobrt::syscall::{nr, syscall1, syscall3, syscall4};
use restorer::{
    args::{PosixTimer, flag},
    report::{Call, Object},
};

use crate::{
    fail::{Failed, On},
    image::Task,
    memory::prctl,
};

const PR_TIMER_CREATE_RESTORE_IDS: usize = 77;
/// The kernel's `struct sigevent`.
#[repr(C)]
struct Sigevent {
    value: u64,
    signal: u32,
    notify: u32,
    tid: u32,
    pad: [u32; 11],
}
const _: () = assert!(size_of::<Sigevent>() == 64);

/// `setitimer` for each of the three.
pub fn intervals(task: &Task) -> Result<(), Failed> {
    for (which, timer) in task.args.itimers.iter().enumerate().filter(|(_, t)| **t != [0; 4]) {
        // SAFETY: a struct itimerval in the arena.
        unsafe { syscall3(nr::SETITIMER, which, timer.as_ptr() as usize, 0) }.on(
            Call::Setitimer,
            Object::Itimer,
            which as u64,
            0,
        )?;
    }
    Ok(())
}

/// Creates every POSIX timer under its id and starts it.
pub fn posix(task: &Task) -> Result<(), Failed> {
    let timers = task.table(task.args.timers);
    if timers.is_empty() {
        return Ok(());
    }
    let exact = task.args.flags & flag::TIMER_IDS != 0;
    if exact {
        prctl(PR_TIMER_CREATE_RESTORE_IDS, 1, Object::PosixTimer)?;
    }
    for timer in timers {
        create(timer, exact)?;
        let (id, spec) = (timer.id as usize, timer.spec.as_ptr() as usize);
        // SAFETY: a struct itimerspec in the arena.
        unsafe { syscall4(nr::TIMER_SETTIME, id, 0, spec, 0) }.on(
            Call::TimerSettime,
            Object::PosixTimer,
            u64::from(timer.id),
            0,
        )?;
    }
    if exact {
        prctl(PR_TIMER_CREATE_RESTORE_IDS, 0, Object::PosixTimer)?;
    }
    Ok(())
}

/// The kernel counts ids upwards per process. Where it cannot be told the id, timers are created and
/// deleted until the count has come there; the engine sorts timers by id, so it never has to go back.
fn create(timer: &PosixTimer, exact: bool) -> Result<(), Failed> {
    let event = Sigevent {
        value: timer.value,
        signal: timer.signal,
        notify: timer.notify,
        tid: timer.tid,
        pad: [0; 11],
    };
    loop {
        let mut id = timer.id;
        let (event, out) = ((&raw const event) as usize, (&raw mut id) as usize);
        // SAFETY: both structures are locals.
        unsafe { syscall3(nr::TIMER_CREATE, timer.clock as usize, event, out) }.on(
            Call::TimerCreate,
            Object::PosixTimer,
            u64::from(timer.id),
            0,
        )?;
        if id == timer.id {
            return Ok(());
        }
        // SAFETY: the timer just made.
        unsafe { syscall1(nr::TIMER_DELETE, id as usize) }.on(
            Call::TimerDelete,
            Object::PosixTimer,
            u64::from(id),
            0,
        )?;
        if exact || id > timer.id {
            return Err(Failed::new(
                Call::TimerCreate,
                Object::PosixTimer,
                0,
                u64::from(timer.id),
                u64::from(id),
            ));
        }
    }
}
