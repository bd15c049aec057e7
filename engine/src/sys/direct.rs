//! Reads and writes past the page cache (`O_DIRECT`), several at a time: asynchronous I/O of the kernel.
//!
//! A direct write that is waited for in its system call holds the lock of the file meanwhile, which those who write
//! the same file through the page cache need. One that is only handed in does not.
//!
//! # Safety
//! Memory of a request belongs to the kernel until its event was taken. What is written lies in buffers that are
//! handed over for as long; what is read goes into regions, in which no Rust object lies. A context that is dropped
//! waits for all of its requests before anything of that goes.
#![allow(unsafe_code)]

use std::{
    fs::File,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, OpenOptionsExt},
    },
};

use memmap2::{Advice, MmapMut, MmapOptions};

use super::{
    aio::{self, ControlBlock, PWRITE},
    errno,
    map::Region,
};
use crate::error::{Result, SysContext};

/// `IOCB_CMD_PREADV` of `linux/aio_abi.h`.
const PREADV: u16 = 7;
/// Events taken at once.
const EVENTS: usize = 32;

/// `struct io_event` of `linux/aio_abi.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Event {
    data: u64,
    block: u64,
    result: i64,
    more: i64,
}

const _: () = assert!(size_of::<Event>() == 32);

/// The file once more, for direct reads or writes of its own.
///
/// # Errors
/// EINVAL where the file system has no such thing.
pub fn reopen(file: &File, write: bool) -> Result<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    File::options().read(!write).write(write).custom_flags(libc::O_DIRECT).open(path).call("open(O_DIRECT)")
}

#[derive(Debug)]
struct Context {
    id: u64,
    /// Requests whose events were not taken yet.
    flying: usize,
}

impl Context {
    fn new(room: u32) -> Result<Context> {
        Ok(Context { id: aio::setup(room)?, flying: 0 })
    }

    /// # Safety
    /// The memory that `block` names is the kernel's until the event of this request was taken or the context is
    /// gone.
    unsafe fn submit(&mut self, mut block: ControlBlock) -> Result<()> {
        let list = [&raw mut block];
        // SAFETY: the kernel copies the block; its memory is as the caller says.
        let taken = unsafe { libc::syscall(libc::SYS_io_submit, self.id, 1 as libc::c_long, list.as_ptr()) };
        errno::check(taken, "io_submit")?;
        self.flying += 1;
        Ok(())
    }

    /// What is done, by the `data` of its request and its result; if `wait` says so and anything is on its way, at
    /// least one.
    fn done(&mut self, wait: bool) -> Result<Vec<(u64, i64)>> {
        let mut all = Vec::new();
        while self.flying > 0 {
            let mut events = [Event::default(); EVENTS];
            let least = libc::c_long::from(wait && all.is_empty());
            let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            let timeout = if least > 0 { std::ptr::null_mut() } else { &raw mut now };
            // SAFETY: there is room for as many events; a timeout outlives the call.
            let count = unsafe {
                let to = events.as_mut_ptr();
                libc::syscall(libc::SYS_io_getevents, self.id, least, EVENTS as libc::c_long, to, timeout)
            };
            let count = match errno::check(count, "io_getevents") {
                Err(e) if e.errno() == Some(libc::EINTR) => continue,
                other => other?,
            };
            if count == 0 {
                break;
            }
            self.flying -= count as usize;
            all.extend(events.iter().take(count as usize).map(|e| (e.data, e.result)));
        }
        Ok(all)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the context is ours; the call comes back when nothing is on its way any more.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.id) };
    }
}

/// Memory for a write, `len` bytes; of huge pages where there are any, which makes the requests of the device few.
pub fn buffer(len: usize) -> Result<MmapMut> {
    let buffer = MmapOptions::new().len(len).map_anon().call("mmap")?;
    // Only advice.
    let _ = buffer.advise(Advice::HugePage);
    Ok(buffer)
}

/// Bytes on their way into a file, or that have been.
#[derive(Debug)]
pub struct Flight {
    pub buffer: MmapMut,
    pub offset: u64,
    pub len: usize,
}

