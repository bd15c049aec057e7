//! Segments made by hand, which a connection receives as if its peer had sent them: the only way to tell it
//! that the peer has ended its stream, or has seen the end of ours.
//!
//! They carry the mark that the network's lock lets through, and never leave this machine: they are addressed
//! to the connection's own end.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, AsRawFd},
};

use nix::sys::socket::{MsgFlags, send as send_packet};

use crate::{
    error::{Context, Result, SysContext},
    files::sk::inet,
    netlock::{Connection, MARK},
    sys::sockopt::{self, general},
};

const TCP: u8 = libc::IPPROTO_TCP as u8;
const HOPS: u8 = 64;

/// What a segment says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    /// Number of its first byte, as the peer counts.
    pub(super) sequence: u32,
    /// Number of the first byte the peer has not seen.
    pub(super) acknowledged: u32,
    /// The peer's window, scaled down.
    pub(super) window: u16,
    /// It ends the peer's stream.
    pub(super) end: bool,
}

/// Sends `segment` from the remote end of `connection` to the local one; `device` is the one the connection is
/// bound to.
pub(super) fn send(connection: &Connection, segment: Segment, device: Option<&str>) -> Result<()> {
    let packet = packet(connection, segment);
    let family = if connection.local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    // IPPROTO_RAW: the packet begins with its IP header.
    let socket = sockopt::socket(family, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
    sockopt::set_int(socket.as_fd(), general(libc::SO_MARK, "SO_MARK"), MARK.cast_signed())?;
    if let (Some(device), SocketAddr::V6(_)) = (device, connection.local) {
        let bind = general(libc::SO_BINDTODEVICE, "SO_BINDTODEVICE");
        sockopt::set_bytes(socket.as_fd(), bind, device.as_bytes())?;
    }
    let to = SocketAddr::new(connection.local.ip(), 0);
    sockopt::connect(socket.as_fd(), &inet::raw(&to))
        .and_then(|()| send_packet(socket.as_raw_fd(), &packet, MsgFlags::empty()).call("send(SOCK_RAW)"))
        .during(|| format!("a segment for {}", connection.local))?;
    Ok(())
}

/// IP and TCP headers; there is no data.
fn packet(connection: &Connection, segment: Segment) -> Vec<u8> {
    let (from, to) = (connection.remote, connection.local);
    let mut tcp = [0u8; 20];
    tcp[..2].copy_from_slice(&from.port().to_be_bytes());
    tcp[2..4].copy_from_slice(&to.port().to_be_bytes());
    tcp[4..8].copy_from_slice(&segment.sequence.to_be_bytes());
    tcp[8..12].copy_from_slice(&segment.acknowledged.to_be_bytes());
    tcp[12] = (tcp.len() as u8 / 4) << 4;
    // ACK, FIN
    tcp[13] = 0x10 | u8::from(segment.end);
    tcp[14..16].copy_from_slice(&segment.window.to_be_bytes());
    let length = tcp.len() as u16;
    let pseudo = [octets(from.ip()), octets(to.ip()), vec![0, TCP], length.to_be_bytes().to_vec()].concat();
    let sum = checksum(&[pseudo, tcp.to_vec()].concat());
    tcp[16..18].copy_from_slice(&sum.to_be_bytes());
    let mut packet = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let mut ip = vec![0x45, 0];
            ip.extend((20 + length).to_be_bytes());
            // The kernel fills in identification and checksum.
            ip.extend([0, 0, 0, 0, HOPS, TCP, 0, 0]);
            ip.extend(from.octets());
            ip.extend(to.octets());
            ip
        }
        (from, to) => {
            let mut ip = vec![0x60, 0, 0, 0];
            ip.extend(length.to_be_bytes());
            ip.extend([TCP, HOPS]);
            ip.extend(octets(from));
            ip.extend(octets(to));
            ip
        }
    };
    packet.extend(tcp);
    packet
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// The checksum of the internet (RFC 1071) of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes.chunks_exact(2).map(|b| u32::from(u16::from_be_bytes([b[0], b[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_add_up() {
        for (local, remote) in [("10.0.0.1:80", "10.0.0.2:4000"), ("[fe80::1]:80", "[fe80::2]:65000")] {
            let c = Connection::new(local.parse().unwrap(), remote.parse().unwrap());
            let segment = Segment { sequence: u32::MAX, acknowledged: 1, window: 502, end: true };
            let bytes = packet(&c, segment);
            let tcp = &bytes[bytes.len() - 20..];
            let pseudo = [octets(c.remote.ip()), octets(c.local.ip()), vec![0, 6, 0, 20]].concat();
            assert_eq!(checksum(&[&pseudo, tcp].concat()), 0);
            assert_eq!(tcp[13], 0x11);
        }
    }
}
