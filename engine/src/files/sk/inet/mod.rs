//! Sockets of the internet families: TCP, UDP and UDP-Lite, ICMP, raw ones.
//!
//! What is particular to TCP connections is in [`super::tcp`]. Sockets of one type on one port are opened by
//! one task: all of them can be bound there as long as each lets others in, so what each allows is set once all
//! are bound.

mod file;
mod options;

use std::{
    collections::{HashMap, hash_map::Entry},
    net::{SocketAddr, UdpSocket},
    os::fd::{AsFd, BorrowedFd},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rcriu_images::pb;

pub(super) use self::file::InetFile;
use super::{
    CLOSED, ESTABLISHED, LISTEN, SocketKind, is_family,
    joined::Groups,
    opts, owner, socket_name,
    tcp::{self, Met},
};
use crate::{
    error::{Error, Result, SysContext},
    files::{DrainedFd, FdProbe, FdType, FileKind, FilesOut, PlanFiles, RestoredFile},
    netlock::Connection,
    pstree::FileId,
    sys::{sock_diag, sockopt},
};

const TCP: i32 = libc::IPPROTO_TCP;
const UDP: i32 = libc::IPPROTO_UDP;
const UDPLITE: i32 = libc::IPPROTO_UDPLITE;
const MPTCP: i32 = 262;

/// The kind.
#[derive(Debug)]
pub(in crate::files) struct Inet;

/// Tables of datagram sockets, by family and protocol.
#[derive(Debug, Default)]
pub(super) struct InetOut {
    datagrams: HashMap<(i32, i32), HashMap<u32, sock_diag::InetSocket>>,
}

/// What a socket is, as far as it matters here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Class {
    /// TCP and what stands in its place.
    Stream,
    Datagram,
    /// ICMP without privileges: its port is the identifier of its requests.
    Ping,
    Raw,
}

impl Class {
    /// `None` for what is not known.
    fn of(family: i32, kind: i32, protocol: i32) -> Option<Self> {
        match kind {
            libc::SOCK_STREAM if [TCP, MPTCP].contains(&protocol) => Some(Class::Stream),
            libc::SOCK_DGRAM if [UDP, UDPLITE].contains(&protocol) => Some(Class::Datagram),
            libc::SOCK_DGRAM if family == libc::AF_INET && protocol == libc::IPPROTO_ICMP => {
                Some(Class::Ping)
            }
            libc::SOCK_DGRAM if family == libc::AF_INET6 && protocol == libc::IPPROTO_ICMPV6 => {
                Some(Class::Ping)
            }
            libc::SOCK_RAW => Some(Class::Raw),
            _ => None,
        }
    }
}

/// What cannot be dumped or restored.
fn unknown(kind: i32, protocol: i32, verb: &str) -> Error {
    let name = match (kind, protocol) {
        (_, libc::IPPROTO_SCTP) => "an SCTP socket".into(),
        (_, libc::IPPROTO_DCCP) => "a DCCP socket".into(),
        _ => format!("an internet socket of type {kind} and protocol {protocol}"),
    };
    Error::unsupported(format!("{name} cannot be {verb}"))
}

/// Address words as images have them, and the port.
fn parts(address: &SocketAddr) -> (Vec<u32>, u32) {
    let word = |bytes: &[u8]| bytes.try_into().map_or(0, u32::from_ne_bytes);
    let words = match address {
        SocketAddr::V4(v4) => vec![word(&v4.ip().octets())],
        SocketAddr::V6(v6) => v6.ip().octets().chunks(4).map(word).collect(),
    };
    (words, address.port().into())
}

/// `struct sockaddr_in` or `sockaddr_in6`.
pub(super) fn raw(address: &SocketAddr) -> Vec<u8> {
    let family = if address.is_ipv6() { libc::AF_INET6 } else { libc::AF_INET };
    let mut bytes = (family as u16).to_ne_bytes().to_vec();
    bytes.extend(address.port().to_be_bytes());
    match address {
        SocketAddr::V4(v4) => {
            bytes.extend(v4.ip().octets());
            bytes.extend([0; 8]);
        }
        SocketAddr::V6(v6) => {
            bytes.extend([0; 4]);
            bytes.extend(v6.ip().octets());
            bytes.extend(v6.scope_id().to_ne_bytes());
        }
    }
    bytes
}

impl FileKind for Inet {
    fn fd_type(&self) -> FdType {
        FdType::Inetsk
    }

    fn claims(&self, fd: &FdProbe) -> bool {
        is_family(fd, libc::AF_INET) || is_family(fd, libc::AF_INET6)
    }

