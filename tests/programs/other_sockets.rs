//! Sockets beside TCP, UDP and unix: netlink, packets of devices, ICMP, raw ones.
//!
//! # Safety
//!
//! Addresses and options are structures of this thread, with their sizes; each descriptor is new.

use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::kit::{Check, rest, same, skip, sys};

fn socket(family: i32, kind: i32, protocol: i32) -> anyhow::Result<OwnedFd> {
    // SAFETY: numbers only.
    match unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) } {
        -1 => Err(skip(format!("socket: {}", Errno::last()))),
        // SAFETY: a new descriptor.
        fd => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
    }
}

fn bind<T>(socket: &OwnedFd, address: &T) -> Check {
    let (at, len) = (std::ptr::from_ref(address).cast(), size_of::<T>() as u32);
    // SAFETY: an address of the size given.
    sys("bind", unsafe { libc::bind(socket.as_raw_fd(), at, len) }).map(drop)
}

/// The name of a socket, whose address is of this type.
fn name<T>(socket: &OwnedFd) -> anyhow::Result<T> {
    let mut len = size_of::<T>() as u32;
    // SAFETY: integers, for which zero is a value.
    let mut address: T = unsafe { std::mem::zeroed() };
    // SAFETY: room of the size given.
    sys("getsockname", unsafe {
        libc::getsockname(socket.as_raw_fd(), (&raw mut address).cast(), &raw mut len)
    })?;
    Ok(address)
}

fn set<T>(socket: &OwnedFd, (level, option): (i32, i32), value: &T) -> Check {
    let (at, len) = (std::ptr::from_ref(value).cast(), size_of::<T>() as u32);
    // SAFETY: a value of the size given.
    sys("setsockopt", unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, at, len) }).map(drop)
}

fn get<T: Copy + Default>(socket: &OwnedFd, (level, option): (i32, i32)) -> anyhow::Result<T> {
    let (mut value, mut len) = (T::default(), size_of::<T>() as u32);
    let at = (&raw mut value).cast();
    // SAFETY: room of the size given.
    sys("getsockopt", unsafe { libc::getsockopt(socket.as_raw_fd(), level, option, at, &raw mut len) })?;
    Ok(value)
}

/// One message, for which there is time enough; none if nothing comes.
fn take(socket: &OwnedFd, patience: Duration) -> anyhow::Result<Option<Vec<u8>>> {
    use std::os::fd::AsFd;
    let mut polled = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    if poll(&mut polled, PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX)).context("poll")? == 0 {
        return Ok(None);
    }
    let mut bytes = vec![0; 65536];
    let got =
        nix::sys::socket::recv(socket.as_raw_fd(), &mut bytes, nix::sys::socket::MsgFlags::MSG_DONTWAIT)
            .context("recv")?;
    bytes.truncate(got);
    Ok(Some(bytes))
}

const PATIENCE: Duration = Duration::from_secs(10);

/// A number that programs in other pid namespaces do not have, either.
fn number() -> anyhow::Result<u32> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    Ok(now.subsec_nanos() / 16)
}

const NETLINK_ADD_MEMBERSHIP: (i32, i32) = (libc::SOL_NETLINK, 1);
const NETLINK_PKTINFO: (i32, i32) = (libc::SOL_NETLINK, 3);
const NETLINK_CAP_ACK: (i32, i32) = (libc::SOL_NETLINK, 10);
/// Groups of addresses: of the first 32, and one beyond.
const RTMGRP_IPV4_IFADDR: u32 = 0x10;
const RTNLGRP_MDB: u32 = 26;

