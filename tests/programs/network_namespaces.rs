//! Members in network namespaces of their own, connected by devices of which each has one end in two of them: connections
//! between them and inside of each, sockets that a task has from another namespace, names that are taken in each,
//! settings, and the numbers by which namespaces know each other.
//!
//! The harness compares devices, addresses, routes and settings of all of them, and who is in which.
//!
//! # Safety
//!
//! Calls made raw take numbers, or bytes that outlive them with their length.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::kit::crew::member;
use crate::kit::net::{Netlink, Space};
use crate::kit::{Check, rest, same, skip, sys};

/// No answer takes longer, even when packets are lost.
const PATIENCE: Duration = Duration::from_secs(30);
/// Numbers of the other namespaces in the root's.
const NUMBERS: [u32; 2] = [77, 5];
/// Network device of the loopback.
const LOOPBACK: u32 = 1;
const NAME: &str = "the same in each";

/// An address of one of the networks between them.
fn place(net: u8, host: u8, port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::new(10, 50, net, host), port)
}

/// Devices and addresses of all namespaces. `all`: also what CRIU does not know.
fn connect(spaces: &[Space; 3], all: bool) -> Check {
    let links = spaces.iter().map(|space| {
        space.enter()?;
        // Addresses would come some time after a device is up.
        fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").context("disable_ipv6")?;
        Netlink::open()
    });
    let [root, first, second] = &links.collect::<Result<Vec<_>>>()?[..] else {
        return Err(skip("three namespaces"));
    };
    // Before a device is, for which the kernel would choose.
    root.set_number(&spaces[1], NUMBERS[0])?;
    root.set_number(&spaces[2], NUMBERS[1])?;
    let made = root.pair(("to-first", 20), ("to-root", 30), &spaces[1]);
    made.map_err(|e| skip(format!("a pair of devices (veth): {e:#}")))?;
    root.pair(("to-second", 21), ("to-root", 30), &spaces[2])?;
    first.pair(("side", 31), ("side", 31), &spaces[2])?;
    if all {
        root.macvlan(("above", 40), 20, &spaces[2]).map_err(|e| skip(format!("{e:#}")))?;
    }
    let devices = [
        (root, 20, [10, 50, 1, 1]),
        (first, 30, [10, 50, 1, 2]),
        (root, 21, [10, 50, 2, 1]),
        (second, 30, [10, 50, 2, 2]),
        (first, 31, [10, 50, 3, 1]),
        (second, 31, [10, 50, 3, 2]),
        (second, 40, [10, 50, 1, 3]),
    ];
    for (netlink, index, address) in devices.into_iter().filter(|(_, index, _)| all || *index != 40) {
        netlink.address(index, address)?;
    }
    for (netlink, index, _) in devices.into_iter().filter(|(_, index, _)| all || *index != 40) {
        netlink.up(index)?;
    }
    for netlink in [root, first, second] {
        netlink.up(LOOPBACK)?;
    }
    Ok(())
}

/// Both ends of a connection, from namespace `from` to an address of namespace `to`, where it is listened.
fn connection(from: &Space, to: &Space, at: SocketAddrV4) -> Result<(TcpStream, TcpStream)> {
    to.enter()?;
    let listener = TcpListener::bind(at).context("bind")?;
    from.enter()?;
    let mut there = TcpStream::connect(listener.local_addr()?).context("connect")?;
    let (mut here, _) = listener.accept().context("accept")?;
    for stream in [&mut there, &mut here] {
        stream.set_read_timeout(Some(PATIENCE)).context("SO_RCVTIMEO")?;
        stream.write_all(b"before").context("write")?;
    }
    Ok((there, here))
}

fn expect(from: &mut impl Read, words: &[u8]) -> Check {
    let mut bytes = vec![0; words.len()];
    from.read_exact(&mut bytes).with_context(|| format!("reading {:?}", String::from_utf8_lossy(words)))?;
    same("what was sent", &bytes[..], words)
}

/// What is of one namespace.
struct Own {
    name: UnixDatagram,
    inside: Option<(TcpStream, TcpStream)>,
    port: UdpSocket,
    packets: OwnedFd,
}

