//! Options and requests of sockets, socket(7), with the option's name in every error.
//!
//! # Safety
//! Every call gets a buffer that lives through it, and its true length; the kernel writes at most that much.
//! Descriptors it returns are new and ours.
#![allow(unsafe_code)]

use std::{
    mem::MaybeUninit,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use crate::error::{Error, Result};

/// An option: level, number, name for messages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Opt {
    pub(crate) level: i32,
    pub(crate) number: i32,
    pub(crate) name: &'static str,
}

/// An option of the level SOL_SOCKET.
pub(crate) const fn general(number: i32, name: &'static str) -> Opt {
    Opt { level: libc::SOL_SOCKET, number, name }
}

fn failed(call: &str, opt: Opt) -> Error {
    let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
    Error::sys(format!("{call}({})", opt.name), errno)
}

/// Up to `N` bytes of an option, and how many there are.
pub(crate) fn bytes<const N: usize>(fd: BorrowedFd<'_>, opt: Opt) -> Result<([u8; N], usize)> {
    let mut value = [0u8; N];
    let mut len = N as libc::socklen_t;
    // SAFETY: a local of N bytes, as `len` says.
    let r = unsafe {
        libc::getsockopt(fd.as_raw_fd(), opt.level, opt.number, value.as_mut_ptr().cast(), &raw mut len)
    };
    if r < 0 { Err(failed("getsockopt", opt)) } else { Ok((value, (len as usize).min(N))) }
}

/// An option that is asked for with words that say what: `value` is both.
pub(crate) fn exchange(fd: BorrowedFd<'_>, opt: Opt, value: &mut [u8]) -> Result<()> {
    let mut len = value.len() as libc::socklen_t;
    // SAFETY: a buffer as long as `len` says.
    let r = unsafe {
        libc::getsockopt(fd.as_raw_fd(), opt.level, opt.number, value.as_mut_ptr().cast(), &raw mut len)
    };
    if r < 0 { Err(failed("getsockopt", opt)) } else { Ok(()) }
}

/// An option that is an int (flags are too).
pub(crate) fn int(fd: BorrowedFd<'_>, opt: Opt) -> Result<i32> {
    let (value, len) = bytes::<4>(fd, opt)?;
    match len {
        4 => Ok(i32::from_ne_bytes(value)),
        1 => Ok(i32::from(value[0])),
        n => Err(Error::host(format!("{} has {n} bytes", opt.name))),
    }
}

/// Sets an option to some bytes.
pub(crate) fn set_bytes(fd: BorrowedFd<'_>, opt: Opt, value: &[u8]) -> Result<()> {
    // SAFETY: a slice and its length.
    let r = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            opt.level,
            opt.number,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    };
    if r < 0 { Err(failed("setsockopt", opt)) } else { Ok(()) }
}

/// Sets an option that is an int.
pub(crate) fn set_int(fd: BorrowedFd<'_>, opt: Opt, value: i32) -> Result<()> {
    set_bytes(fd, opt, &value.to_ne_bytes())
}

/// A pair of numbers as `struct timeval` and, in two ints, `struct linger` have it.
pub(crate) fn timeval(fd: BorrowedFd<'_>, opt: Opt) -> Result<(i64, i64)> {
    let (value, len) = bytes::<16>(fd, opt)?;
    let number = |at: usize| i64::from_ne_bytes(value[at..at + 8].try_into().unwrap_or_default());
    if len == 16 { Ok((number(0), number(8))) } else { Err(Error::host(format!("{} is short", opt.name))) }
}

const ATTACH_FILTER: Opt = general(libc::SO_ATTACH_FILTER, "SO_ATTACH_FILTER");
const GET_FILTER: Opt = general(libc::SO_ATTACH_FILTER, "SO_GET_FILTER");

/// Instructions of the classic filter, empty if there is none. An instruction counts as one in lengths.
///
/// # Errors
/// EACCES for a filter that is not a classic one (SO_ATTACH_BPF).
pub(crate) fn filter(fd: BorrowedFd<'_>) -> Result<Vec<libc::sock_filter>> {
    let mut len: libc::socklen_t = 0;
    // SAFETY: no buffer is given, the kernel tells how many instructions there are.
    let r = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            GET_FILTER.level,
            GET_FILTER.number,
            std::ptr::null_mut(),
            &raw mut len,
        )
    };
    if r < 0 {
        return Err(failed("getsockopt", GET_FILTER));
    }
    let mut filter = vec![libc::sock_filter { code: 0, jt: 0, jf: 0, k: 0 }; len as usize];
    if filter.is_empty() {
        return Ok(filter);
    }
    // SAFETY: room for `len` instructions.
    let r = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            GET_FILTER.level,
            GET_FILTER.number,
            filter.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if r < 0 { Err(failed("getsockopt", GET_FILTER)) } else { Ok(filter) }
}