    fn dump(&self, fd: &DrainedFd, id: FileId, out: &mut FilesOut<'_>) -> Result<pb::FileEntry> {
        let socket = fd.file.as_fd();
        let what = fd.probe.socket.ok_or_else(|| Error::bug("no socket"))?;
        let (kind, proto, v6) = (what.kind, what.protocol, what.family == libc::AF_INET6);
        let class = Class::of(what.family, kind, proto)
            .ok_or_else(|| unknown(kind, proto, "dumped").remedy("close it before the dump"))?;
        let ns_id = out.network_of(socket)?;
        let ino = fd.probe.stat.st_ino as u32;
        // Names are asked for alike whatever the protocol.
        let name = UdpSocket::from(fd.file.try_clone().call("dup")?).local_addr().call("getsockname")?;
        let (src_addr, src_port) = parts(&name);
        let peer = tcp::peer(socket, v6)?;
        let none = || (vec![0; if v6 { 4 } else { 1 }], 0);
        let (dst_addr, dst_port) = peer.as_ref().map_or_else(none, parts);
        let scope = if let SocketAddr::V6(v6) = name { v6.scope_id() } else { 0 };
        let options = opts::dump(socket, what.family)?;
        if scope != 0 && options.so_bound_dev.is_none() {
            return Err(Error::unsupported("a socket bound to a link-local address, but to no device")
                .remedy("bind it to the device (SO_BINDTODEVICE)"));
        }
        let (state, backlog, shutdown) = match class {
            Class::Stream => {
                let known = tcp_state(socket, peer.is_some(), out)?;
                if let Some(remote) = peer.filter(|_| !out.opts.common.tcp.close) {
                    if proto == MPTCP {
                        return Err(Error::unsupported("a connection of MPTCP cannot be dumped")
                            .remedy("let it come back closed with --tcp-close, or use TCP"));
                    }
                    out.sockets.tcp.met.push(Met {
                        id,
                        ino,
                        socket: fd.file.try_clone().call("dup")?,
                        ends: Connection::new(name, remote),
                        reuseaddr: options.reuseaddr == Some(true),
                        place: fd.probe.place(),
                    });
                }
                known
            }
            Class::Datagram => udp_state(socket, what, ino, dst_port, out)?,
            Class::Ping | Class::Raw => {
                let mut wait = [PollFd::new(socket, PollFlags::POLLIN)];
                poll(&mut wait, PollTimeout::ZERO).call("poll")?;
                if wait[0].revents().is_some_and(|seen| seen.contains(PollFlags::POLLIN)) {
                    log::warn!("{}: packets that nobody has read are dropped", socket_name(ino));
                }
                (if dst_port == 0 { CLOSED } else { ESTABLISHED }, 0, 0)
            }
        };
        let of = options::Of { v6, raw: class == Class::Raw, protocol: proto };
        let entry = pb::InetSkEntry {
            id: id.0,
            ino,
            family: what.family.cast_unsigned(),
            r#type: kind.cast_unsigned(),
            proto: proto.cast_unsigned(),
            state,
            src_port,
            dst_port,
            flags: fd.probe.info.flags,
            backlog,
            src_addr,
            dst_addr,
            fown: fd.fown,
            ifname: options.so_bound_dev.clone().filter(|_| scope != 0),
            v6only: if v6 { Some(sockopt::int(socket, options::V6ONLY)? != 0) } else { None },
            ip_opts: Some(options::dump_ip(socket, of)?),
            tcp_opts: Some(match class {
                Class::Stream if proto == TCP => options::dump_tcp(socket)?,
                _ => pb::TcpOptsEntry::default(),
            }),
            shutdown: (shutdown != 0).then_some(i32::from(shutdown)),
            opts: options,
            ns_id,
        };
        // Also one that is over.
        let connected = class == Class::Stream && state != LISTEN && (state != CLOSED || dst_port != 0);
        let owner = owner::dump(&fd.probe.stat, out);
        dump_more(socket, (what, connected), (id, ns_id), owner, out)?;
        Ok(pb::FileEntry {
            r#type: FdType::Inetsk as i32,
            id: id.0,
            isk: Some(entry.into()),
            ..Default::default()
        })
    }

    /// Connections change until their packets are locked out.
    fn is_late(&self) -> bool {
        true
    }

