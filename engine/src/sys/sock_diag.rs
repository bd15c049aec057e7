//! Tables of sockets from the kernel, sock_diag(7): one question for a whole network namespace.
//!
//! Messages are taken apart here, bytes in and plain structures out; nothing a kernel could send makes it read
//! beyond what was received.

use std::{
    collections::HashMap,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

use crate::error::{Context, Error, Result, SysContext};

const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const SOCK_DIAG_BY_FAMILY: u16 = 20;

/// `UDIAG_SHOW_*`: name, file, peer, connections waiting, lengths of queues.
const UNIX_SHOW: u32 = 1 | 2 | 4 | 8 | 16;
const UNIX_DIAG_NAME: u16 = 0;
const UNIX_DIAG_PEER: u16 = 2;
const UNIX_DIAG_ICONS: u16 = 3;
const UNIX_DIAG_RQLEN: u16 = 4;
const UNIX_DIAG_SHUTDOWN: u16 = 6;
const INET_DIAG_SHUTDOWN: u16 = 8;

/// A unix socket as the kernel lists it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct UnixSocket {
    /// Inode in sockfs.
    pub(crate) ino: u32,
    /// `SOCK_*`.
    pub(crate) kind: u32,
    /// `TCP_*`: 1 established, 7 closed, 10 listening.
    pub(crate) state: u32,
    /// Bytes of `sun_path`, as bound: a path with its final NUL, or NUL and an abstract name. Empty: no name.
    pub(crate) name: Vec<u8>,
    /// Inode of the peer; 0 for none, one that is closed, or one that was not accepted yet.
    pub(crate) peer: u32,
    /// Of a listener: inodes of the sockets that wait for accept(2), 0 for closed ones.
    pub(crate) waiting: Vec<u32>,
    /// Bytes to be read; of a listener: connections waiting.
    pub(crate) received: u32,
    /// Bytes sent and not read; of a listener: its backlog.
    pub(crate) sent: u32,
    /// `RCV_SHUTDOWN` 1, `SEND_SHUTDOWN` 2.
    pub(crate) shutdown: u8,
}

/// All unix sockets of this process's network namespace, by inode.
///
/// # Errors
/// ENOENT or EINVAL without CONFIG_UNIX_DIAG.
pub(crate) fn unix_sockets() -> Result<HashMap<u32, UnixSocket>> {
    // struct unix_diag_req { family, protocol, pad, states, ino, show, cookie[2] }
    let mut body = [0u8; 24];
    body[0] = libc::AF_UNIX as u8;
    body[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
    body[12..16].copy_from_slice(&UNIX_SHOW.to_ne_bytes());
    let mut all = HashMap::new();
    dump(&body, |message| {
        if let Some(socket) = unix_socket(message) {
            all.insert(socket.ino, socket);
        }
    })
    .during(|| "listing unix sockets (sock_diag)".into())
    .map_err(|e| e.remedy("run a kernel with CONFIG_UNIX_DIAG"))?;
    Ok(all)
}

/// Takes a `struct unix_diag_msg` and its attributes apart.
fn unix_socket(message: &[u8]) -> Option<UnixSocket> {
    let mut socket = UnixSocket {
        kind: u32::from(*message.get(1)?),
        state: u32::from(*message.get(2)?),
        ino: word(message.get(4..)?)?,
        ..UnixSocket::default()
    };
    each_attribute(message.get(16..)?, |kind, value| match kind {
        UNIX_DIAG_NAME => socket.name = value.to_vec(),
        UNIX_DIAG_PEER => socket.peer = word(value).unwrap_or(0),
        UNIX_DIAG_ICONS => socket.waiting = value.chunks_exact(4).filter_map(word).collect(),
        UNIX_DIAG_RQLEN => {
            socket.received = word(value).unwrap_or(0);
            socket.sent = value.get(4..).and_then(word).unwrap_or(0);
        }
        UNIX_DIAG_SHUTDOWN => socket.shutdown = value.first().copied().unwrap_or(0),
        _ => {}
    });
    Some(socket)
}

/// What the table of internet sockets alone tells of one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct InetSocket {
    /// Bytes to be read, with their bookkeeping.
    pub(crate) received: u32,
    /// `RCV_SHUTDOWN` 1, `SEND_SHUTDOWN` 2.
    pub(crate) shutdown: u8,
}

