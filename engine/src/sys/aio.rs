//! Asynchronous I/O of the kernel: `io_setup(2)` and `io_submit(2)`, as far as rings are rebuilt with them.
//!
//! # Safety
//! Control blocks and the byte they write live until the call returns; they are only used with files that
//! complete a write at once.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd};

use crate::error::{Error, Result};
use crate::sys::errno;

/// `IOCB_CMD_PWRITE` of `linux/aio_abi.h`.
pub(super) const PWRITE: u16 = 1;

/// `struct iocb` of `linux/aio_abi.h`, little-endian.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ControlBlock {
    pub data: u64,
    /// Written by the kernel.
    pub key: u32,
    pub rw_flags: u32,
    pub opcode: u16,
    pub priority: i16,
    pub fd: u32,
    pub buffer: u64,
    pub len: u64,
    pub offset: i64,
    pub reserved: u64,
    pub flags: u32,
    pub eventfd: u32,
}

const _: () = assert!(size_of::<ControlBlock>() == 64);

/// Makes a context for at least `requests` requests; gives the address of its ring, which is its name as well.
///
/// # Errors
/// EAGAIN if the system has no room for it (`fs.aio-max-nr`), ENOSYS if the kernel has none of this.
pub fn setup(requests: u32) -> Result<u64> {
    let mut context: libc::c_ulong = 0;
    // SAFETY: one word is stored.
    let made = unsafe { libc::syscall(libc::SYS_io_setup, libc::c_ulong::from(requests), &raw mut context) };
    errno::check(made, "io_setup")?;
    Ok(context)
}

/// Lets up to `count` requests run in `context`, each of which writes a byte to `file`; gives how many were
/// taken.
pub fn submit_writes(context: u64, file: impl AsFd, count: usize) -> Result<usize> {
    let byte = 0u8;
    let block = ControlBlock {
        opcode: PWRITE,
        fd: file.as_fd().as_raw_fd().cast_unsigned(),
        buffer: (&raw const byte) as u64,
        len: 1,
        ..ControlBlock::default()
    };
    let mut blocks = vec![block; count.clamp(1, 512)];
    let list: Vec<*mut ControlBlock> = blocks.iter_mut().map(|b| b as *mut _).collect();
    // SAFETY: the blocks and the byte outlive the call; the file completes writes before it returns.
    let taken =
        unsafe { libc::syscall(libc::SYS_io_submit, context, list.len() as libc::c_long, list.as_ptr()) };
    let taken = errno::check(taken, "io_submit")?;
    usize::try_from(taken).map_err(|_| Error::bug("io_submit took too many"))
}