impl Flight {
    /// Writes the same through the page cache.
    pub fn write_to(&self, file: &File) -> Result<()> {
        file.write_all_at(&self.buffer[..self.len], self.offset).call("pwrite")
    }
}

/// Writes on their way.
#[derive(Debug)]
pub struct Writes {
    // Dropped first: waits.
    context: Context,
    flights: Vec<Option<Flight>>,
}

impl Writes {
    /// Room for `room` at the same time.
    pub fn new(room: usize) -> Result<Writes> {
        let flights = (0..room).map(|_| None).collect();
        Ok(Writes { context: Context::new(room as u32)?, flights })
    }

    /// Bytes on their way.
    pub fn flying(&self) -> u64 {
        self.flights.iter().flatten().map(|f| f.len as u64).sum()
    }

    /// Starts a write to `file`, which was opened by [`reopen`]; gives the bytes back if that cannot be done.
    pub fn start(&mut self, file: &File, flight: Flight) -> std::result::Result<(), Flight> {
        let Some(at) = self.flights.iter().position(Option::is_none) else { return Err(flight) };
        let block = ControlBlock {
            data: at as u64,
            opcode: PWRITE,
            fd: file.as_raw_fd().cast_unsigned(),
            buffer: flight.buffer.as_ptr() as u64,
            len: flight.len.min(flight.buffer.len()) as u64,
            offset: flight.offset.cast_signed(),
            ..ControlBlock::default()
        };
        // SAFETY: the buffer stays in the list of flights until its event was taken, which goes after the context.
        match unsafe { self.context.submit(block) } {
            Ok(()) => {
                self.flights[at] = Some(flight);
                Ok(())
            }
            Err(_) => Err(flight),
        }
    }

    /// Those that are done, and whether they wrote all; if `wait` says so and anything is on its way, at least one.
    pub fn done(&mut self, wait: bool) -> Result<Vec<(Flight, bool)>> {
        let done = self.context.done(wait)?.into_iter();
        let ended = done.filter_map(|(at, result)| {
            let flight = self.flights.get_mut(at as usize)?.take()?;
            let whole = result == flight.len as i64;
            Some((flight, whole))
        });
        Ok(ended.collect())
    }
}

/// Reads into a region on their way.
#[derive(Debug)]
pub struct Reads<'r> {
    context: Context,
    region: &'r Region,
}

impl<'r> Reads<'r> {
    /// Room for `room` at the same time.
    pub fn new(region: &'r Region, room: usize) -> Result<Reads<'r>> {
        Ok(Reads { context: Context::new(room as u32)?, region })
    }

    /// How many are on their way.
    pub fn flying(&self) -> usize {
        self.context.flying
    }

    /// Starts to read from `offset` of `file`, which was opened by [`reopen`], into `pieces` (address and length) one
    /// after the other; `name` tells which it was when it is done.
    pub fn start(&mut self, file: &File, offset: u64, pieces: &[(u64, u64)], name: u64) -> Result<()> {
        pieces.iter().try_for_each(|&(at, len)| self.region.check(at, len))?;
        let list: Vec<libc::iovec> = pieces
            .iter()
            .map(|&(at, len)| libc::iovec { iov_base: at as *mut _, iov_len: len as usize })
            .collect();
        let block = ControlBlock {
            data: name,
            opcode: PREADV,
            fd: file.as_raw_fd().cast_unsigned(),
            buffer: list.as_ptr() as u64,
            len: list.len() as u64,
            offset: offset.cast_signed(),
            ..ControlBlock::default()
        };
        // SAFETY: the kernel copies the list; its pieces are inside the region, in which no Rust object lies and which
        // outlives the context.
        unsafe { self.context.submit(block) }
    }

    /// Those that are done: name and result of read(2); if `wait` says so and any is on its way, at least one.
    pub fn done(&mut self, wait: bool) -> Result<Vec<(u64, i64)>> {
        self.context.done(wait)
    }
}