    fn complete(&self, entry: &mut pb::FileEntry, _: &FdProbe, out: &mut FilesOut<'_>) -> Result<()> {
        if let (Some(known), Some(entry)) = (out.sockets.tcp.known.get(&FileId(entry.id)), &mut entry.isk) {
            (entry.state, entry.backlog) = (known.state, known.backlog);
            entry.shutdown = (known.shutdown != 0).then_some(i32::from(known.shutdown));
        }
        Ok(())
    }

    fn collect(&self, entry: &pb::FileEntry, plan: &mut PlanFiles<'_>) -> Result<Box<dyn RestoredFile>> {
        let entry = entry
            .isk
            .as_deref()
            .cloned()
            .ok_or_else(|| Error::image("files.img: an inetsk entry without socket"))?;
        Ok(Box::new(InetFile::new(entry, plan)?))
    }
}

/// What the entry has no field for.
fn dump_more(
    fd: BorrowedFd<'_>,
    (socket, connected): (SocketKind, bool),
    (id, network): (FileId, Option<u32>),
    owner: Option<pb::RcriuOwner>,
    out: &mut FilesOut<'_>,
) -> Result<()> {
    let (networks, sockets) = (&out.networks, &mut out.sockets);
    // What a new one has, and which groups there are, is a matter of the namespace.
    let (option, membership) = networks.within(network, || {
        let option = sockets.fresh.entry(network).or_default().differing(fd, socket, connected);
        if socket.kind == libc::SOCK_STREAM {
            return Ok((option, Vec::new()));
        }
        let groups = match sockets.groups.entry(network) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(free) => free.insert(Groups::read()?),
        };
        Ok((option, groups.of(fd, socket)?))
    })?;
    if !option.is_empty() || !membership.is_empty() || owner.is_some() {
        out.more(pb::RcriuFileEntry { id: id.0, option, membership, owner, ..Default::default() })?;
    }
    Ok(())
}

/// State, backlog and shutdown of a TCP socket; whether a connection is dumped is for options to say.
fn tcp_state(socket: BorrowedFd<'_>, connected: bool, out: &FilesOut<'_>) -> Result<(u32, u32, u8)> {
    let (info, len) = sockopt::bytes::<32>(socket, options::TCP_INFO)?;
    let word = |at: usize| info[at..at + 4].try_into().map_or(0, u32::from_ne_bytes);
    let state = u32::from(info[0]);
    let tcp = &out.opts.common.tcp;
    match state {
        // Of a listener: connections waiting, and its backlog.
        LISTEN if len == 32 => {
            if word(24) != 0 {
                if !tcp.skip_in_flight {
                    return Err(Error::unsupported("TCP connections wait to be accepted")
                        .remedy("let the task accept them, or drop them with --skip-in-flight"));
                }
                log::info!("{} connections that wait to be accepted are left out", word(24));
            }
            Ok((LISTEN, word(28), 0))
        }
        CLOSED => {
            let read = sockopt::receives_no_more(socket)?;
            Ok((CLOSED, 0, u8::from(read)))
        }
        _ if tcp.close => Ok((state, 0, 0)),
        _ if !tcp::is_known(state) || !connected => {
            Err(Error::unsupported(format!("a TCP connection in state {state} cannot be dumped"))
                .remedy("dump again in a moment"))
        }
        _ if tcp.established => Ok((state, 0, 0)),
        _ => Err(Error::unsupported("Connected TCP socket")
            .remedy("dump it with --tcp-established, or let it come back closed with --tcp-close")),
    }
}

/// The same of a datagram socket.
fn udp_state(
    socket: BorrowedFd<'_>,
    what: super::SocketKind,
    ino: u32,
    dst_port: u32,
    out: &mut FilesOut<'_>,
) -> Result<(u32, u32, u8)> {
    if sockopt::int(socket, options::UDP_CORK)? != 0 {
        return Err(Error::unsupported("a datagram socket that is being corked cannot be dumped")
            .remedy("switch UDP_CORK off before the dump"));
    }
    let key = (what.family, what.protocol);
    let table = match out.sockets.inet.datagrams.entry(key) {
        Entry::Occupied(known) => known.into_mut(),
        Entry::Vacant(free) => {
            free.insert(out.networks.listed(|| sock_diag::inet_sockets(what.family, what.protocol))?)
        }
    };
    let known = table.get(&ino).copied().unwrap_or_default();
    if known.received != 0 {
        log::warn!("{}: {} bytes that nobody has read are dropped", socket_name(ino), known.received);
    }
    Ok((if dst_port == 0 { CLOSED } else { ESTABLISHED }, 0, known.shutdown))
}

#[cfg(test)]
mod tests;