/// All bound sockets of an internet family and protocol in this process's network namespace, by inode.
///
/// # Errors
/// ENOENT without the protocol's diagnostics (CONFIG_INET_UDP_DIAG).
pub(crate) fn inet_sockets(family: i32, protocol: i32) -> Result<HashMap<u32, InetSocket>> {
    // struct inet_diag_req_v2 { family, protocol, ext, pad, states, id (48 bytes) }
    let mut body = [0u8; 56];
    (body[0], body[1]) = (family as u8, protocol as u8);
    body[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
    let mut all = HashMap::new();
    // struct inet_diag_msg: rqueue at 56, inode at 68, 72 bytes.
    dump(&body, |message| {
        if let (Some(received), Some(ino)) =
            (message.get(56..).and_then(word), message.get(68..).and_then(word))
        {
            let mut socket = InetSocket { received, shutdown: 0 };
            each_attribute(message.get(72..).unwrap_or(&[]), |kind, value| {
                if kind == INET_DIAG_SHUTDOWN {
                    socket.shutdown = value.first().copied().unwrap_or(0);
                }
            });
            all.insert(ino, socket);
        }
    })
    .during(|| format!("listing sockets of protocol {protocol} (sock_diag)"))?;
    Ok(all)
}

/// A netlink socket as the kernel lists it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct NetlinkSocket {
    /// `NETLINK_*`.
    pub(crate) protocol: u32,
    /// 1 if it has a peer.
    pub(crate) state: u32,
    pub(crate) portid: u32,
    pub(crate) dst_portid: u32,
    /// Counts from 1; 0 for none.
    pub(crate) dst_group: u32,
    /// Groups it has joined, one bit for each, the first 32 in the first word.
    pub(crate) groups: Vec<u32>,
    /// An answer in several parts is under way.
    pub(crate) busy: bool,
}

const NETLINK_DIAG_GROUPS: u16 = 1;
const NETLINK_DIAG_FLAGS: u16 = 4;

/// All netlink sockets of this process's network namespace that have a port, by inode.
///
/// # Errors
/// ENOENT without CONFIG_NETLINK_DIAG.
pub(crate) fn netlink_sockets() -> Result<HashMap<u32, NetlinkSocket>> {
    // struct netlink_diag_req { family, protocol, pad, ino, show, cookie[2] }: all protocols, groups and flags.
    let mut body = [0u8; 20];
    (body[0], body[1]) = (libc::AF_NETLINK as u8, u8::MAX);
    body[8..12].copy_from_slice(&0x12u32.to_ne_bytes());
    let mut all = HashMap::new();
    // struct netlink_diag_msg { family, type, protocol, state, portid, dst_portid, dst_group, ino, cookie[2] }
    dump(&body, |message| {
        let at = |n: usize| message.get(n..).and_then(word).unwrap_or(0);
        let byte = |n: usize| message.get(n).copied().map_or(0, u32::from);
        let mut socket = NetlinkSocket {
            protocol: byte(2),
            state: byte(3),
            portid: at(4),
            dst_portid: at(8),
            dst_group: at(12),
            ..NetlinkSocket::default()
        };
        each_attribute(message.get(28..).unwrap_or(&[]), |kind, value| match kind {
            NETLINK_DIAG_GROUPS => socket.groups = value.chunks_exact(4).filter_map(word).collect(),
            NETLINK_DIAG_FLAGS => socket.busy = word(value).unwrap_or(0) & 1 != 0,
            _ => {}
        });
        all.insert(at(16), socket);
    })
    .during(|| "listing netlink sockets (sock_diag)".into())
    .map_err(|e| e.remedy("run a kernel with CONFIG_NETLINK_DIAG"))?;
    Ok(all)
}

