//! Probes about sockets, their options, and tun devices.
//!
//! # Safety
//! As in the parent module.
#![allow(unsafe_code)]

use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::{answer, errno, exists, must};
use crate::error::{Error, Result, SysContext};

fn socket(family: i32, kind: i32) -> Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = must("socket", i64::from(unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, 0) }))?;
    // SAFETY: the kernel just gave us this number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// An option read as raw bytes.
fn get(fd: &impl AsRawFd, level: i32, name: i32, value: &mut [u8]) -> i64 {
    let mut len = value.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most len bytes.
    i64::from(unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &mut len) })
}

/// An option set to a number.
fn set(fd: &impl AsRawFd, level: i32, name: i32, value: i32) -> i64 {
    // SAFETY: the kernel reads four bytes.
    i64::from(unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, (&raw const value).cast(), 4) })
}

pub(crate) fn peek_off() -> Result<bool> {
    let mut value = [0u8; 4];
    let r = get(&socket(libc::AF_UNIX, libc::SOCK_DGRAM)?, libc::SOL_SOCKET, libc::SO_PEEK_OFF, &mut value);
    Ok(answer("getsockopt(SO_PEEK_OFF)", r, &[libc::ENOPROTOOPT])? && i32::from_ne_bytes(value) == -1)
}

/// Filter and device of a socket can be read.
pub(crate) fn filter_and_device() -> Result<bool> {
    const SO_GET_FILTER: i32 = libc::SO_ATTACH_FILTER;
    let socket = socket(libc::AF_INET, libc::SOCK_DGRAM)?;
    let has = answer(
        "getsockopt(SO_GET_FILTER)",
        get(&socket, libc::SOL_SOCKET, SO_GET_FILTER, &mut []),
        &[libc::ENOPROTOOPT],
    )?;
    let r = get(&socket, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, &mut [0; 16]);
    Ok(has && answer("getsockopt(SO_BINDTODEVICE)", r, &[libc::ENOPROTOOPT])?)
}

const TCP_REPAIR: i32 = 19;

pub(crate) fn tcp_repair() -> Result<bool> {
    let socket = socket(libc::AF_INET, libc::SOCK_STREAM)?;
    let has =
        answer("setsockopt(TCP_REPAIR)", set(&socket, libc::SOL_TCP, TCP_REPAIR, 1), &[libc::ENOPROTOOPT])?;
    let r = get(&socket, libc::SOL_TCP, libc::TCP_TIMESTAMP, &mut [0; 4]);
    Ok(has && answer("getsockopt(TCP_TIMESTAMP)", r, &[libc::ENOPROTOOPT])?)
}

pub(crate) fn tcp_repair_window() -> Result<bool> {
    const TCP_REPAIR_WINDOW: i32 = 29;
    let socket = socket(libc::AF_INET, libc::SOCK_STREAM)?;
    must("setsockopt(TCP_REPAIR)", set(&socket, libc::SOL_TCP, TCP_REPAIR, 1))?;
    let r = get(&socket, libc::SOL_TCP, TCP_REPAIR_WINDOW, &mut [0; 20]);
    answer("getsockopt(TCP_REPAIR_WINDOW)", r, &[libc::ENOPROTOOPT])
}

/// Repair mode can be switched on for a connection that one side has shut down.
pub(crate) fn tcp_half_closed() -> Result<bool> {
    let listener = TcpListener::bind("127.0.0.1:0").or_else(|_| TcpListener::bind("[::1]:0")).call("bind")?;
    let client = TcpStream::connect(listener.local_addr().call("getsockname")?).call("connect")?;
    client.shutdown(Shutdown::Write).call("shutdown")?;
    answer("setsockopt(TCP_REPAIR)", set(&client, libc::SOL_TCP, TCP_REPAIR, 1), &[libc::EPERM])
}

pub(crate) fn buf_lock() -> Result<bool> {
    const SO_BUF_LOCK: i32 = 72;
    let r = get(&socket(libc::AF_INET, libc::SOCK_STREAM)?, libc::SOL_SOCKET, SO_BUF_LOCK, &mut [0; 4]);
    answer("getsockopt(SO_BUF_LOCK)", r, &[libc::ENOPROTOOPT])
}

pub(crate) fn ipv6_freebind() -> Result<bool> {
    const IPV6_FREEBIND: i32 = 78;
    if !exists("/proc/sys/net/ipv6")? {
        return Ok(false);
    }
    let socket = socket(libc::AF_INET6, libc::SOCK_DGRAM)?;
    answer("setsockopt(IPV6_FREEBIND)", set(&socket, libc::SOL_IPV6, IPV6_FREEBIND, 1), &[libc::ENOPROTOOPT])
}

/// `SIOCGSKNS`: the network namespace of a socket (or a tun) as a descriptor.
fn netns_of(fd: &impl AsRawFd) -> Result<bool> {
    const SIOCGSKNS: libc::c_ulong = 0x894c;
    // SAFETY: no pointers; it returns a descriptor.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), SIOCGSKNS as _) };
    // A tun that is attached to no device has no namespace to tell, but knows the request.
    if r < 0 && errno() == libc::EBADFD {
        return Ok(true);
    }
    let has = answer("ioctl(SIOCGSKNS)", r.into(), &[libc::ENOTTY, libc::EINVAL])?;
    if has {
        drop(crate::sys::fd::take(r)?);
    }
    Ok(has)
}

pub(crate) fn socket_netns() -> Result<bool> {
    netns_of(&socket(libc::AF_UNIX, libc::SOCK_DGRAM)?)
}

pub(crate) fn unix_file() -> Result<bool> {
    const SIOCUNIXFILE: libc::c_ulong = 0x89e0;
    let socket = socket(libc::AF_UNIX, libc::SOCK_DGRAM)?;
    // SAFETY: no pointers; an unbound socket has no file, which only a kernel that knows the request says.
    let r = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCUNIXFILE as _) };
    match errno() {
        libc::ENOENT if r < 0 => Ok(true),
        libc::ENOTTY | libc::EINVAL if r < 0 => Ok(false),
        e => Err(Error::sys("ioctl(SIOCUNIXFILE)", e)),
    }
}

fn tun_device() -> Result<Option<std::fs::File>> {
    match std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        Ok(file) => Ok(Some(file)),
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ENXIO)) => Ok(None),
        Err(e) => Err(Error::io("open(/dev/net/tun)", &e)),
    }
}

/// A tun device can be made with the index it had.
pub(crate) fn tun() -> Result<bool> {
    const TUNSETIFINDEX: libc::c_ulong = 0x4004_54da;
    let Some(device) = tun_device()? else { return Ok(false) };
    let index = 13i32;
    // SAFETY: the kernel reads one int; no device is made.
    let r = unsafe { libc::ioctl(device.as_raw_fd(), TUNSETIFINDEX as _, &index) };
    answer("ioctl(TUNSETIFINDEX)", r.into(), &[libc::ENOTTY, libc::EINVAL])
}

pub(crate) fn tun_netns() -> Result<bool> {
    match tun_device()? {
        Some(device) => netns_of(&device),
        None => Ok(false),
    }
}