/// Asks for the loopback device; the kernel's answer tells its name.
fn ask_for_loopback(socket: &OwnedFd) -> Check {
    let (request, seq) = (18u16, 77u32);
    let mut message = Vec::new();
    message.extend(32u32.to_ne_bytes());
    message.extend(request.to_ne_bytes());
    message.extend(1u16.to_ne_bytes());
    message.extend(seq.to_ne_bytes());
    message.extend(0u32.to_ne_bytes());
    // struct ifinfomsg, of the device with number 1.
    message.extend([0; 4]);
    message.extend(1i32.to_ne_bytes());
    message.extend([0; 8]);
    let sent = nix::sys::socket::send(socket.as_raw_fd(), &message, nix::sys::socket::MsgFlags::empty())
        .context("send")?;
    same("bytes sent", sent, message.len())?;
    let answer = take(socket, PATIENCE)?.context("the kernel does not answer")?;
    same("number of the answer", answer.get(8..12), Some(&seq.to_ne_bytes()[..]))?;
    ensure!(answer.windows(3).any(|w| w == b"lo\0"), "the answer does not name the device");
    Ok(())
}

/// Bound by the kernel, bound to a number and groups, not bound; options.
pub fn netlink(_: &[String]) -> Check {
    // SAFETY: integers, for which zero is a value.
    let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    address.nl_family = libc::AF_NETLINK as u16;
    let chosen = socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE)?;
    bind(&chosen, &address)?;
    set(&chosen, NETLINK_CAP_ACK, &1)?;
    let grouped = socket(libc::AF_NETLINK, libc::SOCK_DGRAM, libc::NETLINK_ROUTE)?;
    (address.nl_pid, address.nl_groups) = (0x7000_0000 | number()?, RTMGRP_IPV4_IFADDR);
    bind(&grouped, &address)?;
    set(&grouped, NETLINK_ADD_MEMBERSHIP, &RTNLGRP_MDB)?;
    set(&grouped, NETLINK_PKTINFO, &1)?;
    let unbound = socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_SOCK_DIAG)?;
    let names = || -> anyhow::Result<Vec<(u32, u32)>> {
        [&chosen, &grouped, &unbound]
            .into_iter()
            .map(|s| name::<libc::sockaddr_nl>(s).map(|a| (a.nl_pid, a.nl_groups)))
            .collect()
    };
    let options = || -> anyhow::Result<[i32; 3]> {
        Ok([get(&chosen, NETLINK_CAP_ACK)?, get(&grouped, NETLINK_PKTINFO)?, get(&unbound, NETLINK_PKTINFO)?])
    };
    let before = (names()?, options()?);
    same("options", before.1, [1, 1, 0])?;
    rest()?;
    same("names and options", (names()?, options()?), before)?;
    ask_for_loopback(&chosen)?;
    ask_for_loopback(&grouped)
}

const PACKET_AUXDATA: (i32, i32) = (libc::SOL_PACKET, libc::PACKET_AUXDATA);
const PACKET_VERSION: (i32, i32) = (libc::SOL_PACKET, libc::PACKET_VERSION);
const ETH_P_IP: u16 = 0x0800;
const LOOPBACK: i32 = 1;

/// Bound to the loopback device, with and without link headers; not bound; options.
pub fn packet(_: &[String]) -> Check {
    let all = i32::from(ETH_P_IP.to_be());
    let raw = socket(libc::AF_PACKET, libc::SOCK_RAW, 0)?;
    let cooked = socket(libc::AF_PACKET, libc::SOCK_DGRAM, 0)?;
    let idle = socket(libc::AF_PACKET, libc::SOCK_RAW, all)?;
    // SAFETY: integers, for which zero is a value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = ETH_P_IP.to_be();
    address.sll_ifindex = LOOPBACK;
    bind(&raw, &address)?;
    bind(&cooked, &address)?;
    set(&raw, PACKET_AUXDATA, &1)?;
    set(&cooked, PACKET_VERSION, &1)?;
    let facts = || -> anyhow::Result<Vec<(u16, i32, i32, i32)>> {
        [&raw, &cooked, &idle]
            .into_iter()
            .map(|s| {
                let name: libc::sockaddr_ll = name(s)?;
                Ok((name.sll_protocol, name.sll_ifindex, get(s, PACKET_AUXDATA)?, get(s, PACKET_VERSION)?))
            })
            .collect()
    };
    let before = facts()?;
    rest()?;
    same("names and options", facts()?, before)?;
    let text = format!("seen by packet sockets of {}", number()?);
    let receiver = UdpSocket::bind("127.0.0.1:0").context("bind")?;
    let send = || receiver.send_to(text.as_bytes(), receiver.local_addr()?).context("send");
    for (what, socket, header) in [("raw", &raw, 14), ("cooked", &cooked, 0)] {
        send()?;
        // Others talk over the device, too, and may have filled the queue: what was lost is sent again.
        let enough = Instant::now() + PATIENCE;
        let frame = loop {
            match take(socket, PATIENCE / 40)? {
                Some(frame) if frame.ends_with(text.as_bytes()) => break frame,
                Some(_) => {}
                None => _ = send()?,
            }
            ensure!(Instant::now() < enough, "{what}: no such frame");
        };
        same("length of what is around the data", frame.len() - text.len(), header + 20 + 8)?;
    }
    Ok(())
}

