//! Asynchronous I/O of the kernel: contexts with events that nobody has taken yet, at any place of the ring.
//!
//! # Safety
//!
//! Control blocks and buffers live until their requests have completed: writes to a file's pages complete
//! before io_submit returns.

use std::fs::File;
use std::os::fd::AsRawFd;

use anyhow::Context as _;

use crate::kit::{Check, rest, same, skip, sys};

/// `struct iocb` and `struct io_event` of `linux/aio_abi.h`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Request {
    data: u64,
    key_flags: u64,
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    len: u64,
    offset: i64,
    rest: [u64; 2],
}

#[repr(C)]
#[derive(Clone, Copy, Default, Debug, PartialEq)]
pub struct Event {
    data: u64,
    request: u64,
    result: i64,
    result2: i64,
}

const WRITE: u16 = 1;

pub fn setup(requests: u32) -> anyhow::Result<u64> {
    let mut context = 0u64;
    // SAFETY: one word is stored.
    match unsafe { libc::syscall(libc::SYS_io_setup, requests, &raw mut context) } {
        0 => Ok(context),
        _ => Err(skip(format!("io_setup: {}", nix::errno::Errno::last()))),
    }
}

/// Lets a request run that writes one byte and is known by `data`.
pub fn submit(context: u64, file: &File, data: u64) -> Check {
    let byte = data as u8;
    let mut request = Request {
        data,
        opcode: WRITE,
        fd: file.as_raw_fd() as u32,
        buffer: (&raw const byte) as u64,
        len: 1,
        offset: data as i64,
        ..Request::default()
    };
    let list = [&raw mut request];
    // SAFETY: the request completes within the call.
    let taken = unsafe { libc::syscall(libc::SYS_io_submit, context, 1i64, list.as_ptr()) };
    same("requests taken", sys("io_submit", taken)?, 1)
}

/// The file that requests write to.
pub fn file() -> anyhow::Result<File> {
    File::options().create(true).truncate(true).read(true).write(true).open("data").context("data")
}

/// Takes the events that are there, up to `most`.
fn take(context: u64, most: usize) -> anyhow::Result<Vec<(u64, i64)>> {
    let mut events = vec![Event::default(); most];
    let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: room for `most` events.
    let got = unsafe {
        libc::syscall(
            libc::SYS_io_getevents,
            context,
            0i64,
            most as i64,
            events.as_mut_ptr(),
            &raw const none,
        )
    };
    events.truncate(sys("io_getevents", got)? as usize);
    Ok(events.iter().map(|e| (e.data, e.result)).collect())
}

/// See the module.
pub fn run(_: &[String]) -> Check {
    let file = file()?;
    let (fresh, full, wrapped) = (setup(1)?, setup(10)?, setup(3)?);
    for data in 0..5 {
        submit(full, &file, data)?;
    }
    same("first events", take(full, 2)?, vec![(0, 1), (1, 1)])?;
    // Around the ring more than once, whatever its size.
    for data in 0..1000 {
        submit(wrapped, &file, data)?;
        same("event", take(wrapped, 9)?, vec![(data, 1)])?;
    }
    for data in 1000..1003 {
        submit(wrapped, &file, data)?;
    }
    rest()?;
    same("events of an unused context", take(fresh, 9)?, vec![])?;
    same("events not taken", take(full, 9)?, vec![(2, 1), (3, 1), (4, 1)])?;
    same("events not taken, around", take(wrapped, 9)?, vec![(1000, 1), (1001, 1), (1002, 1)])?;
    for context in [fresh, full, wrapped] {
        for data in 0..300 {
            submit(context, &file, data)?;
            same("event after", take(context, 9)?, vec![(data, 1)])?;
        }
        // SAFETY: a context of ours.
        sys("io_destroy", unsafe { libc::syscall(libc::SYS_io_destroy, context) })?;
    }
    Ok(())
}
