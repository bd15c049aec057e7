//! Calls on sockets that a timeout of the socket bounds: a stop of the process ends them with EINTR.
//!
//! # Safety
//!
//! As in the module above: structures outlive the calls they are given to.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use anyhow::Context;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, accept, bind, connect, listen, recv,
    setsockopt, socket, socketpair, sockopt,
};
use nix::sys::time::TimeVal;

use super::{Caller, caller, raw, returned, still_in};
use crate::kit::{Check, rest, same};

/// A call on a socket.
type Call = fn(RawFd) -> Result<(), Errno>;

const FAR: TimeVal = TimeVal::new(3000, 0);

fn pair(kind: SockType, timed: bool) -> anyhow::Result<(OwnedFd, OwnedFd)> {
    let pair = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).context("socketpair")?;
    if timed {
        limit(&pair.0)?;
    }
    Ok(pair)
}

/// Sets both timeouts far away.
fn limit(socket: impl AsFd) -> Check {
    setsockopt(&socket, sockopt::ReceiveTimeout, &FAR).context("SO_RCVTIMEO")?;
    setsockopt(&socket, sockopt::SendTimeout, &FAR).context("SO_SNDTIMEO")
}

/// A socket that takes no more packets, and its peer, which reads them. Room for bytes depends on how they came.
fn full(timed: bool) -> anyhow::Result<(OwnedFd, OwnedFd)> {
    let pair = pair(SockType::SeqPacket, timed)?;
    loop {
        match nix::sys::socket::send(pair.0.as_raw_fd(), &[7; 4096], MsgFlags::MSG_DONTWAIT) {
            Ok(_) => {}
            Err(Errno::EAGAIN) => return Ok(pair),
            Err(e) => return Err(e).context("send"),
        }
    }
}

/// Reads all that is there.
fn drain(socket: &OwnedFd) -> Check {
    let mut page = [0; 4096];
    loop {
        match recv(socket.as_raw_fd(), &mut page, MsgFlags::MSG_DONTWAIT) {
            // Who sent the last is gone already.
            Ok(0) | Err(Errno::EAGAIN) => return Ok(()),
            Ok(_) => {}
            Err(e) => return Err(e).context("recv"),
        }
    }
}

/// A message of one byte in a vector, as the kernel takes it.
fn with_message(
    byte: &mut u8,
    count: usize,
    call: impl FnOnce(*mut libc::mmsghdr) -> i64,
) -> Result<(), Errno> {
    let mut vector = libc::iovec { iov_base: std::ptr::from_mut(byte).cast(), iov_len: 1 };
    // SAFETY: integers and pointers, for which zero is a value.
    let mut messages: [libc::mmsghdr; 2] = unsafe { std::mem::zeroed() };
    for message in &mut messages[..count] {
        message.msg_hdr.msg_iov = &raw mut vector;
        message.msg_hdr.msg_iovlen = 1;
    }
    raw(call(messages.as_mut_ptr()))
}

fn recvmsg(fd: RawFd) -> Result<(), Errno> {
    // SAFETY: the message and what it points to outlive the call.
    with_message(&mut 0, 1, |m| unsafe { libc::recvmsg(fd, &raw mut (*m).msg_hdr, 0) as i64 })
}

fn sendmsg(fd: RawFd) -> Result<(), Errno> {
    // SAFETY: the message and what it points to outlive the call.
    with_message(&mut 7, 1, |m| unsafe { libc::sendmsg(fd, &raw const (*m).msg_hdr, 0) as i64 })
}

fn recvmmsg(fd: RawFd) -> Result<(), Errno> {
    let none = std::ptr::null_mut();
    // SAFETY: one message, which outlives the call, as does what it points to.
    with_message(&mut 0, 1, |m| unsafe { libc::recvmmsg(fd, m, 1, 0, none).into() })
}

fn sendmmsg(fd: RawFd) -> Result<(), Errno> {
    // SAFETY: one message, which outlives the call, as does what it points to.
    with_message(&mut 7, 1, |m| unsafe { libc::sendmmsg(fd, m, 1, 0).into() })
}

fn listener(name: &str, timed: bool) -> anyhow::Result<OwnedFd> {
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).context("socket")?;
    bind(fd.as_raw_fd(), &UnixAddr::new(name)?).context("bind")?;
    listen(&fd, Backlog::new(1)?).context("listen")?;
    if timed {
        limit(&fd)?;
    }
    Ok(fd)
}

fn connect_to(name: &'static str) -> Result<OwnedFd, Errno> {
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    connect(fd.as_raw_fd(), &UnixAddr::new(name)?)?;
    Ok(fd)
}

