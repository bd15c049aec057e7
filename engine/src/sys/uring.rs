//! io_uring: making rings, asking them, looking at the memory they share with programs.
//!
//! # Safety
//! The kernel is given structures of their sizes that outlive the call, and no addresses of buffers in requests. A [`View`]
//! is mapped once and unmapped on drop; nothing refers to what lies in it, which others may change at any time: words are
//! read and written whole, and places are checked.
#![allow(unsafe_code)]

use std::{
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr::null_mut,
};

use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::{
    error::{Error, Result, SysContext},
    sys::errno,
};

/// `IORING_SETUP_*`, those that say how the memory is laid out.
pub const SQE128: u32 = 1 << 10;
/// See [`SQE128`].
pub const CQE32: u32 = 1 << 11;
/// See [`SQE128`]; Linux 6.6.
pub const NO_SQARRAY: u32 = 1 << 16;
/// `IORING_SETUP_SUBMIT_ALL` (Linux 5.18).
pub const SUBMIT_ALL: u32 = 1 << 7;
const CQSIZE: u32 = 1 << 3;

/// `IORING_FEAT_CQE_SKIP`: requests may ask for no event (Linux 5.17).
pub const CAN_SKIP: u32 = 1 << 11;

/// `IORING_ENTER_GETEVENTS` and `IORING_ENTER_EXT_ARG`.
const GET_EVENTS: u32 = 1;
const EXT_ARG: u32 = 1 << 3;

/// `IORING_REGISTER_*`.
pub const REGISTER_EVENTFD: u32 = 4;
/// See [`REGISTER_EVENTFD`].
pub const REGISTER_RESTRICTIONS: u32 = 11;
/// See [`REGISTER_EVENTFD`]; Linux 6.13.
pub const REGISTER_MEM_REGION: u32 = 34;
const REGISTER_PBUF_STATUS: u32 = 26;

const PAGE: u64 = 4096;

/// `struct io_uring_params`.
#[repr(C)]
#[derive(Default)]
struct Params {
    sq_entries: u32,
    cq_entries: u32,
    flags: u32,
    thread: [u32; 2],
    features: u32,
    wq_fd: u32,
    reserved: [u32; 3],
    sq: [u32; 10],
    cq: [u32; 10],
}

const _: () = assert!(size_of::<Params>() == 120);

/// What a ring is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Powers of two.
    pub sq_entries: u32,
    pub cq_entries: u32,
    /// [`SQE128`], [`CQE32`], [`NO_SQARRAY`].
    pub flags: u32,
}

/// Where in the memory of the rings the kernel has what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    sq: [u32; 7],
    cq: [u32; 7],
    /// `IORING_FEAT_*`.
    pub features: u32,
}

impl Layout {
    pub fn sq_head(&self) -> u32 {
        self.sq[0]
    }

    pub fn sq_tail(&self) -> u32 {
        self.sq[1]
    }

    pub fn sq_entries(&self) -> u32 {
        self.sq[3]
    }

    pub fn dropped(&self) -> u32 {
        self.sq[5]
    }

    pub fn array(&self) -> u32 {
        self.sq[6]
    }

    pub fn cq_head(&self) -> u32 {
        self.cq[0]
    }

    pub fn cq_tail(&self) -> u32 {
        self.cq[1]
    }

    pub fn cq_entries(&self) -> u32 {
        self.cq[3]
    }

    pub fn overflow(&self) -> u32 {
        self.cq[4]
    }

    pub fn events(&self) -> u32 {
        self.cq[5]
    }

    /// All of them, in the order of the kernel's structures.
    pub fn words(&self) -> Vec<u32> {
        [self.sq, self.cq].concat()
    }
}

impl Shape {
    /// Bytes of a request and of an event.
    pub fn sizes(&self) -> (u64, u64) {
        (64 << u32::from(self.flags & SQE128 != 0), 16 << u32::from(self.flags & CQE32 != 0))
    }

