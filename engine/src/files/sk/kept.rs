//! Options of sockets that entries have no field for: they go into an image of ours. CRIU loses them.
//!
//! Only what differs from a new socket of the same sort is kept. An option that this kernel does not take back is warned
//! of: the socket works without.

use std::{
    collections::HashMap,
    os::fd::{AsFd, BorrowedFd},
};

use rcriu_images::pb;

use super::SocketKind;
use crate::sys::sockopt::{self, Opt, general};

const fn ip(number: i32, name: &'static str) -> Opt {
    Opt { level: libc::SOL_IP, number, name }
}

const fn ip6(number: i32, name: &'static str) -> Opt {
    Opt { level: libc::SOL_IPV6, number, name }
}

const fn tcp(number: i32, name: &'static str) -> Opt {
    Opt { level: libc::SOL_TCP, number, name }
}

const fn udp(number: i32, name: &'static str) -> Opt {
    Opt { level: libc::SOL_UDP, number, name }
}

/// Nobody may change the filter any more: only once it is attached.
const LOCK_FILTER: Opt = general(44, "SO_LOCK_FILTER");

/// Of sockets of any family.
const GENERAL: &[Opt] = &[
    general(29, "SO_TIMESTAMP"),
    general(35, "SO_TIMESTAMPNS"),
    general(37, "SO_TIMESTAMPING"),
    general(63, "SO_TIMESTAMP_NEW"),
    general(64, "SO_TIMESTAMPNS_NEW"),
    general(65, "SO_TIMESTAMPING_NEW"),
    general(40, "SO_RXQ_OVFL"),
    general(41, "SO_WIFI_STATUS"),
    general(42, "SO_PEEK_OFF"),
    general(43, "SO_NOFCS"),
    general(45, "SO_SELECT_ERR_QUEUE"),
    general(46, "SO_BUSY_POLL"),
    general(47, "SO_MAX_PACING_RATE"),
    general(60, "SO_ZEROCOPY"),
    general(61, "SO_TXTIME"),
    general(69, "SO_PREFER_BUSY_POLL"),
    general(70, "SO_BUSY_POLL_BUDGET"),
    general(74, "SO_TXREHASH"),
    general(75, "SO_RCVMARK"),
    general(76, "SO_PASSPIDFD"),
    general(83, "SO_PASSRIGHTS"),
    LOCK_FILTER,
];

/// Of IPv4; sockets of IPv6 that take both have them too.
const IP: &[Opt] = &[
    ip(4, "IP_OPTIONS"),
    ip(6, "IP_RECVOPTS"),
    ip(7, "IP_RETOPTS"),
    ip(10, "IP_MTU_DISCOVER"),
    ip(11, "IP_RECVERR"),
    ip(12, "IP_RECVTTL"),
    ip(13, "IP_RECVTOS"),
    ip(18, "IP_PASSSEC"),
    ip(19, "IP_TRANSPARENT"),
    ip(20, "IP_RECVORIGDSTADDR"),
    ip(21, "IP_MINTTL"),
    ip(23, "IP_CHECKSUM"),
    ip(24, "IP_BIND_ADDRESS_NO_PORT"),
    ip(25, "IP_RECVFRAGSIZE"),
    ip(26, "IP_RECVERR_RFC4884"),
    ip(32, "IP_MULTICAST_IF"),
    ip(33, "IP_MULTICAST_TTL"),
    ip(34, "IP_MULTICAST_LOOP"),
    ip(49, "IP_MULTICAST_ALL"),
    ip(50, "IP_UNICAST_IF"),
    ip(51, "IP_LOCAL_PORT_RANGE"),
];

