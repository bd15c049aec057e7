//! Options of sockets that no field of the common format has, and groups of multicast: of UDP, of a TCP listener and a
//! closed socket, of unix sockets.
//!
//! # Safety
//!
//! Options are read into and set from locals of the length told.

use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::kit::{Check, rest, same, sys};

/// Level and number.
type Opt = (i32, i32);

fn get(socket: BorrowedFd<'_>, (level, number): Opt) -> Result<Vec<u8>> {
    let mut value = vec![0u8; 64];
    let mut len = 64;
    // SAFETY: 64 bytes, as told.
    sys("getsockopt", unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, number, value.as_mut_ptr().cast(), &raw mut len)
    })?;
    value.truncate(len as usize);
    Ok(value)
}

/// Whether the kernel has the option.
fn set(socket: BorrowedFd<'_>, (level, number): Opt, value: &[u8]) -> bool {
    let len = value.len() as libc::socklen_t;
    // SAFETY: a slice and its length.
    unsafe { libc::setsockopt(socket.as_raw_fd(), level, number, value.as_ptr().cast(), len) == 0 }
}

/// Sets options, and gives what the kernel tells of them.
fn changed<'a>(
    socket: BorrowedFd<'a>,
    options: &[(Opt, i32)],
) -> Result<Vec<(BorrowedFd<'a>, Opt, Vec<u8>)>> {
    let known = options.iter().filter(|(opt, value)| set(socket, *opt, &value.to_ne_bytes()));
    known.map(|(opt, _)| Ok((socket, *opt, get(socket, *opt)?))).collect()
}

const SOCKET: i32 = libc::SOL_SOCKET;
const IP: i32 = libc::SOL_IP;
const TCP: i32 = libc::SOL_TCP;

/// See the module.
pub fn run(_: &[String]) -> Check {
    let group = Ipv4Addr::new(239, 77, 1, 2);
    let heard = UdpSocket::bind((group, 0)).context("bind")?;
    heard.join_multicast_v4(&group, &Ipv4Addr::LOCALHOST).context("join")?;
    heard.set_read_timeout(Some(Duration::from_secs(10)))?;
    let speaker = UdpSocket::bind("127.0.0.1:0").context("bind")?;
    let local = Ipv4Addr::LOCALHOST.octets();
    let told = set(speaker.as_fd(), (IP, 32), &local);
    let speaks = told && speaker.send_to(b"before", heard.local_addr()?).is_ok();
    if speaks {
        heard.recv(&mut [0; 16]).context("a message before")?;
    }
    let listener = TcpListener::bind("127.0.0.1:0").context("bind")?;
    let (one, other) = UnixDatagram::pair().context("socketpair")?;
    let mut all = changed(
        speaker.as_fd(),
        &[((IP, 33), 5), ((IP, 34), 1), ((IP, 10), 2), ((IP, 11), 1), ((SOCKET, 37), 16), ((SOCKET, 40), 1)],
    )?;
    let of_tcp = [((TCP, 18), 12_345), ((TCP, 9), 3), ((TCP, 7), 4), ((TCP, 25), 65_536), ((TCP, 23), 5)];
    all.extend(changed(listener.as_fd(), &of_tcp)?);
    if set(listener.as_fd(), (TCP, 13), b"reno") {
        all.push((listener.as_fd(), (TCP, 13), get(listener.as_fd(), (TCP, 13))?));
    }
    all.extend(changed(one.as_fd(), &[((SOCKET, 42), 2), ((SOCKET, 29), 1)])?);
    rest()?;
    for (socket, opt, value) in &all {
        same(&format!("option {opt:?}"), &get(*socket, *opt)?, value)?;
    }
    if speaks {
        speaker.send_to(b"after", heard.local_addr()?).context("send")?;
        let mut bytes = [0; 16];
        let len = heard.recv(&mut bytes).context("a message to the group")?;
        same("a message to the group", &bytes[..len], b"after")?;
    }
    other.send(b"still there").context("send")?;
    let mut bytes = [0; 16];
    let len = one.recv(&mut bytes).context("recv")?;
    same("a message", &bytes[..len], b"still there")
}