/// Callers that receive, and those who end their waits.
fn receivers() -> anyhow::Result<(Vec<Caller>, Vec<OwnedFd>)> {
    let (mut callers, mut senders) = (Vec::new(), Vec::new());
    let calls: [(&str, bool, Call); 6] = [
        ("recvmsg", false, recvmsg),
        ("recvmsg with a timeout", true, recvmsg),
        ("recvmmsg", false, recvmmsg),
        ("recvmmsg with a timeout", true, recvmmsg),
        ("recvfrom that waits for all", true, |fd| recv(fd, &mut [0; 1], MsgFlags::MSG_WAITALL).map(drop)),
        ("readv with a timeout", true, |fd| {
            let mut byte = [0];
            let vector = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
            // SAFETY: one byte of room.
            raw(unsafe { libc::readv(fd, &raw const vector, 1) } as i64)
        }),
    ];
    for (name, timed, call) in calls {
        let (receiver, sender) = pair(SockType::Stream, timed)?;
        callers.push(caller(name, move || call(receiver.as_raw_fd()))?);
        senders.push(sender);
    }
    Ok((callers, senders))
}

/// Callers that send, and those who make room for them.
fn senders() -> anyhow::Result<(Vec<Caller>, Vec<OwnedFd>)> {
    let (mut callers, mut readers) = (Vec::new(), Vec::new());
    let calls: [(&str, bool, Call); 6] = [
        ("sendmsg", false, sendmsg),
        ("sendmsg with a timeout", true, sendmsg),
        ("sendmmsg", false, sendmmsg),
        ("sendmmsg with a timeout", true, sendmmsg),
        ("sendto with a timeout", true, |fd| nix::sys::socket::send(fd, &[7], MsgFlags::empty()).map(drop)),
        ("write with a timeout", true, |fd| {
            // SAFETY: one byte of a constant.
            raw(unsafe { libc::write(fd, b"x".as_ptr().cast(), 1) } as i64)
        }),
    ];
    for (name, timed, call) in calls {
        let (sender, reader) = full(timed)?;
        callers.push(caller(name, move || call(sender.as_raw_fd()))?);
        readers.push(reader);
    }
    Ok((callers, readers))
}

/// recvmsg, sendmsg and their kin, with and without SO_RCVTIMEO and SO_SNDTIMEO; accept.
pub fn run(_: &[String]) -> Check {
    let (receivers, wakers) = receivers()?;
    let (senders, readers) = senders()?;
    let (open, timed) = (listener("open", false)?, listener("timed", true)?);
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").context("bind")?;
    limit(&tcp)?;
    let address = tcp.local_addr().context("getsockname")?;
    let accepting = vec![
        caller("accept", move || accept(open.as_raw_fd()).map(drop))?,
        caller("accept with a timeout", move || accept(timed.as_raw_fd()).map(drop))?,
        caller("accept4 of TCP with a timeout", move || {
            let (fd, none) = (tcp.as_raw_fd(), std::ptr::null_mut());
            // SAFETY: no address is asked for.
            raw(unsafe { libc::accept4(fd, none, std::ptr::null_mut(), libc::SOCK_CLOEXEC) }.into())
        })?,
    ];
    rest()?;
    for callers in [&receivers, &senders, &accepting] {
        still_in(callers)?;
    }
    for waker in wakers {
        let sent = nix::sys::socket::send(waker.as_raw_fd(), b"x", MsgFlags::empty()).context("send")?;
        same("sent", sent, 1)?;
    }
    readers.iter().try_for_each(drain)?;
    let _kept = [connect_to("open").context("connect")?, connect_to("timed").context("connect")?];
    let _tcp = std::net::TcpStream::connect(address).context("connect")?;
    returned(receivers)?;
    returned(senders)?;
    returned(accepting)
}

/// connect to a listener whose queue is full.
pub fn connecting(_: &[String]) -> Check {
    let queue = listener("full", false)?;
    let mut waiting = Vec::new();
    // The queue takes one more than it was asked to.
    for _ in 0..2 {
        waiting.push(connect_to("full").context("connect")?);
    }
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).context("socket")?;
    limit(&fd)?;
    let connecting = vec![
        caller("connect", || connect_to("full").map(drop))?,
        caller("connect with a timeout", move || connect(fd.as_raw_fd(), &UnixAddr::new("full")?))?,
    ];
    rest()?;
    still_in(&connecting)?;
    for _ in 0..4 {
        accept(queue.as_raw_fd()).context("accept")?;
    }
    returned(connecting)
}