/// Attaches a classic filter.
///
/// # Errors
/// EINVAL for a program the kernel does not accept.
pub(crate) fn set_filter(fd: BorrowedFd<'_>, filter: &mut [libc::sock_filter]) -> Result<()> {
    let len = u16::try_from(filter.len()).map_err(|_| Error::image("a socket filter of over 65535 steps"))?;
    let program = libc::sock_fprog { len, filter: filter.as_mut_ptr() };
    // SAFETY: the program points to a live slice of the length it names.
    let r = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            ATTACH_FILTER.level,
            ATTACH_FILTER.number,
            (&raw const program).cast(),
            size_of_val(&program) as libc::socklen_t,
        )
    };
    if r < 0 { Err(failed("setsockopt", ATTACH_FILTER)) } else { Ok(()) }
}

/// socket(2), for protocols that have no name elsewhere; close-on-exec.
pub(crate) fn socket(family: i32, kind: i32, protocol: i32) -> Result<OwnedFd> {
    // SAFETY: no pointers.
    let r = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    if r < 0 {
        return Err(Error::io("socket", &std::io::Error::last_os_error()));
    }
    // SAFETY: a new descriptor of ours.
    Ok(unsafe { OwnedFd::from_raw_fd(r) })
}

/// Number of the device called `name` in the network namespace of a socket.
///
/// # Errors
/// ENODEV if there is none.
pub(crate) fn device_index(fd: BorrowedFd<'_>, name: &str) -> Result<u32> {
    // SAFETY: plain bytes and numbers, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(Error::image(format!("no device can be called {name:?}")));
    }
    request.ifr_name.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from as libc::c_char);
    // SAFETY: a request of ours that lives through the call.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), libc::SIOCGIFINDEX as libc::Ioctl, &raw mut request) };
    if r < 0 {
        return Err(Error::io("ioctl(SIOCGIFINDEX)", &std::io::Error::last_os_error()));
    }
    // SAFETY: the kernel has written this member.
    Ok(unsafe { request.ifr_ifru.ifru_ifindex }.cast_unsigned())
}

/// `SIOCPROTOPRIVATE`: of a unix socket, the file it is bound to.
const SIOCUNIXFILE: libc::Ioctl = 0x89e0;

/// A handle (O_PATH) of the file that a unix socket is bound to (Linux 4.10).
///
/// # Errors
/// ENOENT if it is not bound to a file.
pub(crate) fn unix_file(fd: BorrowedFd<'_>) -> Result<OwnedFd> {
    // SAFETY: no argument.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), SIOCUNIXFILE, 0) };
    if r < 0 {
        return Err(Error::io("ioctl(SIOCUNIXFILE)", &std::io::Error::last_os_error()));
    }
    // SAFETY: a new descriptor of ours.
    let file = unsafe { OwnedFd::from_raw_fd(r) };
    crate::sys::fd::set_cloexec(r, true)?;
    Ok(file)
}

/// A unix address as the kernel sees it: `path` is all of `sun_path` that counts.
fn unix_address(path: &[u8]) -> Result<(libc::sockaddr_un, libc::socklen_t)> {
    // SAFETY: all zeros is a value of this plain structure.
    let mut address: libc::sockaddr_un = unsafe { MaybeUninit::zeroed().assume_init() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    if path.len() > address.sun_path.len() {
        return Err(Error::image(format!("the name of a unix socket has {} bytes", path.len())));
    }
    for (to, from) in address.sun_path.iter_mut().zip(path) {
        *to = from.cast_signed();
    }
    Ok((address, (size_of::<libc::sa_family_t>() + path.len()) as libc::socklen_t))
}

/// bind(2) of a unix socket; an abstract name starts with NUL.
pub(crate) fn bind_unix(fd: BorrowedFd<'_>, path: &[u8]) -> Result<()> {
    let (address, len) = unix_address(path)?;
    // SAFETY: a local and at most its length.
    let r = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len) };
    if r < 0 { Err(Error::io("bind", &std::io::Error::last_os_error())) } else { Ok(()) }
}

/// connect(2) of a unix socket.
pub(crate) fn connect_unix(fd: BorrowedFd<'_>, path: &[u8]) -> Result<()> {
    let (address, len) = unix_address(path)?;
    // SAFETY: a local and at most its length.
    let r = unsafe { libc::connect(fd.as_raw_fd(), (&raw const address).cast(), len) };
    if r < 0 { Err(Error::io("connect", &std::io::Error::last_os_error())) } else { Ok(()) }
}