/// Of IPv6.
const IP6: &[Opt] = &[
    ip6(16, "IPV6_UNICAST_HOPS"),
    ip6(17, "IPV6_MULTICAST_IF"),
    ip6(18, "IPV6_MULTICAST_HOPS"),
    ip6(19, "IPV6_MULTICAST_LOOP"),
    ip6(23, "IPV6_MTU_DISCOVER"),
    ip6(25, "IPV6_RECVERR"),
    ip6(29, "IPV6_MULTICAST_ALL"),
    ip6(31, "IPV6_RECVERR_RFC4884"),
    ip6(33, "IPV6_FLOWINFO_SEND"),
    ip6(51, "IPV6_RECVHOPLIMIT"),
    ip6(53, "IPV6_RECVHOPOPTS"),
    ip6(56, "IPV6_RECVRTHDR"),
    ip6(58, "IPV6_RECVDSTOPTS"),
    ip6(60, "IPV6_RECVPATHMTU"),
    ip6(62, "IPV6_DONTFRAG"),
    ip6(66, "IPV6_RECVTCLASS"),
    ip6(67, "IPV6_TCLASS"),
    ip6(70, "IPV6_AUTOFLOWLABEL"),
    ip6(72, "IPV6_ADDR_PREFERENCES"),
    ip6(73, "IPV6_MINHOPCOUNT"),
    ip6(74, "IPV6_RECVORIGDSTADDR"),
    ip6(75, "IPV6_TRANSPARENT"),
    ip6(76, "IPV6_UNICAST_IF"),
    ip6(77, "IPV6_RECVFRAGSIZE"),
];

/// Of a TCP socket without a peer: later the kernel tells what was agreed on.
const MAXSEG: Opt = tcp(2, "TCP_MAXSEG");

/// Of TCP.
const TCP: &[Opt] = &[
    tcp(7, "TCP_SYNCNT"),
    tcp(8, "TCP_LINGER2"),
    tcp(9, "TCP_DEFER_ACCEPT"),
    tcp(13, "TCP_CONGESTION"),
    tcp(16, "TCP_THIN_LINEAR_TIMEOUTS"),
    tcp(18, "TCP_USER_TIMEOUT"),
    tcp(23, "TCP_FASTOPEN"),
    tcp(25, "TCP_NOTSENT_LOWAT"),
    tcp(27, "TCP_SAVE_SYN"),
    tcp(30, "TCP_FASTOPEN_CONNECT"),
    tcp(34, "TCP_FASTOPEN_NO_COOKIE"),
    tcp(36, "TCP_INQ"),
    tcp(37, "TCP_TX_DELAY"),
    MAXSEG,
];

/// Of UDP.
const UDP: &[Opt] = &[
    udp(100, "UDP_ENCAP"),
    udp(101, "UDP_NO_CHECK6_TX"),
    udp(102, "UDP_NO_CHECK6_RX"),
    udp(103, "UDP_SEGMENT"),
    udp(104, "UDP_GRO"),
];

/// What streams tell, from the packet they began with, but neither heed nor take.
const NOT_OF_STREAMS: &[Opt] = &[
    ip(32, "IP_MULTICAST_IF"),
    ip(33, "IP_MULTICAST_TTL"),
    ip6(17, "IPV6_MULTICAST_IF"),
    ip6(18, "IPV6_MULTICAST_HOPS"),
];

/// Those that a socket may have.
fn all(socket: SocketKind) -> impl Iterator<Item = Opt> {
    let internet = [libc::AF_INET, libc::AF_INET6].contains(&socket.family);
    let transport: &[Opt] = match (socket.kind, socket.protocol) {
        (libc::SOCK_STREAM, 0 | libc::IPPROTO_TCP | libc::IPPROTO_MPTCP) => TCP,
        (libc::SOCK_DGRAM, 0 | libc::IPPROTO_UDP | libc::IPPROTO_UDPLITE) => UDP,
        _ => &[],
    };
    let lists = [
        GENERAL,
        if internet { IP } else { &[] },
        if socket.family == libc::AF_INET6 { IP6 } else { &[] },
        if internet { transport } else { &[] },
    ];
    let stream = socket.kind == libc::SOCK_STREAM;
    lists.into_iter().flatten().filter(move |opt| !(stream && NOT_OF_STREAMS.contains(opt))).copied()
}

/// The value of an option; none of one that the socket has not.
fn value(fd: BorrowedFd<'_>, opt: Opt) -> Option<Vec<u8>> {
    sockopt::bytes::<64>(fd, opt).ok().map(|(bytes, len)| bytes[..len].to_vec())
}

/// Values of options, by level and number.
type Values = HashMap<(i32, i32), Vec<u8>>;

/// What new sockets have, by family, type and protocol.
#[derive(Debug, Default)]
pub(super) struct Fresh(HashMap<(i32, i32, i32), Values>);