impl Own {
    /// `tcp`: with a connection.
    fn of(space: &Space, tcp: bool) -> Result<Own> {
        let at = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 4000);
        let inside = tcp.then(|| connection(space, space, at)).transpose()?;
        let name = SocketAddr::from_abstract_name(NAME)?;
        // SAFETY: numbers only; the result is a new descriptor.
        let packets = unsafe {
            let all = (libc::ETH_P_ALL as u16).to_be();
            let fd = sys("socket", libc::socket(libc::AF_PACKET, libc::SOCK_RAW, all.into()))?;
            OwnedFd::from_raw_fd(fd)
        };
        Ok(Own {
            name: UnixDatagram::bind_addr(&name).context("abstract name")?,
            inside,
            port: UdpSocket::bind((Ipv4Addr::LOCALHOST, 4001)).context("bind")?,
            packets,
        })
    }

    /// In the namespace.
    fn check(&mut self) -> Check {
        let name = SocketAddr::from_abstract_name(NAME)?;
        let sender = UnixDatagram::unbound().context("socket")?;
        sender.send_to_addr(b"by name", &name).context("an abstract name of its own")?;
        self.name.set_read_timeout(Some(PATIENCE)).context("SO_RCVTIMEO")?;
        let mut bytes = [0; 7];
        self.name.recv(&mut bytes).context("recv")?;
        same("what was sent to a name", &bytes, b"by name")?;
        if let Some((one, other)) = &mut self.inside {
            both(one, other)?;
        }
        through(&self.port, b"inside")?;
        let mut frame = [0u8; 128];
        // SAFETY: there is room for as many bytes.
        let got = sys("recv", unsafe {
            let fd = self.packets.as_raw_fd();
            libc::recv(fd, frame.as_mut_ptr().cast(), frame.len(), libc::MSG_DONTWAIT)
        })?;
        ensure!(got > 0, "no frames are seen");
        Ok(())
    }
}

/// Sends a datagram from this task's namespace to where a socket listens.
fn through(to: &UdpSocket, words: &[u8]) -> Check {
    let from = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).context("bind")?;
    from.send_to(words, to.local_addr()?).context("send")?;
    to.set_read_timeout(Some(PATIENCE)).context("SO_RCVTIMEO")?;
    let mut bytes = [0; 64];
    let got = to.recv(&mut bytes).context("recv")?;
    same("a datagram", &bytes[..got], words)
}

/// Data that was under way arrives, and more goes in both directions.
fn both(one: &mut TcpStream, other: &mut TcpStream) -> Check {
    for words in [&b"before"[..], b"after"] {
        if words == b"after" {
            one.write_all(words).context("write")?;
            other.write_all(words).context("write")?;
        }
        expect(one, words)?;
        expect(other, words)?;
    }
    Ok(())
}

fn link(file: &File) -> Result<String> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(fs::read_link(path).context("readlink")?.display().to_string())
}

/// What a member has beside what is of its namespace.
struct Given {
    own: Own,
    /// The end of a connection with the root's namespace.
    to_root: Option<TcpStream>,
    /// The end of one with the other member's.
    side: Option<TcpStream>,
    /// A socket of the root's namespace.
    foreign: UdpSocket,
    netlink: Netlink,
    stream: UnixStream,
}

fn follow(space: Space, home: File, mut given: Given) -> Check {
    space.enter()?;
    let (here, there) = (link(&space.0)?, link(&home)?);
    rest()?;
    let now = fs::read_link("/proc/self/ns/net").context("readlink")?.display().to_string();
    same("a file of its namespace", link(&space.0)?, now.clone())?;
    ensure!(link(&home)? != now, "it is in the root's namespace ({here}, {there})");
    given.own.check()?;
    ensure!(given.netlink.has("to-first"), "a netlink socket is of another namespace");
    if let Some(to_root) = &mut given.to_root {
        expect(to_root, b"before")?;
        expect(to_root, b"asked")?;
        to_root.write_all(b"answered").context("write")?;
    }
    if let Some(side) = &mut given.side {
        side.write_all(b"after").context("write")?;
        expect(side, b"before")?;
        expect(side, b"after")?;
    }
    expect(&mut given.stream, b"asked")?;
    given.stream.write_all(b"answered").context("write")?;
    given.foreign.set_read_timeout(Some(PATIENCE)).context("SO_RCVTIMEO")?;
    let mut bytes = [0; 7];
    given.foreign.recv(&mut bytes).context("recv")?;
    same("a datagram in the root's namespace", &bytes, b"foreign")
}