/// bind(2) to an address given as the bytes of its structure.
pub(crate) fn bind(fd: BorrowedFd<'_>, address: &[u8]) -> Result<()> {
    // SAFETY: a slice and its length.
    let r = unsafe { libc::bind(fd.as_raw_fd(), address.as_ptr().cast(), address.len() as libc::socklen_t) };
    if r < 0 { Err(Error::io("bind", &std::io::Error::last_os_error())) } else { Ok(()) }
}

/// connect(2) to an address given as the bytes of its structure.
pub(crate) fn connect(fd: BorrowedFd<'_>, address: &[u8]) -> Result<()> {
    // SAFETY: a slice and its length.
    let r =
        unsafe { libc::connect(fd.as_raw_fd(), address.as_ptr().cast(), address.len() as libc::socklen_t) };
    if r < 0 { Err(Error::io("connect", &std::io::Error::last_os_error())) } else { Ok(()) }
}

/// Lets a datagram socket forget its peer: connect(2) to AF_UNSPEC. What it had received goes too.
pub(crate) fn disconnect(fd: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: all zeros is a value of this plain structure, and zero is AF_UNSPEC.
    let address: libc::sockaddr = unsafe { MaybeUninit::zeroed().assume_init() };
    // SAFETY: a local and less than its length.
    let r = unsafe {
        libc::connect(fd.as_raw_fd(), &raw const address, size_of::<libc::sa_family_t>() as libc::socklen_t)
    };
    if r < 0 { Err(Error::io("connect(AF_UNSPEC)", &std::io::Error::last_os_error())) } else { Ok(()) }
}

/// Whether a socket receives no more: it was told not to, or its peer has ended (POLLRDHUP, which nix's poll
/// flags do not know).
pub(crate) fn receives_no_more(fd: BorrowedFd<'_>) -> Result<bool> {
    let mut wait = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
    // SAFETY: one structure, and no waiting.
    let r = unsafe { libc::poll(&raw mut wait, 1, 0) };
    if r < 0 {
        return Err(Error::io("poll", &std::io::Error::last_os_error()));
    }
    Ok(wait.revents & libc::POLLRDHUP != 0)
}

/// Name of a network device.
///
/// # Errors
/// ENXIO if there is none with this number.
pub(crate) fn device_name(index: u32) -> Result<String> {
    let mut name = [0u8; libc::IF_NAMESIZE];
    // SAFETY: room for the longest name and its end.
    let r = unsafe { libc::if_indextoname(index, name.as_mut_ptr().cast()) };
    if r.is_null() {
        return Err(Error::io("if_indextoname", &std::io::Error::last_os_error()));
    }
    let len = name.iter().position(|b| *b == 0).unwrap_or(name.len());
    Ok(String::from_utf8_lossy(&name[..len]).into_owned())
}

/// What of a TCP connection is queued, `linux/sockios.h`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Queued {
    /// Received and not read.
    In,
    /// Not acknowledged by the peer yet, sent or not.
    Out,
    /// Not sent yet.
    Unsent,
}

/// How much is queued, in bytes. An end of the stream that is queued counts as one when it is being sent.
pub(crate) fn queued(fd: BorrowedFd<'_>, what: Queued) -> Result<u32> {
    let (request, name) = match what {
        Queued::In => (libc::FIONREAD, "ioctl(SIOCINQ)"),
        Queued::Out => (libc::TIOCOUTQ, "ioctl(SIOCOUTQ)"),
        Queued::Unsent => (0x894b, "ioctl(SIOCOUTQNSD)"),
    };
    let mut length: libc::c_int = 0;
    // SAFETY: these requests write one int.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut length) };
    if r < 0 {
        return Err(Error::io(name, &std::io::Error::last_os_error()));
    }
    Ok(u32::try_from(length).unwrap_or(0))
}

/// The network namespace of a socket (Linux 4.10).
///
/// # Errors
/// EPERM without CAP_NET_ADMIN in it.
pub(crate) fn network(fd: BorrowedFd<'_>) -> Result<OwnedFd> {
    const SIOCGSKNS: libc::Ioctl = 0x894c;
    // SAFETY: no argument.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), SIOCGSKNS, 0) };
    if r < 0 {
        return Err(Error::io("ioctl(SIOCGSKNS)", &std::io::Error::last_os_error()));
    }
    // SAFETY: a new descriptor of ours.
    let network = unsafe { OwnedFd::from_raw_fd(r) };
    crate::sys::fd::set_cloexec(r, true)?;
    Ok(network)
}
