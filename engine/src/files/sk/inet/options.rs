//! Options of the internet families: of IP, of raw sockets, of TCP.

use std::os::fd::BorrowedFd;

use rcriu_images::pb;

use crate::{
    error::{Error, Result},
    sys::sockopt::{self, Opt},
};

const fn opt(level: i32, number: i32, name: &'static str) -> Opt {
    Opt { level, number, name }
}

pub(super) const TCP_INFO: Opt = opt(libc::SOL_TCP, libc::TCP_INFO, "TCP_INFO");
const NODELAY: Opt = opt(libc::SOL_TCP, libc::TCP_NODELAY, "TCP_NODELAY");
const CORK: Opt = opt(libc::SOL_TCP, libc::TCP_CORK, "TCP_CORK");
const KEEPCNT: Opt = opt(libc::SOL_TCP, libc::TCP_KEEPCNT, "TCP_KEEPCNT");
const KEEPIDLE: Opt = opt(libc::SOL_TCP, libc::TCP_KEEPIDLE, "TCP_KEEPIDLE");
const KEEPINTVL: Opt = opt(libc::SOL_TCP, libc::TCP_KEEPINTVL, "TCP_KEEPINTVL");
pub(super) const UDP_CORK: Opt = opt(libc::SOL_UDP, libc::UDP_CORK, "UDP_CORK");
pub(super) const V6ONLY: Opt = opt(libc::SOL_IPV6, libc::IPV6_V6ONLY, "IPV6_V6ONLY");
pub(super) const FREEBIND: Opt = opt(libc::SOL_IP, libc::IP_FREEBIND, "IP_FREEBIND");
/// Of raw sockets of IPv6, which take no options of IPv4.
pub(super) const FREEBIND6: Opt = opt(libc::SOL_IPV6, 78, "IPV6_FREEBIND");
const PKTINFO: Opt = opt(libc::SOL_IP, libc::IP_PKTINFO, "IP_PKTINFO");
const PKTINFO6: Opt = opt(libc::SOL_IPV6, libc::IPV6_RECVPKTINFO, "IPV6_RECVPKTINFO");
const TOS: Opt = opt(libc::SOL_IP, libc::IP_TOS, "IP_TOS");
const TTL: Opt = opt(libc::SOL_IP, libc::IP_TTL, "IP_TTL");
const HDRINCL: Opt = opt(libc::SOL_IP, libc::IP_HDRINCL, "IP_HDRINCL");
const HDRINCL6: Opt = opt(libc::SOL_IPV6, libc::IPV6_HDRINCL, "IPV6_HDRINCL");
const NODEFRAG: Opt = opt(libc::SOL_IP, 22, "IP_NODEFRAG");
const CHECKSUM6: Opt = opt(libc::SOL_IPV6, libc::IPV6_CHECKSUM, "IPV6_CHECKSUM");
const ICMP_FILTER: Opt = opt(libc::SOL_RAW, 1, "ICMP_FILTER");
const ICMP6_FILTER: Opt = opt(58, 1, "ICMPV6_FILTER");

/// Which socket it is about.
#[derive(Clone, Copy, Debug)]
pub(super) struct Of {
    pub(super) v6: bool,
    pub(super) raw: bool,
    /// `IPPROTO_*`.
    pub(super) protocol: i32,
}

impl Of {
    fn pktinfo(self) -> Opt {
        if self.v6 { PKTINFO6 } else { PKTINFO }
    }

    pub(super) fn freebind(self) -> Opt {
        if self.v6 && self.raw { FREEBIND6 } else { FREEBIND }
    }

    fn header(self) -> Opt {
        if self.v6 { HDRINCL6 } else { HDRINCL }
    }

    /// The filter of message types, of sockets that have one.
    fn filter(self) -> Option<Opt> {
        match (self.v6, self.protocol) {
            (false, libc::IPPROTO_ICMP) if self.raw => Some(ICMP_FILTER),
            (true, libc::IPPROTO_ICMPV6) if self.raw => Some(ICMP6_FILTER),
            _ => None,
        }
    }
}

fn on(fd: BorrowedFd<'_>, opt: Opt) -> Result<Option<bool>> {
    sockopt::int(fd, opt).map(|v| (v != 0).then_some(true))
}

fn number(fd: BorrowedFd<'_>, opt: Opt) -> Result<Option<u32>> {
    sockopt::int(fd, opt).map(|v| Some(v.cast_unsigned()).filter(|v| *v != 0))
}