/// See the module. `plain`: without what CRIU does not know; `quiet`: without connections of TCP.
pub fn run(args: &[String]) -> Check {
    let has = |word: &str| args.iter().any(|arg| arg == word);
    let (all, tcp) = (!has("plain"), !has("quiet"));
    let spaces = [Space::own()?, Space::new()?, Space::new()?];
    connect(&spaces, all)?;
    let [root, first, second] = &spaces;
    for (space, most) in [(root, "1111"), (first, "2222"), (second, "3333")].into_iter().filter(|_| all) {
        space.enter()?;
        fs::write("/proc/sys/net/core/somaxconn", most).context("somaxconn")?;
    }
    let pair = |from, to, at| match tcp {
        true => connection(from, to, at).map(|(one, other)| (Some(one), Some(other))),
        false => Ok((None, None)),
    };
    let (to_first, from_root) = pair(root, first, place(1, 2, 4002))?;
    let (to_second, second_from_root) = pair(root, second, place(2, 2, 4002))?;
    let (side, other_side) = pair(first, second, place(3, 2, 4003))?;
    root.enter()?;
    let mut own = Own::of(root, tcp)?;
    let listener = UnixListener::bind("of-the-root").context("bind")?;
    let mut streams = Vec::new();
    let mut foreign_ports = Vec::new();
    let mut members = Vec::new();
    for (space, to_root, side) in [(first, from_root, side), (second, second_from_root, other_side)] {
        root.enter()?;
        let foreign = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).context("bind")?;
        foreign_ports.push(foreign.local_addr()?);
        let netlink = Netlink::open()?;
        space.enter()?;
        let own = Own::of(space, tcp)?;
        // A path leads from one network namespace to another.
        let stream = UnixStream::connect("of-the-root").context("connect")?;
        streams.push(listener.accept().context("accept")?.0);
        let given = Given { own, to_root, side, foreign, netlink, stream };
        let (file, home) = (Space(space.0.try_clone()?), root.0.try_clone()?);
        root.enter()?;
        members.push(member(move || follow(file, home, given))?);
    }
    rest()?;
    own.check()?;
    let links = Netlink::open()?;
    for (space, number) in [first, second].into_iter().zip(NUMBERS) {
        same("number of a namespace", links.number(space)?, number.cast_signed())?;
    }
    for (member, address) in members.iter().zip(&foreign_ports) {
        member.ask()?;
        let from = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).context("bind")?;
        from.send_to(b"foreign", address).context("send")?;
    }
    for mut stream in [to_first, to_second].into_iter().flatten() {
        stream.write_all(b"asked").context("write")?;
        expect(&mut stream, b"before")?;
        expect(&mut stream, b"answered")?;
    }
    for stream in &mut streams {
        stream.set_read_timeout(Some(PATIENCE)).context("SO_RCVTIMEO")?;
        stream.write_all(b"asked").context("write")?;
        expect(stream, b"answered")?;
    }
    for member in &members {
        let leads = format!("/proc/{}/ns/net", member.pid);
        let leads = fs::read_link(leads).context("readlink")?.display().to_string();
        let known = [first, second].map(|space| link(&space.0));
        ensure!(known.iter().flatten().any(|known| *known == leads), "a member is elsewhere: {leads}");
    }
    members.iter().try_for_each(|member| member.wait())?;
    if all {
        // From above a device of the root's namespace to the other end of it.
        second.enter()?;
        let (mut here, mut there) = connection(second, first, place(1, 2, 4005))?;
        both(&mut here, &mut there)?;
    }
    for (space, most) in [(root, "1111\n"), (first, "2222\n"), (second, "3333\n")].into_iter().filter(|_| all)
    {
        space.enter()?;
        let now = fs::read_to_string("/proc/sys/net/core/somaxconn").context("somaxconn")?;
        same("a setting of each namespace", now.as_str(), most)?;
    }
    Ok(())
}

/// `network-elsewhere socket|file`: a socket, or a file, of a network namespace that nobody is in.
pub fn elsewhere(args: &[String]) -> Check {
    let own = Space::own()?;
    let other = Space::new()?;
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).context("bind")?;
    own.enter()?;
    let _kept = match args.first().map(String::as_str) {
        Some("file") => (Some(other), None),
        _ => {
            drop(other);
            (None, Some(socket))
        }
    };
    rest()
}
