//! Sockets of the internet families: TCP that listens or is not connected, UDP and UDP-Lite.
//!
//! TCP connections are refused, or with `--tcp-close` come back closed. Sockets of one type on one port are
//! opened by one task: all of them can be bound there as long as each lets others in, so what each allows is
//! set once all are bound.

use std::{
    collections::{HashMap, hash_map::Entry},
    net::{SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{Backlog, listen},
};
use rcriu_images::pb;

use super::{CLOSED, ESTABLISHED, LISTEN, is_family, opts, shut, socket_name};
use crate::{
    error::{Context, Error, Result, SysContext},
    files::{
        DrainedFd, FdProbe, FdType, FileKind, FilesOut, FilesTask, GroupKey, Needs, PlanFiles, Preflight,
        RestoredFile, pipe,
    },
    pstree::FileId,
    sys::{
        sock_diag,
        sockopt::{self, Opt},
    },
};

const TCP: i32 = libc::IPPROTO_TCP;
const UDP: i32 = libc::IPPROTO_UDP;
const UDPLITE: i32 = libc::IPPROTO_UDPLITE;
const MPTCP: i32 = 262;

const fn opt(level: i32, number: i32, name: &'static str) -> Opt {
    Opt { level, number, name }
}

const TCP_INFO: Opt = opt(libc::SOL_TCP, libc::TCP_INFO, "TCP_INFO");
const NODELAY: Opt = opt(libc::SOL_TCP, libc::TCP_NODELAY, "TCP_NODELAY");
const CORK: Opt = opt(libc::SOL_TCP, libc::TCP_CORK, "TCP_CORK");
const KEEPCNT: Opt = opt(libc::SOL_TCP, libc::TCP_KEEPCNT, "TCP_KEEPCNT");
const KEEPIDLE: Opt = opt(libc::SOL_TCP, libc::TCP_KEEPIDLE, "TCP_KEEPIDLE");
const KEEPINTVL: Opt = opt(libc::SOL_TCP, libc::TCP_KEEPINTVL, "TCP_KEEPINTVL");
const UDP_CORK: Opt = opt(libc::SOL_UDP, libc::UDP_CORK, "UDP_CORK");
const V6ONLY: Opt = opt(libc::SOL_IPV6, libc::IPV6_V6ONLY, "IPV6_V6ONLY");
const FREEBIND: Opt = opt(libc::SOL_IP, libc::IP_FREEBIND, "IP_FREEBIND");
const PKTINFO: Opt = opt(libc::SOL_IP, libc::IP_PKTINFO, "IP_PKTINFO");
const PKTINFO6: Opt = opt(libc::SOL_IPV6, libc::IPV6_RECVPKTINFO, "IPV6_RECVPKTINFO");
const TOS: Opt = opt(libc::SOL_IP, libc::IP_TOS, "IP_TOS");
const TTL: Opt = opt(libc::SOL_IP, libc::IP_TTL, "IP_TTL");

/// The kind.
#[derive(Debug)]
pub(in crate::files) struct Inet;

/// Tables of datagram sockets, by family and protocol.
#[derive(Debug, Default)]
pub(super) struct InetOut {
    datagrams: HashMap<(i32, i32), HashMap<u32, sock_diag::InetSocket>>,
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
fn raw(address: &SocketAddr) -> Vec<u8> {
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
        let stream = kind == libc::SOCK_STREAM && (proto == TCP || proto == MPTCP);
        if !stream && !(kind == libc::SOCK_DGRAM && (proto == UDP || proto == UDPLITE)) {
            return Err(Error::unsupported(format!(
                "an internet socket of type {kind} and protocol {proto} cannot be dumped"
            ))
            .remedy("only TCP and UDP are supported; close it before the dump"));
        }
        let ino = fd.probe.stat.st_ino as u32;
        let none = || vec![0; if v6 { 4 } else { 1 }];
        // Names are asked for alike whatever the protocol.
        let names = UdpSocket::from(fd.file.try_clone().call("dup")?);
        let name = names.local_addr().call("getsockname")?;
        let (src_addr, src_port) = parts(&name);
        let (dst_addr, dst_port) = match names.peer_addr() {
            Ok(peer) => parts(&peer),
            Err(e) if e.raw_os_error() == Some(libc::ENOTCONN) => (none(), 0),
            Err(e) => return Err(Error::io("getpeername", &e)),
        };
        let scope = if let SocketAddr::V6(v6) = name { v6.scope_id() } else { 0 };
        let options = opts::dump(socket, what.family)?;
        if scope != 0 && options.so_bound_dev.is_none() {
            return Err(Error::unsupported("a socket bound to a link-local address, but to no device")
                .remedy("bind it to the device (SO_BINDTODEVICE)"));
        }
        let (state, backlog, shutdown) = if stream {
            tcp_state(socket, proto, out)?
        } else {
            udp_state(socket, what, ino, dst_port, out)?
        };
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
            v6only: if v6 { Some(sockopt::int(socket, V6ONLY)? != 0) } else { None },
            ip_opts: Some(dump_ip(socket, v6)?),
            tcp_opts: Some(if proto == TCP { dump_tcp(socket)? } else { pb::TcpOptsEntry::default() }),
            shutdown: (shutdown != 0).then_some(i32::from(shutdown)),
            opts: options,
            ns_id: None,
        };
        Ok(pb::FileEntry { r#type: FdType::Inetsk as i32, id: id.0, isk: Some(entry), ..Default::default() })
    }

    fn collect(&self, entry: &pb::FileEntry, _plan: &mut PlanFiles<'_>) -> Result<Box<dyn RestoredFile>> {
        let entry =
            entry.isk.clone().ok_or_else(|| Error::image("files.img: an inetsk entry without socket"))?;
        let words = if entry.family == libc::AF_INET6.cast_unsigned() { 4 } else { 1 };
        let family = [libc::AF_INET, libc::AF_INET6].map(i32::cast_unsigned).contains(&entry.family);
        // The first version of the format had four words for either family.
        if !family || entry.src_addr.len() < words || entry.dst_addr.len() < words {
            return Err(Error::image("a socket with a strange address"));
        }
        if u16::try_from(entry.src_port).is_err() || u16::try_from(entry.dst_port).is_err() {
            return Err(Error::image("a socket with a strange port"));
        }
        let proto = entry.proto.cast_signed();
        let stream = entry.r#type == libc::SOCK_STREAM.cast_unsigned() && [TCP, MPTCP].contains(&proto);
        let datagram = entry.r#type == libc::SOCK_DGRAM.cast_unsigned() && [UDP, UDPLITE].contains(&proto);
        if !stream && !datagram {
            return Err(Error::unsupported(format!(
                "an internet socket of type {} and protocol {proto} cannot be restored",
                entry.r#type
            ))
            .remedy("restore with CRIU"));
        }
        Ok(Box::new(InetFile { entry, stream }))
    }
}

/// State, backlog and shutdown of a TCP socket; connections as options say.
fn tcp_state(socket: BorrowedFd<'_>, proto: i32, out: &FilesOut<'_>) -> Result<(u32, u32, u8)> {
    let (info, len) = sockopt::bytes::<32>(socket, TCP_INFO)?;
    let word = |at: usize| info[at..at + 4].try_into().map_or(0, u32::from_ne_bytes);
    let state = u32::from(info[0]);
    let tcp = &out.opts.common.tcp;
    match state {
        // Of a listener: connections waiting, and its backlog.
        LISTEN if len == 32 => {
            if word(24) != 0 && !tcp.skip_in_flight {
                return Err(Error::unsupported("TCP connections wait to be accepted")
                    .remedy("let the task accept them, or drop them with --skip-in-flight"));
            }
            Ok((LISTEN, word(28), 0))
        }
        CLOSED => {
            let hang_up = PollFlags::from_bits_retain(libc::POLLRDHUP);
            let mut wait = [PollFd::new(socket, hang_up | PollFlags::POLLHUP)];
            poll(&mut wait, PollTimeout::ZERO).call("poll")?;
            let seen = wait[0].revents().unwrap_or(PollFlags::empty());
            let read = seen.contains(PollFlags::POLLHUP | hang_up);
            Ok((CLOSED, 0, u8::from(read)))
        }
        _ if tcp.close && proto == TCP => Ok((state, 0, 0)),
        _ => Err(Error::unsupported("Connected TCP socket")
            .remedy("close it before the dump; neither --tcp-established nor --tcp-close is served yet")),
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
    if sockopt::int(socket, UDP_CORK)? != 0 {
        return Err(Error::unsupported("a datagram socket that is being corked cannot be dumped")
            .remedy("switch UDP_CORK off before the dump"));
    }
    let key = (what.family, what.protocol);
    let table = match out.sockets.inet.datagrams.entry(key) {
        Entry::Occupied(known) => known.into_mut(),
        Entry::Vacant(free) => free.insert(sock_diag::inet_sockets(what.family, what.protocol)?),
    };
    let known = table.get(&ino).copied().unwrap_or_default();
    if known.received != 0 {
        log::warn!("{}: {} bytes that nobody has read are dropped", socket_name(ino), known.received);
    }
    Ok((if dst_port == 0 { CLOSED } else { ESTABLISHED }, 0, known.shutdown))
}

fn dump_ip(socket: BorrowedFd<'_>, v6: bool) -> Result<pb::IpOptsEntry> {
    let int = |opt| sockopt::int(socket, opt);
    let flag = |opt| int(opt).map(|v| (v != 0).then_some(true));
    let number = |opt| int(opt).map(|v| Some(v.cast_unsigned()).filter(|v| *v != 0));
    Ok(pb::IpOptsEntry {
        freebind: flag(FREEBIND)?,
        pktinfo: flag(if v6 { PKTINFO6 } else { PKTINFO })?,
        tos: if v6 { None } else { number(TOS)? },
        ttl: if v6 { None } else { number(TTL)? },
        raw: None,
    })
}

fn dump_tcp(socket: BorrowedFd<'_>) -> Result<pb::TcpOptsEntry> {
    let int = |opt| sockopt::int(socket, opt);
    let flag = |opt| int(opt).map(|v| (v != 0).then_some(true));
    let number = |opt| int(opt).map(|v| Some(v.cast_unsigned()).filter(|v| *v != 0));
    Ok(pb::TcpOptsEntry {
        cork: flag(CORK)?,
        nodelay: flag(NODELAY)?,
        keepcnt: number(KEEPCNT)?,
        keepidle: number(KEEPIDLE)?,
        keepintvl: number(KEEPINTVL)?,
    })
}

/// One open internet socket.
#[derive(Debug)]
struct InetFile {
    entry: pb::InetSkEntry,
    stream: bool,
}

impl InetFile {
    /// A TCP connection, in whatever state.
    fn connection(&self) -> bool {
        self.stream && self.entry.dst_port != 0
    }

    fn address(&self, words: &[u32], port: u32, scope: u32) -> SocketAddr {
        let port = port as u16;
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        if self.v6() {
            let ip: [u8; 16] = bytes.get(..16).and_then(|b| b.try_into().ok()).unwrap_or_default();
            SocketAddrV6::new(ip.into(), port, 0, scope).into()
        } else {
            let ip: [u8; 4] = bytes.get(..4).and_then(|b| b.try_into().ok()).unwrap_or_default();
            SocketAddrV4::new(ip.into(), port).into()
        }
    }

    fn v6(&self) -> bool {
        self.entry.family == libc::AF_INET6.cast_unsigned()
    }

    fn bind(&self, socket: BorrowedFd<'_>) -> Result<()> {
        let scope = match &self.entry.ifname {
            Some(name) => {
                let text = std::fs::read_to_string(format!("/sys/class/net/{name}/ifindex"));
                let text = text.call("open(ifindex)").during(|| format!("device {name}"))?;
                text.trim().parse().map_err(|_| Error::host(format!("device {name} has no index")))?
            }
            None => 0,
        };
        let address = self.address(&self.entry.src_addr, self.entry.src_port, scope);
        // An address that is new to the system cannot be bound yet without this.
        let free = self.v6() && self.entry.ip_opts.as_ref().is_none_or(|o| o.freebind != Some(true));
        if self.v6() {
            sockopt::set_int(socket, FREEBIND, 1)?;
        }
        sockopt::bind(socket, &raw(&address)).during(|| address.to_string())?;
        if free { sockopt::set_int(socket, FREEBIND, 0) } else { Ok(()) }
    }
}

impl RestoredFile for InetFile {
    fn name(&self) -> String {
        socket_name(self.entry.ino)
    }

    fn needs(&self) -> Needs {
        let entry = &self.entry;
        let number = u64::from(entry.r#type) << 16 | u64::from(entry.src_port);
        let group = (entry.src_port != 0).then_some(GroupKey { kind: FdType::Inetsk, number });
        Needs { group, ..Needs::default() }
    }

    fn preflight(&self, cx: &Preflight<'_>) -> Result<()> {
        if self.connection() && !cx.opts.common.tcp.close {
            return Err(Error::unsupported("Connected TCP socket in image")
                .remedy("dump it closed; neither --tcp-established nor --tcp-close is served yet"));
        }
        Ok(())
    }

    fn fown(&self) -> Option<&pb::FownEntry> {
        Some(&self.entry.fown)
    }

    fn open(&self, _cx: &mut FilesTask<'_>) -> Result<OwnedFd> {
        let entry = &self.entry;
        let socket = sockopt::socket(
            entry.family.cast_signed(),
            entry.r#type.cast_signed(),
            entry.proto.cast_signed(),
        )?;
        let fd = socket.as_fd();
        if self.connection() {
            return Ok(socket);
        }
        if entry.v6only == Some(true) {
            sockopt::set_int(fd, V6ONLY, 1)?;
        }
        sockopt::set_int(fd, opts::REUSEADDR, 1)?;
        sockopt::set_int(fd, opts::REUSEPORT, 1)?;
        if entry.src_port != 0 {
            self.bind(fd)?;
        }
        if self.stream && entry.state == LISTEN {
            let backlog = i32::try_from(entry.backlog).unwrap_or(i32::MAX);
            listen(&socket, Backlog::new(backlog).unwrap_or(Backlog::MAXCONN)).call("listen")?;
        }
        if !self.stream && entry.dst_port != 0 {
            let address = self.address(&entry.dst_addr, entry.dst_port, 0);
            sockopt::connect(fd, &raw(&address)).during(|| address.to_string())?;
        }
        Ok(socket)
    }

    fn finish(&self, fd: BorrowedFd<'_>, _cx: &mut FilesTask<'_>) -> Result<()> {
        let entry = &self.entry;
        // Sockets of this port are all bound.
        for (opt, value) in
            [(opts::REUSEADDR, entry.opts.reuseaddr), (opts::REUSEPORT, entry.opts.so_reuseport)]
        {
            sockopt::set_int(fd, opt, i32::from(value == Some(true)))?;
        }
        if let Some(ip) = &entry.ip_opts {
            let number = |v: Option<u32>| v.map(u32::cast_signed);
            let flag = |v: Option<bool>| v.filter(|on| *on).map(i32::from);
            let all = [
                (FREEBIND, flag(ip.freebind)),
                (if self.v6() { PKTINFO6 } else { PKTINFO }, flag(ip.pktinfo)),
                (TOS, number(ip.tos)),
                (TTL, number(ip.ttl)),
            ];
            set_all(fd, &all)?;
        }
        opts::restore(fd, &entry.opts)?;
        if let (true, Some(tcp)) = (self.stream, &entry.tcp_opts) {
            let number = |v: Option<u32>| v.map(u32::cast_signed);
            let flag = |v: Option<bool>| v.filter(|on| *on).map(i32::from);
            let all = [
                (NODELAY, flag(tcp.nodelay)),
                (CORK, flag(tcp.cork)),
                (KEEPCNT, number(tcp.keepcnt)),
                (KEEPIDLE, number(tcp.keepidle)),
                (KEEPINTVL, number(tcp.keepintvl)),
            ];
            set_all(fd, &all)?;
        }
        let how = if self.connection() { Some(3) } else { entry.shutdown };
        match shut(fd, how) {
            // It is done all the same to a socket that is not connected.
            Err(e) if e.errno() == Some(libc::ENOTCONN) => {}
            other => other?,
        }
        pipe::set_flags(&fd.try_clone_to_owned().call("dup")?, entry.flags.cast_signed())
    }
}

fn set_all(fd: BorrowedFd<'_>, all: &[(Opt, Option<i32>)]) -> Result<()> {
    all.iter()
        .filter_map(|(opt, value)| Some((*opt, (*value)?)))
        .try_for_each(|(opt, value)| sockopt::set_int(fd, opt, value))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use super::*;
    use crate::files::roundtrip::{FREE, Trip, at, get, pos_and_flags};

    fn udp(number: i32) -> UdpSocket {
        UdpSocket::from(get(number).try_clone_to_owned().unwrap())
    }

    #[test]
    fn listeners_and_datagram_sockets_come_back() {
        Trip::new(
            concat!(module_path!(), "::listeners_and_datagram_sockets_come_back"),
            |folder| {
                let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
                tcp.set_nonblocking(true).unwrap();
                let tcp6 = TcpListener::bind("[::1]:0").unwrap();
                let (one, two) =
                    (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
                one.connect(two.local_addr().unwrap()).unwrap();
                let ports = [tcp.local_addr(), tcp6.local_addr(), one.local_addr(), two.local_addr()];
                let ports = ports.map(|a| a.unwrap().port().to_string());
                std::fs::write(folder.join("ports"), ports.join(" ")).unwrap();
                let fresh = sockopt::socket(libc::AF_INET, libc::SOCK_STREAM, 0).unwrap();
                sockopt::set_int(fresh.as_fd(), NODELAY, 1).unwrap();
                sockopt::set_int(fresh.as_fd(), TTL, 7).unwrap();
                at(tcp, FREE, false);
                at(tcp6, FREE + 1, false);
                at(one, FREE + 2, false);
                at(two, FREE + 3, false);
                at(fresh, FREE + 4, true);
            },
            |folder| {
                let ports = std::fs::read_to_string(folder.join("ports")).unwrap();
                let ports: Vec<u16> = ports.split(' ').map(|p| p.parse().unwrap()).collect();
                let client = TcpStream::connect(("127.0.0.1", ports[0])).unwrap();
                let tcp = TcpListener::from(get(FREE).try_clone_to_owned().unwrap());
                assert_eq!(tcp.accept().unwrap().1, client.local_addr().unwrap());
                assert_eq!(pos_and_flags(FREE).1, (libc::O_RDWR | libc::O_NONBLOCK) as u32);
                TcpStream::connect(("::1", ports[1])).unwrap();
                let (one, two) = (udp(FREE + 2), udp(FREE + 3));
                assert_eq!(one.local_addr().unwrap().port(), ports[2]);
                assert_eq!(one.peer_addr().unwrap().port(), ports[3]);
                one.send(b"hello").unwrap();
                let mut bytes = [0; 10];
                assert_eq!(two.recv_from(&mut bytes).unwrap(), (5, one.local_addr().unwrap()));
                assert_eq!(sockopt::int(get(FREE + 4), NODELAY).unwrap(), 1);
                assert_eq!(sockopt::int(get(FREE + 4), TTL).unwrap(), 7);
                assert_eq!(sockopt::int(get(FREE + 2), opts::REUSEADDR).unwrap(), 0);
                assert_eq!(sockopt::int(get(FREE), opts::REUSEADDR).unwrap(), 1);
            },
        )
        .run();
    }

    #[test]
    fn connections_are_refused() {
        let trip = Trip::new(
            concat!(module_path!(), "::connections_are_refused"),
            |_| {
                let listener = TcpListener::bind("127.0.0.1:0").unwrap();
                let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
                let (accepted, _) = listener.accept().unwrap();
                at(client, FREE, false);
                at(accepted, FREE + 1, false);
            },
            |_| {},
        );
        if let Some(e) = trip.refusal() {
            assert!(e.contains("Connected TCP socket") && e.contains("--tcp-close"), "{e}");
        }
    }
}