    /// Bytes of the memory of both rings.
    pub fn rings(&self, layout: &Layout) -> u64 {
        let end = match self.flags & NO_SQARRAY {
            0 => u64::from(layout.array()) + 4 * u64::from(self.sq_entries),
            _ => u64::from(layout.events()) + self.sizes().1 * u64::from(self.cq_entries),
        };
        end.next_multiple_of(PAGE)
    }

    /// Bytes of the memory of requests.
    pub fn requests(&self) -> u64 {
        (self.sizes().0 * u64::from(self.sq_entries)).next_multiple_of(PAGE)
    }
}

/// Makes a ring. Close-on-exec.
///
/// # Errors
/// ENOSYS if the kernel has none of this, EPERM where `kernel.io_uring_disabled` forbids it, EINVAL for flags that it does
/// not know.
pub fn setup(shape: &Shape) -> Result<(OwnedFd, Layout)> {
    let flags = shape.flags | CQSIZE;
    let mut params = Params { cq_entries: shape.cq_entries, flags, ..Params::default() };
    // SAFETY: a structure of its size.
    let ret = unsafe { libc::syscall(libc::SYS_io_uring_setup, shape.sq_entries, &raw mut params) };
    let fd = errno::check(ret, "io_uring_setup")?;
    // SAFETY: a new descriptor of ours.
    let ring = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    if (params.sq_entries, params.cq_entries) != (shape.sq_entries, shape.cq_entries) {
        return Err(Error::host(format!(
            "the kernel makes a ring of {} requests and {} events instead of {} and {}",
            params.sq_entries, params.cq_entries, shape.sq_entries, shape.cq_entries
        )));
    }
    let first = |words: [u32; 10]| std::array::from_fn(|at| words[at]);
    Ok((ring, Layout { sq: first(params.sq), cq: first(params.cq), features: params.features }))
}

fn enter(ring: BorrowedFd<'_>, submit: u32, least: u32, flags: u32, argument: &[u64]) -> Result<u32> {
    let (at, size) = match argument {
        [] => (std::ptr::null(), 0),
        _ => (argument.as_ptr(), size_of_val(argument)),
    };
    // SAFETY: no argument, or one of the size told that outlives the call.
    let ret =
        unsafe { libc::syscall(libc::SYS_io_uring_enter, ring.as_raw_fd(), submit, least, flags, at, size) };
    errno::check(ret, "io_uring_enter").map(|taken| taken as u32)
}

/// Has the kernel take up to `count` requests; gives how many it took.
pub fn submit(ring: BorrowedFd<'_>, count: u32) -> Result<u32> {
    enter(ring, count, 0, 0, &[])
}

/// Whether the ring is one that is polled (`IORING_SETUP_IOPOLL`): with nothing on its way, waiting for an event ends at
/// once there.
///
/// Precondition: there is no event that nobody has taken.
pub fn is_polled(ring: BorrowedFd<'_>) -> Result<bool> {
    let (wait, limit) = (1, [0u64, 1]);
    // struct io_uring_getevents_arg: no signal mask, a time.
    let argument = [0, 0, limit.as_ptr() as u64];
    match enter(ring, 0, wait, GET_EVENTS | EXT_ARG, &argument) {
        Ok(_) => Ok(true),
        Err(e) if e.errno() == Some(libc::ETIME) => Ok(false),
        Err(e) => Err(e),
    }
}

/// What io_uring_register(2) says to a request without an argument that it could read: an errno, or 0.
pub fn refuses(ring: BorrowedFd<'_>, request: u32, count: u32) -> i32 {
    // Some look whether there is an address before all else.
    let nowhere = std::ptr::without_provenance_mut::<u8>(1);
    // SAFETY: an address where the kernel finds nothing to read.
    let ret =
        unsafe { libc::syscall(libc::SYS_io_uring_register, ring.as_raw_fd(), request, nowhere, count) };
    if ret < 0 { errno::last() } else { 0 }
}

