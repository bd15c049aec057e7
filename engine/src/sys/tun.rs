//! Requests to `/dev/net/tun`.
//!
//! # Safety
//! Every request passes a number, or a pointer to a local of the size the request's structure has.
#![allow(unsafe_code)]

use std::{
    fs::File,
    os::fd::{AsRawFd, BorrowedFd},
};

use crate::error::{Error, Result, SysContext};

const PATH: &str = "/dev/net/tun";
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const TUNSETPERSIST: libc::Ioctl = 0x4004_54cb;
const TUNSETOWNER: libc::Ioctl = 0x4004_54cc;
const TUNSETGROUP: libc::Ioctl = 0x4004_54ce;
const TUNGETIFF: libc::Ioctl = 0x8004_54d2;
const TUNSETQUEUE: libc::Ioctl = 0x4004_54d9;
const TUNGETVNETLE: libc::Ioctl = 0x8004_54dd;
const TUNGETVNETBE: libc::Ioctl = 0x8004_54df;
const IFF_DETACH_QUEUE: u16 = 0x400;
const TUNGETSNDBUF: libc::Ioctl = 0x8004_54d3;
const TUNSETSNDBUF: libc::Ioctl = 0x4004_54d4;
const TUNGETVNETHDRSZ: libc::Ioctl = 0x8004_54d7;
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;
const TUNGETFILTER: libc::Ioctl = 0x8010_54db;
const TUNSETIFINDEX: libc::Ioctl = 0x4004_54da;
/// Bytes of `struct ifreq` and of a name in it.
const IFREQ: usize = 40;
const NAME: usize = 16;

/// Opens the file for a device of the namespace this thread is in.
///
/// # Errors
/// ENOENT or ENXIO without the driver.
pub(crate) fn open() -> Result<File> {
    File::options().read(true).write(true).open(PATH).call(format!("open({PATH})"))
}

fn failed(name: &'static str) -> Error {
    Error::io(name, &std::io::Error::last_os_error())
}

fn with_number(fd: BorrowedFd<'_>, name: &'static str, request: libc::Ioctl, value: u32) -> Result<()> {
    // SAFETY: these requests take the number itself.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), request, libc::c_ulong::from(value)) };
    if r < 0 { Err(failed(name)) } else { Ok(()) }
}

fn with_place(fd: BorrowedFd<'_>, name: &'static str, request: libc::Ioctl, value: &mut u32) -> Result<()> {
    // SAFETY: these requests read or write one int.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(value)) };
    if r < 0 { Err(failed(name)) } else { Ok(()) }
}

/// Makes or opens device `name`; `flags` are `IFF_TUN` and the like.
///
/// # Errors
/// EBUSY if somebody has it open; EINVAL if it is of another type.
pub(crate) fn attach(fd: BorrowedFd<'_>, name: &str, flags: u32) -> Result<()> {
    let mut request = [0u8; IFREQ];
    let bytes = name.as_bytes();
    let place = request.get_mut(..bytes.len()).filter(|p| p.len() < NAME);
    place.ok_or_else(|| Error::image(format!("{name} is no name of a device")))?.copy_from_slice(bytes);
    request[NAME..NAME + 2].copy_from_slice(&(flags as u16).to_ne_bytes());
    // SAFETY: a local of the size of struct ifreq.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) };
    if r < 0 { Err(failed("ioctl(TUNSETIFF)")) } else { Ok(()) }
}

/// Whether a filter of packets is attached to a tap device.
pub(crate) fn has_filter(fd: BorrowedFd<'_>) -> Result<bool> {
    // struct sock_fprog
    let mut filter = [0u64; 2];
    // SAFETY: a local of the size of struct sock_fprog.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), TUNGETFILTER, filter.as_mut_ptr()) };
    if r < 0 { Err(failed("ioctl(TUNGETFILTER)")) } else { Ok(filter[0] & 0xffff != 0) }
}

/// Chooses the number of the device that is made next.
pub(crate) fn set_index(fd: BorrowedFd<'_>, mut index: u32) -> Result<()> {
    with_place(fd, "ioctl(TUNSETIFINDEX)", TUNSETIFINDEX, &mut index)
}

