//! The label of a security module (AppArmor, SELinux) that a thread is confined by.
//!
//! Only a thread itself can change its label, by writing to a file of its own in /proc. That needs a descriptor
//! for a moment; it is opened before limits can forbid it, and nothing of the program runs before it is closed.
//!
//! # Safety
//! Calls with names that are constants and texts in the arena; descriptors are the restorer's own.

use blobrt::{
    futex,
    syscall::{Errno, nr, syscall1, syscall3, syscall4},
};
use core::sync::atomic::Ordering::AcqRel;
use restorer::{
    Shared, TaskSlot, ThreadArgs,
    args::{Creds, NONE, module},
    report::{Call, Object},
};

use crate::{
    fail::{Failed, On},
    image::Task,
};

const WRITE_ONLY: usize = 1;
const CLOSE_ON_EXEC: usize = 0o200_0000;
const ENOENT: i32 = 2;

/// Where AppArmor has a file of its own, the other may belong to another module.
const APPARMOR: &[u8] = b"thread-self/attr/apparmor/current\0";
const CURRENT: &[u8] = b"thread-self/attr/current\0";
const SOCKCREATE: &[u8] = b"thread-self/attr/sockcreate\0";

/// What a thread will write its labels to.
#[derive(Clone, Copy)]
pub struct Label {
    current: Option<usize>,
    sockcreate: Option<usize>,
}

impl Label {
    /// Opens what `me` needs, and tells the leader.
    pub fn open(task: &Task, me: &ThreadArgs) -> Result<Label, Failed> {
        let mut label = Label { current: None, sockcreate: None };
        if task.args.proc == NONE {
            return Ok(label);
        }
        let c = task.row(task.args.creds, me.creds)?;
        if c.profile.count != 0 && c.module == module::APPARMOR {
            label.current = Some(current(task, c)?);
        }
        if c.sockcreate.count != 0 {
            label.sockcreate = Some(open(task, SOCKCREATE).map_err(|e| failed(Call::Open, e, task, c))?);
        }
        slot(task)?.labels.fetch_add(1, AcqRel);
        futex::wake_all(&slot(task)?.labels);
        Ok(label)
    }

    /// Gives the calling thread its labels.
    pub fn write(self, task: &Task, c: &Creds) -> Result<(), Failed> {
        if let Some(fd) = self.current {
            write(fd, task.table(c.profile))?;
        }
        if let Some(fd) = self.sockcreate {
            write(fd, task.table(c.sockcreate))?;
        }
        Ok(())
    }
}

/// The label of the whole process, while it has one thread; all others inherit it.
pub fn of_process(task: &Task, leader: &ThreadArgs) -> Result<(), Failed> {
    let c = task.row(task.args.creds, leader.creds)?;
    if c.module != module::SELINUX || c.profile.count == 0 {
        return Ok(());
    }
    write(current(task, c)?, task.table(c.profile))
}

/// Waits until every thread has opened what it needs.
pub fn all_open(task: &Task) -> Result<(), Failed> {
    if task.args.proc != NONE {
        futex::wait_until(&slot(task)?.labels, task.args.threads.count as u32);
    }
    Ok(())
}

/// Closes /proc. Tasks that share the table do so too: the first closes it, and nobody runs yet who could open
/// something under its number.
pub fn close(task: &Task) {
    if task.args.proc != NONE {
        // SAFETY: a number that is none of the task's.
        let _ = unsafe { syscall1(nr::CLOSE, task.args.proc as usize) };
    }
}

fn slot(task: &Task) -> Result<&'static TaskSlot, Failed> {
    // SAFETY: the area is mapped inside the hole for as long as the blob runs.
    unsafe { Shared::slot(task.shared, task.args.slot) }.ok_or(Failed::new(
        Call::Build,
        Object::Build,
        0,
        u64::from(task.args.slot),
        0,
    ))
}

fn current(task: &Task, c: &Creds) -> Result<usize, Failed> {
    let opened = match c.module {
        module::APPARMOR => match open(task, APPARMOR) {
            // Linux before 5.1.
            Err(Errno(ENOENT)) => open(task, CURRENT),
            other => other,
        },
        _ => open(task, CURRENT),
    };
    opened.map_err(|e| failed(Call::Open, e, task, c))
}

fn open(task: &Task, name: &'static [u8]) -> Result<usize, Errno> {
    let flags = WRITE_ONLY | CLOSE_ON_EXEC;
    // SAFETY: the name ends with a zero.
    unsafe { syscall4(nr::OPENAT, task.args.proc as usize, name.as_ptr() as usize, flags, 0) }
}

fn failed(call: Call, e: Errno, task: &Task, c: &Creds) -> Failed {
    let text = if c.profile.count != 0 { c.profile } else { c.sockcreate };
    Failed::new(call, Object::Label, e.0, 0, 0).named(task.table(text))
}

/// In one call, as modules want it.
fn write(fd: usize, text: &'static [u8]) -> Result<(), Failed> {
    // SAFETY: the text lies in the arena; the descriptor is not used afterwards.
    let written = unsafe {
        let written = syscall3(nr::WRITE, fd, text.as_ptr() as usize, text.len());
        let _ = syscall1(nr::CLOSE, fd);
        written
    };
    written.on(Call::Write, Object::Label, 0, 0).map(drop).map_err(|e| e.named(text))
}