/// A packet socket as the kernel lists it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PacketSocket {
    /// `SOCK_*`.
    pub(crate) kind: u32,
    /// `ETH_P_*`.
    pub(crate) protocol: u16,
    /// Device, version, reserve, copy threshold, time stamps, flags (`struct packet_diag_info`).
    pub(crate) info: [u32; 6],
    pub(crate) memberships: Vec<Membership>,
    pub(crate) fanout: Option<u32>,
    /// Of what is received and sent: `struct packet_diag_ring`.
    pub(crate) rings: [Option<[u32; 7]>; 2],
}

/// What a packet socket has joined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Membership {
    pub(crate) device: u32,
    /// How often.
    pub(crate) count: u32,
    /// `PACKET_MR_*`.
    pub(crate) kind: u16,
    pub(crate) address: Vec<u8>,
}

/// All packet sockets of this process's network namespace, by inode.
///
/// # Errors
/// ENOENT without CONFIG_PACKET_DIAG.
pub(crate) fn packet_sockets() -> Result<HashMap<u32, PacketSocket>> {
    // struct packet_diag_req { family, protocol, pad, ino, show, cookie[2] }: info, memberships, rings, fanout.
    let mut body = [0u8; 20];
    body[0] = libc::AF_PACKET as u8;
    body[8..12].copy_from_slice(&0xfu32.to_ne_bytes());
    let mut all = HashMap::new();
    // struct packet_diag_msg { family, type, num, ino, cookie[2] }
    dump(&body, |message| {
        let (Some(protocol), Some(ino)) = (message.get(2..).and_then(half), message.get(4..).and_then(word))
        else {
            return;
        };
        let kind = message.get(1).copied().map_or(0, u32::from);
        let mut socket = PacketSocket { kind, protocol, ..PacketSocket::default() };
        each_attribute(message.get(16..).unwrap_or(&[]), |kind, value| match kind {
            0 => socket.info = words(value).unwrap_or_default(),
            // struct packet_diag_mclist { index, count, type, alen, addr[32] }
            1 => socket.memberships = value.chunks_exact(44).filter_map(membership).collect(),
            2 | 3 => socket.rings[usize::from(kind) - 2] = words(value),
            4 => socket.fanout = word(value),
            _ => {}
        });
        all.insert(ino, socket);
    })
    .during(|| "listing packet sockets (sock_diag)".into())
    .map_err(|e| e.remedy("run a kernel with CONFIG_PACKET_DIAG"))?;
    Ok(all)
}

fn membership(bytes: &[u8]) -> Option<Membership> {
    let length = usize::from(half(bytes.get(10..)?)?);
    Some(Membership {
        device: word(bytes)?,
        count: word(bytes.get(4..)?)?,
        kind: half(bytes.get(8..)?)?,
        address: bytes.get(12..)?.get(..length)?.to_vec(),
    })
}

fn words<const N: usize>(bytes: &[u8]) -> Option<[u32; N]> {
    let words: Vec<u32> = bytes.chunks_exact(4).take(N).filter_map(word).collect();
    words.try_into().ok()
}