/// The user who may open it.
pub(crate) fn set_owner(fd: BorrowedFd<'_>, uid: u32) -> Result<()> {
    with_number(fd, "ioctl(TUNSETOWNER)", TUNSETOWNER, uid)
}

/// The group that may open it.
pub(crate) fn set_group(fd: BorrowedFd<'_>, gid: u32) -> Result<()> {
    with_number(fd, "ioctl(TUNSETGROUP)", TUNSETGROUP, gid)
}

/// Whether the device stays when nobody has it open.
pub(crate) fn set_persistent(fd: BorrowedFd<'_>, stays: bool) -> Result<()> {
    with_number(fd, "ioctl(TUNSETPERSIST)", TUNSETPERSIST, stays.into())
}

/// Name and flags of the device whose end this is; `None` if it has none.
pub(crate) fn device(fd: BorrowedFd<'_>) -> Result<Option<(String, u32)>> {
    let mut request = [0u8; IFREQ];
    // SAFETY: a local of the size of struct ifreq.
    if unsafe { libc::ioctl(fd.as_raw_fd(), TUNGETIFF, request.as_mut_ptr()) } < 0 {
        return match failed("ioctl(TUNGETIFF)") {
            e if e.errno() == Some(libc::EBADFD) => Ok(None),
            e => Err(e),
        };
    }
    let name: Vec<u8> = request.iter().take(NAME).copied().take_while(|c| *c != 0).collect();
    let flags = u16::from_ne_bytes([request[NAME], request[NAME + 1]]);
    Ok(Some((String::from_utf8_lossy(&name).into_owned(), flags.into())))
}

/// Takes the queue of this file out of use.
pub(crate) fn detach_queue(fd: BorrowedFd<'_>) -> Result<()> {
    let mut request = [0u8; IFREQ];
    request[NAME..NAME + 2].copy_from_slice(&IFF_DETACH_QUEUE.to_ne_bytes());
    // SAFETY: a local of the size of struct ifreq.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETQUEUE, request.as_mut_ptr()) };
    if r < 0 { Err(failed("ioctl(TUNSETQUEUE)")) } else { Ok(()) }
}

/// Whether the byte order of headers before packets was set.
pub(crate) fn has_byte_order(fd: BorrowedFd<'_>) -> Result<bool> {
    for (name, request) in [("ioctl(TUNGETVNETLE)", TUNGETVNETLE), ("ioctl(TUNGETVNETBE)", TUNGETVNETBE)] {
        let mut set = 0;
        match with_place(fd, name, request, &mut set) {
            // The second is not in all kernels.
            Err(e) if matches!(e.errno(), Some(libc::EINVAL | libc::ENOTTY)) => {}
            other => other?,
        }
        if set != 0 {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Bytes that may wait to be sent.
pub(crate) fn send_buffer(fd: BorrowedFd<'_>) -> Result<u32> {
    let mut value = 0;
    with_place(fd, "ioctl(TUNGETSNDBUF)", TUNGETSNDBUF, &mut value).map(|()| value)
}

/// Sets [`send_buffer`].
pub(crate) fn set_send_buffer(fd: BorrowedFd<'_>, mut bytes: u32) -> Result<()> {
    with_place(fd, "ioctl(TUNSETSNDBUF)", TUNSETSNDBUF, &mut bytes)
}

/// Bytes of the header before each packet.
pub(crate) fn header(fd: BorrowedFd<'_>) -> Result<u32> {
    let mut value = 0;
    with_place(fd, "ioctl(TUNGETVNETHDRSZ)", TUNGETVNETHDRSZ, &mut value).map(|()| value)
}

/// Sets [`header`].
pub(crate) fn set_header(fd: BorrowedFd<'_>, mut bytes: u32) -> Result<()> {
    with_place(fd, "ioctl(TUNSETVNETHDRSZ)", TUNSETVNETHDRSZ, &mut bytes)
}