/// Reads the options of IP.
pub(super) fn dump_ip(fd: BorrowedFd<'_>, of: Of) -> Result<pb::IpOptsEntry> {
    Ok(pb::IpOptsEntry {
        freebind: on(fd, of.freebind())?,
        pktinfo: on(fd, of.pktinfo())?,
        tos: if of.v6 { None } else { number(fd, TOS)? },
        ttl: if of.v6 { None } else { number(fd, TTL)? },
        raw: if of.raw { Some(dump_raw(fd, of)?) } else { None },
    })
}

fn dump_raw(fd: BorrowedFd<'_>, of: Of) -> Result<pb::IpOptsRawEntry> {
    let mut filter = Vec::new();
    if let Some(opt) = of.filter() {
        let (bytes, len) = sockopt::bytes::<32>(fd, opt)?;
        let words = bytes[..len].chunks_exact(4);
        filter = words.map(|w| w.try_into().map_or(0, u32::from_ne_bytes)).collect();
    }
    // Where the kernel puts checksums: two protocols have a place of their own from the beginning.
    let usual = match of.protocol {
        libc::IPPROTO_ICMPV6 => 2,
        libc::IPPROTO_MH => 4,
        _ => -1,
    };
    if of.v6 && sockopt::int(fd, CHECKSUM6)? != usual {
        return Err(Error::unsupported("a raw socket with a place for checksums (IPV6_CHECKSUM)")
            .remedy("close it before the dump"));
    }
    Ok(pb::IpOptsRawEntry {
        hdrincl: on(fd, of.header())?,
        nodefrag: if of.v6 { None } else { on(fd, NODEFRAG)? },
        checksum: None,
        icmpv_filter: filter,
    })
}

/// Reads the options of TCP.
pub(super) fn dump_tcp(fd: BorrowedFd<'_>) -> Result<pb::TcpOptsEntry> {
    Ok(pb::TcpOptsEntry {
        cork: on(fd, CORK)?,
        nodelay: on(fd, NODELAY)?,
        keepcnt: number(fd, KEEPCNT)?,
        keepidle: number(fd, KEEPIDLE)?,
        keepintvl: number(fd, KEEPINTVL)?,
    })
}

/// Sets the options of IP.
pub(super) fn restore_ip(fd: BorrowedFd<'_>, ip: &pb::IpOptsEntry, of: Of) -> Result<()> {
    let all = [
        (of.freebind(), flag(ip.freebind)),
        (of.pktinfo(), flag(ip.pktinfo)),
        (TOS, ip.tos.map(u32::cast_signed)),
        (TTL, ip.ttl.map(u32::cast_signed)),
    ];
    set_all(fd, &all)?;
    let Some(raw) = ip.raw.as_ref().filter(|_| of.raw) else { return Ok(()) };
    set_all(fd, &[(of.header(), flag(raw.hdrincl)), (NODEFRAG, flag(raw.nodefrag).filter(|_| !of.v6))])?;
    match of.filter() {
        Some(opt) if !raw.icmpv_filter.is_empty() => {
            let bytes: Vec<u8> = raw.icmpv_filter.iter().flat_map(|w| w.to_ne_bytes()).collect();
            sockopt::set_bytes(fd, opt, &bytes)
        }
        _ => Ok(()),
    }
}

/// Sets the options of TCP.
pub(super) fn restore_tcp(fd: BorrowedFd<'_>, tcp: &pb::TcpOptsEntry) -> Result<()> {
    let number = |v: Option<u32>| v.map(u32::cast_signed);
    let all = [
        (NODELAY, flag(tcp.nodelay)),
        (CORK, flag(tcp.cork)),
        (KEEPCNT, number(tcp.keepcnt)),
        (KEEPIDLE, number(tcp.keepidle)),
        (KEEPINTVL, number(tcp.keepintvl)),
    ];
    set_all(fd, &all)
}

fn flag(v: Option<bool>) -> Option<i32> {
    v.filter(|on| *on).map(i32::from)
}

fn set_all(fd: BorrowedFd<'_>, all: &[(Opt, Option<i32>)]) -> Result<()> {
    all.iter()
        .filter_map(|(opt, value)| Some((*opt, (*value)?)))
        .try_for_each(|(opt, value)| sockopt::set_int(fd, opt, value))
}

#[cfg(test)]
pub(super) const TEST: [Opt; 2] = [NODELAY, TTL];