const PACKET_RX_RING: (i32, i32) = (libc::SOL_PACKET, libc::PACKET_RX_RING);
const BLOCK: usize = 4096;
const BLOCKS: usize = 16;
/// Bytes of a frame: its head, and 2 KiB to copy at most.
const FRAME: usize = 2048;
/// `TP_STATUS_USER`.
const TAKEN: u32 = 1;

/// `struct tpacket_req`.
fn ring_size() -> [u32; 4] {
    [BLOCK as u32, BLOCKS as u32, FRAME as u32, (BLOCK * BLOCKS / FRAME) as u32]
}

/// Memory shared with the kernel, into which frames go without a call.
struct Ring(*mut u8);

impl Ring {
    fn map(socket: &OwnedFd) -> anyhow::Result<Ring> {
        let (prot, len) = (libc::PROT_READ | libc::PROT_WRITE, BLOCK * BLOCKS);
        // SAFETY: a new mapping, anywhere.
        let at =
            unsafe { libc::mmap(std::ptr::null_mut(), len, prot, libc::MAP_SHARED, socket.as_raw_fd(), 0) };
        ensure!(at != libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
        Ok(Ring(at.cast()))
    }

    /// Takes all frames that are there; tells whether one of them ends with `text`.
    fn take(&self, text: &[u8]) -> bool {
        let mut found = false;
        for at in (0..BLOCK * BLOCKS).step_by(FRAME) {
            // SAFETY: inside the ring, where each frame begins with a `tpacket2_hdr`: status, length, captured
            // length, offset of the frame.
            unsafe {
                let head: *mut u32 = self.0.add(at).cast();
                let status = head.read_volatile();
                if status & TAKEN == 0 {
                    continue;
                }
                let (len, from) =
                    (head.add(2).read_volatile() as usize, head.add(3).cast::<u16>().read_volatile());
                let frame =
                    std::slice::from_raw_parts(self.0.add(at + usize::from(from)), len.min(FRAME / 2));
                found |= frame.ends_with(text);
                head.write_volatile(0);
            }
        }
        found
    }
}

/// A packet socket whose ring is mapped: frames still arrive there.
pub fn ring(_: &[String]) -> Check {
    let all = i32::from(ETH_P_IP.to_be());
    let socket = socket(libc::AF_PACKET, libc::SOCK_RAW, all)?;
    set(&socket, PACKET_VERSION, &1)?;
    set(&socket, PACKET_RX_RING, &ring_size())?;
    let ring = Ring::map(&socket)?;
    let text = format!("seen in the ring of {}", number()?);
    let receiver = UdpSocket::bind("127.0.0.1:0").context("bind")?;
    let arrives = || -> Check {
        let enough = Instant::now() + PATIENCE;
        loop {
            receiver.send_to(text.as_bytes(), receiver.local_addr()?).context("send")?;
            if ring.take(text.as_bytes()) {
                return Ok(());
            }
            ensure!(Instant::now() < enough, "no such frame in the ring");
            std::thread::yield_now();
        }
    };
    arrives()?;
    rest()?;
    arrives()
}

/// A mapped ring whose socket was closed, which nobody could map again.
pub fn closed_ring(_: &[String]) -> Check {
    let socket = socket(libc::AF_PACKET, libc::SOCK_RAW, 0)?;
    set(&socket, PACKET_RX_RING, &ring_size())?;
    let _ring = Ring::map(&socket)?;
    drop(socket);
    rest()
}

const SOL_RAW: i32 = 255;
const ICMP_FILTER: (i32, i32) = (SOL_RAW, 1);
const IP_HDRINCL: (i32, i32) = (libc::IPPROTO_IP, libc::IP_HDRINCL);
const IP_TTL: (i32, i32) = (libc::IPPROTO_IP, libc::IP_TTL);
const ECHO: u8 = 8;
const ECHO_REPLY: u8 = 0;

fn loopback() -> libc::sockaddr_in {
    // SAFETY: integers, for which zero is a value.
    let mut address: libc::sockaddr_in = unsafe { std::mem::zeroed() };
    address.sin_family = libc::AF_INET as u16;
    address.sin_addr.s_addr = u32::from(Ipv4Addr::LOCALHOST).to_be();
    address
}

/// A request for an echo with this number.
fn request(id: u16, seq: u16) -> Vec<u8> {
    let mut bytes = vec![ECHO, 0, 0, 0];
    bytes.extend(id.to_be_bytes());
    bytes.extend(seq.to_be_bytes());
    let mut sum: u32 = bytes.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum();
    sum = (sum & 0xffff) + (sum >> 16);
    bytes[2..4].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    bytes
}

/// Sends a request to the loopback address and waits for the answer to it.
fn echo(socket: &OwnedFd, skip: usize, (id, seq): (u16, u16)) -> Check {
    let (message, to) = (request(id, seq), loopback());
    let (at, len) = ((&raw const to).cast(), size_of_val(&to) as u32);
    // SAFETY: message and address have the sizes given.
    let sent =
        unsafe { libc::sendto(socket.as_raw_fd(), message.as_ptr().cast(), message.len(), 0, at, len) };
    sys("sendto", sent)?;
    loop {
        let Some(answer) = take(socket, PATIENCE)? else { bail!("no echo of {seq}") };
        let answer = answer.get(skip..).unwrap_or_default();
        if answer.first() == Some(&ECHO_REPLY) && answer.get(6..8) == Some(&seq.to_be_bytes()) {
            return Ok(());
        }
    }
}

/// A raw socket with a filter and a time to live, one that writes its own headers, one for pings.
pub fn raw(_: &[String]) -> Check {
    let icmp = socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP)?;
    // All but echo replies are filtered out.
    set(&icmp, ICMP_FILTER, &!(1u32 << ECHO_REPLY))?;
    set(&icmp, IP_TTL, &33)?;
    let own = socket(libc::AF_INET, libc::SOCK_RAW, 253)?;
    set(&own, IP_HDRINCL, &1)?;
    bind(&own, &loopback())?;
    let facts = || -> anyhow::Result<(u32, i32, i32, u32)> {
        let name: libc::sockaddr_in = name(&own)?;
        Ok((get(&icmp, ICMP_FILTER)?, get(&icmp, IP_TTL)?, get(&own, IP_HDRINCL)?, name.sin_addr.s_addr))
    };
    let before = facts()?;
    rest()?;
    same("filter, time to live, header, name", facts()?, before)?;
    // In front of an answer there is its IP header.
    echo(&icmp, 20, (number()? as u16, 5))
}

/// A socket for pings, whose number is its port.
pub fn ping(_: &[String]) -> Check {
    // SAFETY: numbers only.
    let fd =
        unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, libc::IPPROTO_ICMP) };
    if fd < 0 {
        return Err(skip(format!("sockets for pings (net.ipv4.ping_group_range): {}", Errno::last())));
    }
    // SAFETY: a new descriptor.
    let ping = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut address = loopback();
    address.sin_port = (0x4000 | number()? as u16 & 0x3fff).to_be();
    bind(&ping, &address)?;
    let facts = || name::<libc::sockaddr_in>(&ping).map(|a| (a.sin_addr.s_addr, a.sin_port));
    let before = facts()?;
    rest()?;
    same("name", facts()?, before)?;
    echo(&ping, 0, (0, 6))
}