/// Sends a SOCK_DIAG_BY_FAMILY dump request and gives the body of every answer to `each`.
fn dump(body: &[u8], mut each: impl FnMut(&[u8])) -> Result<()> {
    let socket: OwnedFd =
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkSockDiag)
            .call("socket(NETLINK_SOCK_DIAG)")?;
    let len = (16 + body.len()) as u32;
    let mut request = len.to_ne_bytes().to_vec();
    request.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    request.extend([0; 8]);
    request.extend(body);
    sendto(socket.as_raw_fd(), &request, &NetlinkAddr::new(0, 0), MsgFlags::empty())
        .call("sendto(netlink)")?;
    // A dump is sent in portions of the reader's making, at most 32 KiB each.
    let mut buffer = vec![0u8; 64 << 10];
    loop {
        let got = match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_TRUNC) {
            Ok(got) => got,
            Err(nix::errno::Errno::EINTR) => {
                crate::interrupt::check()?;
                continue;
            }
            Err(e) => return Err(Error::sys("recv(netlink)", e as i32)),
        };
        let mut rest = buffer.get(..got).ok_or_else(|| Error::bug("a netlink message beyond 64 KiB"))?;
        if rest.is_empty() {
            return Err(Error::host("the kernel ended its answer early"));
        }
        while let Some((kind, body)) = next_message(&mut rest) {
            match kind {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => {
                    let errno = word(body).map_or(libc::EIO, |e| e.cast_signed().wrapping_neg());
                    return Err(Error::sys("sock_diag", errno));
                }
                _ => each(body),
            }
        }
    }
}

/// Takes the next message off `rest`: its kind and body.
pub(crate) fn next_message<'a>(rest: &mut &'a [u8]) -> Option<(u16, &'a [u8])> {
    let len = word(rest)? as usize;
    let kind = half(rest.get(4..)?)?;
    let body = rest.get(16..len)?;
    *rest = rest.get(len.next_multiple_of(4)..).unwrap_or(&[]);
    Some((kind, body))
}

fn each_attribute<'a>(mut attributes: &'a [u8], mut each: impl FnMut(u16, &'a [u8])) {
    while let (Some(len), Some(kind)) = (half(attributes), attributes.get(2..).and_then(half)) {
        let Some(value) = attributes.get(4..usize::from(len)) else { return };
        each(kind & 0x3fff, value);
        attributes = attributes.get(usize::from(len).next_multiple_of(4)..).unwrap_or(&[]);
    }
}

fn word(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?))
}

fn half(bytes: &[u8]) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use std::os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    };

    use nix::sys::stat::fstat;

    use super::*;

    #[test]
    fn a_pair_and_a_listener_are_found() {
        let ino = |fd: &dyn AsRawFd| {
            let fd = crate::sys::fd::borrow(fd.as_raw_fd()).unwrap();
            fstat(fd).unwrap().st_ino as u32
        };
        let (a, b) = UnixStream::pair().unwrap();
        std::io::Write::write_all(&mut &a, b"seven b").unwrap();
        b.shutdown(std::net::Shutdown::Write).unwrap();
        let name = format!("rcriu-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let listener = UnixListener::bind_addr(&address).unwrap();
        let waiting = UnixStream::connect_addr(&address).unwrap();
        let all = unix_sockets().unwrap();
        let (first, second) = (&all[&ino(&a)], &all[&ino(&b)]);
        assert_eq!((first.kind, first.state, first.peer), (1, 1, ino(&b)));
        assert_eq!((first.received, second.received, first.shutdown, second.shutdown), (0, 7, 1, 2));
        let listener = &all[&ino(&listener)];
        assert_eq!((listener.state, listener.received), (10, 1));
        assert_eq!(listener.waiting, [ino(&waiting)]);
        assert_eq!(listener.name, [b"\0", name.as_bytes()].concat());
    }

    #[test]
    fn damaged_answers_are_read_no_further() {
        assert_eq!(unix_socket(&[1, 2]), None);
        let mut cut = &[40u8, 0, 0, 0, 20, 0][..];
        assert_eq!(next_message(&mut cut), None);
        let mut seen = 0;
        each_attribute(&[200, 0, 1, 0, 5], |_, _| seen += 1);
        each_attribute(&[3, 0, 1, 0, 5, 6, 7, 8], |_, _| seen += 1);
        assert_eq!(seen, 0);
    }
}
