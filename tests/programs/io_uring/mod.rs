//! io_uring: events that nobody has taken, requests that were not submitted, a ring that parent and children share.
//!
//! # Safety
//!
//! The kernel gets structures of their sizes and buffers that live until their requests have completed; rings are mapped
//! until the process ends, and words of them are read and written whole.

pub mod held;

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;

use crate::kit::crew::member;
use crate::kit::mem::{self, PAGE};
use crate::kit::{Check, rest, same, skip, sys};

pub const CQSIZE: u32 = 1 << 3;
const SQE128: u32 = 1 << 10;
const CQE32: u32 = 1 << 11;
const NO_SQARRAY: u32 = 1 << 16;

const WRITE: u8 = 23;
const READ: u8 = 22;
const NOP: u8 = 0;
/// Flags of requests.
const ASYNC: u8 = 1 << 4;
pub const NO_EVENT: u8 = 1 << 6;

/// `struct io_uring_params`, in words.
pub type Params = [u32; 30];

/// A request; what is not told is zero.
#[derive(Clone, Copy, Default)]
pub struct Request {
    pub opcode: u8,
    pub flags: u8,
    pub fd: i32,
    pub offset: u64,
    pub address: u64,
    pub len: u32,
    /// For each opcode another thing.
    pub more: u32,
    pub data: u64,
    pub group: u16,
}

pub struct Ring {
    pub fd: OwnedFd,
    params: Params,
    rings: mem::Mapping,
    requests: mem::Mapping,
}

pub fn setup(entries: u32, params: &mut Params) -> Result<OwnedFd> {
    // SAFETY: a structure of its size.
    let ret = unsafe { libc::syscall(libc::SYS_io_uring_setup, entries, params.as_mut_ptr()) };
    match Errno::result(ret) {
        // SAFETY: a new descriptor of ours.
        Ok(fd) => Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) }),
        Err(e @ (Errno::EPERM | Errno::ENOSYS | Errno::EINVAL)) => {
            Err(skip(format!("no io_uring with flags {:#x} can be made: {e}", params[2])))
        }
        Err(e) => bail!("io_uring_setup: {e}"),
    }
}

pub fn register(fd: &OwnedFd, request: u32, argument: *const libc::c_void, count: u32) -> Result<i64> {
    // SAFETY: callers give what the request takes.
    let ret = unsafe { libc::syscall(libc::SYS_io_uring_register, fd.as_raw_fd(), request, argument, count) };
    Errno::result(ret).with_context(|| format!("io_uring_register({request})"))
}

impl Ring {
    /// Of so many requests, with `flags`; `events` counts with CQSIZE.
    pub fn new(entries: u32, flags: u32, events: u32) -> Result<Ring> {
        let mut params: Params = [0; 30];
        (params[1], params[2]) = (events, flags);
        let fd = setup(entries, &mut params)?;
        let told = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
        if !told.contains("SqMask") {
            return Err(skip("this kernel does not tell of io_urings (Linux 5.16 does)"));
        }
        let file = File::from(fd.try_clone()?);
        let shared = |len: usize, offset| {
            let len = len.next_multiple_of(PAGE);
            mem::map(len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, Some((&file, offset)))
        };
        let event = 16 << u32::from(flags & CQE32 != 0);
        let end = params[25] as usize + params[1] as usize * event;
        let array = if flags & NO_SQARRAY == 0 { params[16] as usize + 4 * params[0] as usize } else { 0 };
        let rings = shared(end.max(array), 0)?;
        let requests = shared(params[0] as usize * (64 << u32::from(flags & SQE128 != 0)), 0x1000_0000)?;
        let ring = Ring { fd, params, rings, requests };
        if flags & NO_SQARRAY == 0 {
            // Every request has its place, but not the one of its number.
            for slot in 0..params[0] {
                ring.set(params[16] + 4 * slot, params[0] - 1 - slot);
            }
        }
        Ok(ring)
    }

    pub fn word(&self, at: u32) -> u32 {
        // SAFETY: callers give places in the mapping.
        unsafe { ((self.rings.at + at as usize) as *const u32).read_volatile() }
    }

    fn set(&self, at: u32, value: u32) {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        // SAFETY: callers give places in the mapping.
        unsafe { ((self.rings.at + at as usize) as *mut u32).write_volatile(value) }
    }

    /// Puts a request into the ring.
    pub fn put(&self, request: &Request) {
        let (tail, slot) = (self.word(self.params[11]), |tail| tail & (self.params[0] - 1));
        let place = match self.params[2] & NO_SQARRAY {
            0 => self.word(self.params[16] + 4 * slot(tail)),
            _ => slot(tail),
        };
        let large = self.params[2] & SQE128 != 0;
        let mut bytes = [0u8; 64];
        (bytes[0], bytes[1]) = (request.opcode, request.flags);
        bytes[4..8].copy_from_slice(&request.fd.to_ne_bytes());
        bytes[8..16].copy_from_slice(&request.offset.to_ne_bytes());
        bytes[16..24].copy_from_slice(&request.address.to_ne_bytes());
        bytes[24..28].copy_from_slice(&request.len.to_ne_bytes());
        bytes[28..32].copy_from_slice(&request.more.to_ne_bytes());
        bytes[32..40].copy_from_slice(&request.data.to_ne_bytes());
        bytes[40..42].copy_from_slice(&request.group.to_ne_bytes());
        let at = self.requests.at + place as usize * (64 << u32::from(large));
        // SAFETY: in the mapping of requests.
        unsafe { (at as *mut [u8; 64]).write_volatile(bytes) };
        self.set(self.params[11], tail.wrapping_add(1));
    }

