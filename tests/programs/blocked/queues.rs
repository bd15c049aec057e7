//! Calls that wait for semaphores, messages and events of requests.
//!
//! # Safety
//!
//! As in the module above: structures outlive the calls they are given to.

use anyhow::Context;
use nix::errno::Errno;

use super::{Caller, caller, raw, returned, still_in};
use crate::aio;
use crate::kit::{Check, rest, same, skip};

const FAR: libc::timespec = libc::timespec { tv_sec: 3000, tv_nsec: 0 };
/// libc does not have it for x86_64.
const SYS_IO_PGETEVENTS: i64 = 333;

/// Removes what it names when its maker ends.
struct Removed(fn(i32), i32);

impl Drop for Removed {
    fn drop(&mut self) {
        self.0(self.1);
    }
}

fn semaphores() -> anyhow::Result<Removed> {
    // SAFETY: numbers only.
    match unsafe { libc::semget(libc::IPC_PRIVATE, 3, 0o600) } {
        -1 => Err(skip(format!("semget: {}", Errno::last()))),
        id => Ok(Removed(
            |id| {
                // SAFETY: numbers only.
                unsafe { libc::semctl(id, 0, libc::IPC_RMID) };
            },
            id,
        )),
    }
}

fn messages() -> anyhow::Result<Removed> {
    // SAFETY: numbers only.
    match unsafe { libc::msgget(libc::IPC_PRIVATE, 0o600) } {
        -1 => Err(skip(format!("msgget: {}", Errno::last()))),
        id => Ok(Removed(
            |id| {
                // SAFETY: no structure is read or written.
                unsafe { libc::msgctl(id, libc::IPC_RMID, std::ptr::null_mut()) };
            },
            id,
        )),
    }
}

fn semop(id: i32, number: u16, by: i16, timeout: Option<&libc::timespec>) -> Result<(), Errno> {
    let mut op = libc::sembuf { sem_num: number, sem_op: by, sem_flg: 0 };
    raw(match timeout {
        // SAFETY: one operation.
        None => unsafe { libc::semop(id, &raw mut op, 1).into() },
        // SAFETY: one operation; the timeout outlives the call.
        Some(timeout) => unsafe { libc::syscall(libc::SYS_semtimedop, id, &raw mut op, 1, timeout) },
    })
}

#[repr(C)]
struct Message {
    kind: i64,
    text: [u8; 4096],
}

fn send(id: i32, kind: i64, len: usize, flags: i32) -> Result<(), Errno> {
    let message = Message { kind, text: [7; 4096] };
    // SAFETY: the message has at least `len` bytes of text.
    raw(unsafe { libc::msgsnd(id, (&raw const message).cast(), len.min(4096), flags) }.into())
}

fn receive(id: i32, kind: i64) -> Result<(), Errno> {
    let mut message = Message { kind: 0, text: [0; 4096] };
    // SAFETY: room for 4096 bytes of text.
    raw(unsafe { libc::msgrcv(id, (&raw mut message).cast(), 4096, kind, 0) } as i64)
}

fn getevents(call: i64, context: u64, timeout: Option<&'static libc::timespec>) -> Result<(), Errno> {
    let mut event = aio::Event::default();
    let timeout = timeout.map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: room for one event; the timeout is a constant; no mask.
    raw(unsafe { libc::syscall(call, context, 1i64, 1i64, &raw mut event, timeout, 0) })
}

/// semop, semtimedop, msgrcv, msgsnd to a full queue.
pub fn run(_: &[String]) -> Check {
    let (set, empty, full) = (semaphores()?, messages()?, messages()?);
    while send(full.1, 1, 4096, libc::IPC_NOWAIT).is_ok() {}
    let (set_id, empty_id, full_id) = (set.1, empty.1, full.1);
    // A wait for zero needs one that is not.
    semop(set_id, 2, 1, None).context("semop")?;
    let callers: Vec<Caller> = vec![
        caller("semop", move || semop(set_id, 0, -1, None))?,
        caller("semtimedop", move || semop(set_id, 1, -1, Some(&FAR)))?,
        caller("semtimedop for zero", move || semop(set_id, 2, 0, Some(&FAR)))?,
        caller("msgrcv", move || receive(empty_id, 0))?,
        caller("msgrcv of a kind", move || receive(empty_id, 5))?,
        caller("msgsnd", move || send(full_id, 2, 4096, 0))?,
    ];
    rest()?;
    still_in(&callers)?;
    semop(set_id, 0, 1, None).context("semop")?;
    semop(set_id, 1, 1, None).context("semop")?;
    semop(set_id, 2, -1, None).context("semop")?;
    send(empty_id, 3, 8, 0).context("msgsnd")?;
    send(empty_id, 5, 8, 0).context("msgsnd")?;
    receive(full_id, 1).context("msgrcv")?;
    returned(callers)
}

/// io_getevents and io_pgetevents.
pub fn requests(_: &[String]) -> Check {
    let file = aio::file()?;
    let calls: [(&str, i64, Option<&'static libc::timespec>); 4] = [
        ("io_getevents", libc::SYS_io_getevents, None),
        ("io_getevents with a timeout", libc::SYS_io_getevents, Some(&FAR)),
        ("io_pgetevents", SYS_IO_PGETEVENTS, None),
        ("io_pgetevents with a timeout", SYS_IO_PGETEVENTS, Some(&FAR)),
    ];
    let (mut callers, mut contexts) = (Vec::new(), Vec::new());
    for (name, call, timeout) in calls {
        let context = aio::setup(4)?;
        callers.push(caller(name, move || getevents(call, context, timeout))?);
        contexts.push(context);
    }
    rest()?;
    still_in(&callers)?;
    same("callers", callers.len(), contexts.len())?;
    contexts.into_iter().try_for_each(|context| aio::submit(context, &file, 1))?;
    returned(callers)
}