/// Whether buffers are provided under this number of a group; `None` if the kernel does not tell (before Linux 6.8).
pub fn has_buffers(ring: BorrowedFd<'_>, group: u16) -> Result<Option<bool>> {
    // struct io_uring_buf_status
    let mut status = [0u32; 10];
    status[0] = group.into();
    let at = status.as_mut_ptr();
    // SAFETY: a structure of its size.
    let ret =
        unsafe { libc::syscall(libc::SYS_io_uring_register, ring.as_raw_fd(), REGISTER_PBUF_STATUS, at, 1) };
    match errno::check(ret, "io_uring_register(IORING_REGISTER_PBUF_STATUS)") {
        Ok(_) => Ok(Some(true)),
        Err(e) if e.errno() == Some(libc::ENOENT) => Ok(Some(false)),
        // Or a group of the older form.
        Err(e) if e.errno() == Some(libc::EINVAL) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Which memory of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Both rings.
    Rings,
    /// Requests.
    Requests,
}

/// Memory of a ring, mapped here.
#[derive(Debug)]
pub struct View {
    at: *mut u8,
    len: u64,
}

impl View {
    /// # Errors
    /// EINVAL if it has less, or is memory of the program's own (`IORING_SETUP_NO_MMAP`).
    pub fn of(ring: BorrowedFd<'_>, part: Part, len: u64) -> Result<View> {
        let offset = match part {
            Part::Rings => 0,
            Part::Requests => 0x1000_0000,
        };
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_POPULATE);
        // SAFETY: where the kernel chooses.
        let at = unsafe { libc::mmap(null_mut(), len as usize, prot, flags, ring.as_raw_fd(), offset) };
        if at == libc::MAP_FAILED {
            return Err(Error::sys("mmap", errno::last()));
        }
        let view = View { at: at.cast(), len };
        // A kernel may map what is there and leave the rest without pages, where a touch would end this process.
        match view.has_all()? {
            true => Ok(view),
            false => Err(Error::sys("mmap", libc::EINVAL)),
        }
    }

    /// Whether the kernel can read the last byte.
    fn has_all(&self) -> Result<bool> {
        let file = memfd_create("rcriu-uring", MFdFlags::MFD_CLOEXEC).call("memfd_create")?;
        // SAFETY: inside the mapping, which the kernel reads.
        let last = unsafe { self.at.add(self.len as usize - 1) };
        // SAFETY: as above.
        match unsafe { libc::pwrite(file.as_raw_fd(), last.cast(), 1, 0) } {
            1 => Ok(true),
            _ if errno::last() == libc::EFAULT => Ok(false),
            _ => Err(Error::sys("pwrite", errno::last())),
        }
    }

    fn place(&self, at: u64, len: u64) -> Result<*mut u8> {
        if at.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(Error::host(format!("a ring has no {at:#x} in its {:#x} bytes", self.len)));
        }
        // SAFETY: inside the mapping.
        Ok(unsafe { self.at.add(at as usize) })
    }

    fn word_at(&self, at: u32) -> Result<*mut u32> {
        if !at.is_multiple_of(4) {
            return Err(Error::host(format!("a ring has a word at {at:#x}")));
        }
        Ok(self.place(at.into(), 4)?.cast())
    }

    /// The word at an offset.
    pub fn word(&self, at: u32) -> Result<u32> {
        let word = self.word_at(at)?;
        // SAFETY: inside the mapping, and aligned as it is.
        Ok(unsafe { word.read_volatile() })
    }

    /// Sets the word at an offset.
    pub fn set(&self, at: u32, value: u32) -> Result<()> {
        let word = self.word_at(at)?;
        std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
        // SAFETY: inside the mapping, and aligned as it is.
        unsafe { word.write_volatile(value) }
        Ok(())
    }

    /// All of it.
    pub fn bytes(&self) -> Vec<u8> {
        // SAFETY: all of the mapping, byte by byte.
        (0..self.len as usize).map(|at| unsafe { self.at.add(at).read_volatile() }).collect()
    }

    /// Writes bytes at an offset.
    pub fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let to = self.place(at, bytes.len() as u64)?;
        for (n, byte) in bytes.iter().enumerate() {
            // SAFETY: inside the mapping.
            unsafe { to.add(n).write_volatile(*byte) }
        }
        Ok(())
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: a mapping of ours that nothing refers to.
        unsafe { libc::munmap(self.at.cast(), self.len as usize) };
    }
}