    /// Has the kernel take `submit` requests and wait for `events`.
    pub fn enter(&self, submit: u32, events: u32) -> Check {
        let flags = u32::from(events > 0);
        // SAFETY: no argument.
        let ret = unsafe {
            libc::syscall(libc::SYS_io_uring_enter, self.fd.as_raw_fd(), submit, events, flags, 0, 0)
        };
        same("requests taken", Errno::result(ret).context("io_uring_enter")?, submit.into())
    }

    /// Takes an event: data and result.
    pub fn take(&self) -> Option<(u64, i32)> {
        let (head, tail) = (self.word(self.params[20]), self.word(self.params[21]));
        if head == tail {
            return None;
        }
        let size = 16 << u32::from(self.params[2] & CQE32 != 0);
        let at = self.params[25] + (head & (self.params[1] - 1)) * size;
        let data = u64::from(self.word(at)) | u64::from(self.word(at + 4)) << 32;
        let result = self.word(at + 8).cast_signed();
        self.set(self.params[20], head.wrapping_add(1));
        Some((data, result))
    }

    /// A request, from beginning to end.
    pub fn one(&self, request: &Request) -> Result<i32> {
        self.put(request);
        self.enter(1, 1)?;
        match self.take() {
            Some((data, result)) if data == request.data => Ok(result),
            other => bail!("the event {other:?} instead of that of {}", request.data),
        }
    }

    /// Unmaps the first page of the rings, which are of no use then.
    pub fn unmap_first(&self) -> Check {
        // SAFETY: a page of ours that nothing refers to.
        sys("munmap", unsafe { libc::munmap(self.rings.at as *mut libc::c_void, PAGE) }).map(drop)
    }

    /// Places of kernel and program in the rings.
    fn places(&self) -> [u32; 4] {
        [10, 11, 20, 21].map(|at| self.word(self.params[at]))
    }
}

pub fn nop(data: u64) -> Request {
    Request { opcode: NOP, data, ..Request::default() }
}

fn transfer(opcode: u8, file: &File, offset: u64, bytes: &[u8], flags: u8) -> Request {
    let (fd, address, len) = (file.as_raw_fd(), bytes.as_ptr() as u64, bytes.len() as u32);
    Request { opcode, flags, fd, offset, address, len, data: 90, ..Request::default() }
}

/// See the module.
pub fn run(args: &[String]) -> Check {
    let what = args.first().map_or("", String::as_str);
    let ring = match what {
        "large" => Ring::new(4, SQE128 | CQE32, 0),
        "no-array" => Ring::new(64, NO_SQARRAY, 0),
        "few-without-array" => Ring::new(8, NO_SQARRAY, 0),
        "many-events" => Ring::new(8, CQSIZE, 256),
        "one" => Ring::new(1, 0, 0),
        _ => Ring::new(256, 0, 0),
    }?;
    for n in 0..1_001 {
        same("a request that does nothing", ring.one(&nop(n))?, 0)?;
    }
    let file = File::options().create(true).truncate(true).read(true).write(true).open("data")?;
    let flags = if what == "workers" { ASYNC } else { 0 };
    same("bytes written", ring.one(&transfer(WRITE, &file, 0, b"before", flags))?, 6)?;
    // Two events that nobody takes, and a request that nobody submits.
    for n in [71, 72] {
        ring.put(&nop(n));
        ring.enter(1, 0)?;
    }
    ring.put(&nop(73));
    let places = ring.places();
    let child = member(|| {
        rest()?;
        same("places, in the child", ring.places(), places)?;
        same("first event", ring.take(), Some((71, 0)))?;
        same("second event", ring.take(), Some((72, 0)))?;
        same("no third", ring.take(), None)?;
        ring.enter(1, 1)?;
        same("event of the request that was left", ring.take(), Some((73, 0)))?;
        same("one of the child's own", ring.one(&nop(80))?, 0)
    })?;
    // Its mapping is all that this one has.
    let watcher = member(|| {
        let number = ring.fd.as_raw_fd();
        nix::unistd::close(number).context("close")?;
        rest()?;
        same("places, in the child without a descriptor", ring.places(), places)
    })?;
    rest()?;
    watcher.verify()?;
    same("places", ring.places(), places)?;
    child.verify()?;
    let [taken, put, read, given] = places;
    same("places after the child", ring.places(), [taken + 2, put + 1, read + 4, given + 2])?;
    same("bytes written afterwards", ring.one(&transfer(WRITE, &file, 6, b", after", flags))?, 7)?;
    let bytes = [0u8; 13];
    same("bytes read", ring.one(&transfer(READ, &file, 0, &bytes, flags))?, 13)?;
    // SAFETY: written by the kernel.
    let seen = unsafe { std::ptr::from_ref(&bytes).read_volatile() };
    same("what was written", &seen, b"before, after")?;
    for n in 0..1_001 {
        same("a request that does nothing", ring.one(&nop(n))?, 0)?;
    }
    Ok(())
}