impl Fresh {
    fn of(&mut self, socket: SocketKind) -> &Values {
        let key = (socket.family, socket.kind, socket.protocol);
        self.0.entry(key).or_insert_with(|| {
            let Ok(new) = sockopt::socket(key.0, key.1, key.2) else { return HashMap::new() };
            let values =
                all(socket).filter_map(|opt| Some(((opt.level, opt.number), value(new.as_fd(), opt)?)));
            values.collect()
        })
    }

    /// Options of a socket that are not those of a new one. `connected` says that it has a peer.
    pub(super) fn differing(
        &mut self,
        fd: BorrowedFd<'_>,
        socket: SocketKind,
        connected: bool,
    ) -> Vec<pb::RcriuSockopt> {
        let fresh = self.of(socket);
        let differs = |opt: &Opt| {
            let value = value(fd, *opt)?;
            // What no new socket has told cannot be compared, nor set.
            fresh.get(&(opt.level, opt.number)).filter(|fresh| **fresh != value)?;
            Some(pb::RcriuSockopt {
                level: opt.level.cast_unsigned(),
                number: opt.number.cast_unsigned(),
                value,
            })
        };
        all(socket).filter(|opt| !(connected && *opt == MAXSEG)).filter_map(|opt| differs(&opt)).collect()
    }
}

/// When options are set.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum When {
    /// The socket is new: some matter to bind(2) and connect(2).
    New,
    /// All else is done.
    Last,
}

/// Sets options again. One that is unknown, or refused, is warned of; `who` is what messages call the socket.
pub(super) fn restore(
    (fd, who): (BorrowedFd<'_>, &str),
    socket: SocketKind,
    options: &[pb::RcriuSockopt],
    when: When,
) {
    for kept in options {
        let known = all(socket)
            .find(|opt| (opt.level.cast_unsigned(), opt.number.cast_unsigned()) == (kept.level, kept.number));
        let Some(opt) = known else {
            log::warn!("{who}: option {} of level {} is unknown, and not set again", kept.number, kept.level);
            continue;
        };
        if (opt == LOCK_FILTER) != (when == When::Last) {
            continue;
        }
        if let Err(e) = sockopt::set_bytes(fd, opt, &kept.value) {
            log::warn!("{who}: {} is not set again: {e}", opt.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_set_again() {
        type Changes<'a> = &'a [(Opt, Vec<u8>)];
        let of = |family, kind, protocol| SocketKind { family, kind, protocol };
        let stream = of(libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_TCP);
        let datagram = of(libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_UDP);
        let unix = of(libc::AF_UNIX, libc::SOCK_DGRAM, 0);
        let int = |value: i32| value.to_ne_bytes().to_vec();
        let changed: [(SocketKind, Changes<'_>); 3] = [
            (
                stream,
                &[
                    (tcp(18, "TCP_USER_TIMEOUT"), int(4711)),
                    (tcp(13, "TCP_CONGESTION"), b"reno".to_vec()),
                    (ip6(67, "IPV6_TCLASS"), int(32)),
                    (ip(11, "IP_RECVERR"), int(1)),
                ],
            ),
            (
                datagram,
                &[
                    (ip(33, "IP_MULTICAST_TTL"), int(9)),
                    (general(37, "SO_TIMESTAMPING"), int(16)),
                    (ip(10, "IP_MTU_DISCOVER"), int(2)),
                    (udp(104, "UDP_GRO"), int(1)),
                ],
            ),
            (unix, &[(general(42, "SO_PEEK_OFF"), int(3)), (general(29, "SO_TIMESTAMP"), int(1))]),
        ];
        for (sort, options) in changed {
            let socket = || sockopt::socket(sort.family, sort.kind, sort.protocol).unwrap();
            let mut fresh = Fresh::default();
            let one = socket();
            assert_eq!(fresh.differing(one.as_fd(), sort, false), vec![]);
            for (opt, value) in options {
                sockopt::set_bytes(one.as_fd(), *opt, value).unwrap();
            }
            let kept = fresh.differing(one.as_fd(), sort, false);
            assert!(kept.len() >= options.len() - 1, "{kept:?}");
            let other = socket();
            restore((other.as_fd(), "a socket"), sort, &kept, When::New);
            assert_eq!(fresh.differing(other.as_fd(), sort, false), kept);
        }
    }
}
