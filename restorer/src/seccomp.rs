//! Seccomp filters and strict mode. The engine has suspended seccomp for the attached threads, so the
//! calls that still follow pass.
//!
//! # Safety
//! The filter programs lie in the arena.

use blobrt::syscall::{nr, syscall3};
use restorer::{
    ThreadArgs,
    report::{Call, Object},
};

use crate::{
    fail::{Failed, On},
    image::Task,
    memory::prctl,
};

const SECCOMP_SET_MODE_STRICT: usize = 0;
const SECCOMP_SET_MODE_FILTER: usize = 1;
const PR_SET_NO_NEW_PRIVS: usize = 38;
const EACCES: i32 = 13;

/// `struct sock_fprog`.
#[repr(C)]
struct Program {
    len: u16,
    code: *const u64,
}

/// The filters of one thread, or strict mode. A filter with `SECCOMP_FILTER_FLAG_TSYNC` goes to all threads at
/// once, so that it is the same object for all, as a later one of the program would want it.
pub fn restore(task: &Task, me: &ThreadArgs) -> Result<(), Failed> {
    for at in task.table(me.filters) {
        add(task, *at)?;
    }
    if me.seccomp == 1 {
        // SAFETY: no pointer in this mode.
        unsafe { syscall3(nr::SECCOMP, SECCOMP_SET_MODE_STRICT, 0, 0) }.on(
            Call::Seccomp,
            Object::Filter,
            0,
            0,
        )?;
    }
    Ok(())
}

fn add(task: &Task, at: u32) -> Result<(), Failed> {
    let filter = task.row(task.args.filters, at)?;
    let code = task.table(filter.code);
    let program = Program { len: code.len() as u16, code: code.as_ptr() };
    let flags = filter.flags as usize;
    // SAFETY: the program is a local, its code in the arena.
    let set =
        || unsafe { syscall3(nr::SECCOMP, SECCOMP_SET_MODE_FILTER, flags, (&raw const program) as usize) };
    let result = match set() {
        // Without CAP_SYS_ADMIN a filter needs no_new_privs. A thread that has filters and no such right
        // had it set when it added them.
        Err(e) if e.0 == EACCES => {
            prctl(PR_SET_NO_NEW_PRIVS, 1, Object::Creds)?;
            set()
        }
        other => other,
    };
    match result.on(Call::Seccomp, Object::Filter, u64::from(at), 0)? {
        0 => Ok(()),
        // TSYNC tells the first thread that could not follow.
        tid => Err(Failed::new(Call::Seccomp, Object::Filter, 0, u64::from(at), tid as u64)),
    }
}
