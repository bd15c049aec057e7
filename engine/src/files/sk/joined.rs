//! Groups of multicast that a socket has joined, ip(7) and ipv6(7). The kernel tells the groups of each device, and of a
//! socket whether it is in a group that is named: so every group of the network namespace is asked for.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::BorrowedFd,
};

use rcriu_images::pb;

use super::SocketKind;
use crate::{
    error::{Context, Error, Result, SysContext},
    procfs::number,
    sys::sockopt::{self, Opt},
};

/// `MCAST_JOIN_GROUP` and `MCAST_MSFILTER`, of both levels.
const JOIN: i32 = 42;
const FILTER: i32 = 48;
/// Bytes of `struct sockaddr_storage`, and where `struct group_filter` has what.
const STORAGE: usize = 128;
const GROUP: usize = 8;
const MODE: usize = GROUP + STORAGE;
const COUNT: usize = MODE + 4;
const SOURCES: usize = COUNT + 4;
/// `MCAST_INCLUDE`: only from the sources named.
const INCLUDE: u32 = 1;
/// Sources of a group at most, far above any limit of the kernel that somebody sets.
const MOST: usize = 4096;

fn level(address: IpAddr) -> i32 {
    if address.is_ipv4() { libc::SOL_IP } else { libc::SOL_IPV6 }
}

fn opt(address: IpAddr, number: i32) -> Opt {
    let name = if number == JOIN { "MCAST_JOIN_GROUP" } else { "MCAST_MSFILTER" };
    Opt { level: level(address), number, name }
}

/// Writes an address as `struct sockaddr_storage` has it.
fn put(into: &mut [u8], address: IpAddr) {
    let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    into[..2].copy_from_slice(&(family as u16).to_ne_bytes());
    match address {
        IpAddr::V4(v4) => into[4..8].copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => into[8..24].copy_from_slice(&v6.octets()),
    }
}

fn get(from: &[u8], v4: bool) -> Vec<u8> {
    if v4 { from[4..8].to_vec() } else { from[8..24].to_vec() }
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}

/// A group that some socket, or the kernel itself, has joined on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Group {
    index: u32,
    device: String,
    address: IpAddr,
}

/// All groups of a network namespace.
#[derive(Debug, Default)]
pub(super) struct Groups(Vec<Group>);

impl Groups {
    /// Those of the namespace that the calling thread is in.
    pub(super) fn read() -> Result<Groups> {
        let file = |name: &str| match std::fs::read_to_string(format!("/proc/thread-self/net/{name}")) {
            // A kernel without the protocol, or without multicast.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
            other => other.call("read").during(|| format!("/proc/thread-self/net/{name}")),
        };
        let strange = |name| Error::host(format!("/proc/thread-self/net/{name} is not understood"));
        let v4 = igmp(&file("igmp")?).ok_or_else(|| strange("igmp"))?;
        let v6 = igmp6(&file("igmp6")?).ok_or_else(|| strange("igmp6"))?;
        Ok(Groups([v4, v6].concat()))
    }

    /// Those that a socket is in.
    pub(super) fn of(&self, fd: BorrowedFd<'_>, socket: SocketKind) -> Result<Vec<pb::RcriuMembership>> {
        let mut joined = Vec::new();
        // Connections have none, and others than of IPv6 none of IPv6.
        let may = |group: &&Group| {
            socket.kind != libc::SOCK_STREAM && (group.address.is_ipv4() || socket.family == libc::AF_INET6)
        };
        for group in self.0.iter().filter(may) {
            joined
                .extend(filter(fd, group).during(|| format!("group {} on {}", group.address, group.device))?);
        }
        Ok(joined)
    }
}

/// What a socket hears of a group; `None` if it has not joined it.
fn filter(fd: BorrowedFd<'_>, group: &Group) -> Result<Option<pb::RcriuMembership>> {
    let mut room = 0;
    loop {
        let mut bytes = vec![0; SOURCES + room * STORAGE];
        bytes[..4].copy_from_slice(&group.index.to_ne_bytes());
        put(&mut bytes[GROUP..MODE], group.address);
        bytes[COUNT..SOURCES].copy_from_slice(&(room as u32).to_ne_bytes());
        match sockopt::exchange(fd, opt(group.address, FILTER), &mut bytes) {
            Ok(()) => {}
            Err(e) if matches!(e.errno(), Some(libc::EADDRNOTAVAIL | libc::ENOPROTOOPT | libc::EINVAL)) => {
                return Ok(None);
            }
            Err(e) => return Err(e),
        }
        let word =
            |at: usize| bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes);
        let count = word(COUNT) as usize;
        if count > room {
            if count > MOST {
                return Err(Error::unsupported(format!("a socket that hears {count} sources of one group"))
                    .remedy("have it leave the group, or some sources, before the dump"));
            }
            room = count;
            continue;
        }
        let list = bytes[SOURCES..].chunks_exact(STORAGE).take(count);
        return Ok(Some(pb::RcriuMembership {
            device: group.device.clone(),
            group: match group.address {
                IpAddr::V4(v4) => v4.octets().to_vec(),
                IpAddr::V6(v6) => v6.octets().to_vec(),
            },
            mode: word(MODE),
            source: list.map(|source| get(source, group.address.is_ipv4())).collect(),
        }));
    }
}

/// Joins groups again; `who` is what messages call the socket.
///
/// # Errors
/// Images that make no sense. A group that cannot be joined is warned of: its device may not be there.
pub(super) fn restore((fd, who): (BorrowedFd<'_>, &str), joined: &[pb::RcriuMembership]) -> Result<()> {
    for membership in joined {
        let bad = || Error::image("files.img: a group of multicast that is none");
        let group = address(&membership.group).filter(IpAddr::is_multicast).ok_or_else(bad)?;
        let sources = membership.source.iter().map(|s| address(s).filter(|s| s.is_ipv4() == group.is_ipv4()));
        let sources = sources.collect::<Option<Vec<_>>>().filter(|s| s.len() <= MOST).ok_or_else(bad)?;
        if let Err(e) = join(fd, membership, group, &sources) {
            log::warn!("{who}: group {group} on {} is not joined again: {e}", membership.device);
        }
    }
    Ok(())
}

fn join(
    fd: BorrowedFd<'_>,
    membership: &pb::RcriuMembership,
    group: IpAddr,
    sources: &[IpAddr],
) -> Result<()> {
    let index = sockopt::device_index(fd, &membership.device)?;
    let mut bytes = vec![0; SOURCES + sources.len() * STORAGE];
    bytes[..4].copy_from_slice(&index.to_ne_bytes());
    put(&mut bytes[GROUP..MODE], group);
    sockopt::set_bytes(fd, opt(group, JOIN), &bytes[..MODE])?;
    if membership.mode != INCLUDE && sources.is_empty() {
        return Ok(());
    }
    bytes[MODE..COUNT].copy_from_slice(&membership.mode.to_ne_bytes());
    bytes[COUNT..SOURCES].copy_from_slice(&(sources.len() as u32).to_ne_bytes());
    for (into, source) in bytes[SOURCES..].chunks_exact_mut(STORAGE).zip(sources) {
        put(into, *source);
    }
    sockopt::set_bytes(fd, opt(group, FILTER), &bytes)
}

/// A line for each device, and below it one for each of its groups.
fn igmp(text: &str) -> Option<Vec<Group>> {
    let (mut groups, mut device) = (Vec::new(), None);
    for line in text.lines().skip(1) {
        if line.starts_with(|c: char| c.is_ascii_digit()) {
            let mut words = line.split_ascii_whitespace();
            device = Some((
                number::<u32>(words.next()?.as_bytes())?,
                words.next()?.trim_end_matches(':').to_owned(),
            ));
        } else {
            let (index, name) = device.clone()?;
            let word = u32::from_str_radix(line.split_ascii_whitespace().next()?, 16).ok()?;
            let address = IpAddr::V4(Ipv4Addr::from(word.to_ne_bytes()));
            groups.push(Group { index, device: name, address });
        }
    }
    Some(groups)
}

/// A line for each group of a device.
fn igmp6(text: &str) -> Option<Vec<Group>> {
    let line = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (index, device, word) = (words.next()?, words.next()?, words.next()?);
        let address = IpAddr::V6(Ipv6Addr::from(u128::from_str_radix(word, 16).ok()?));
        Some(Group { index: number(index.as_bytes())?, device: device.to_owned(), address })
    };
    text.lines().map(line).collect()
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn tables_are_read() {
        let v4 = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
                  1\tlo        :     1      V3\n\t\t\t\t010000E0     1 0:00000000\t\t0\n\
                  2\teth0      :     2      V3\n\t\t\t\tFB0000E0     1 0:00000000\t\t0\n";
        let found = igmp(v4).unwrap();
        assert_eq!(found.len(), 2);
        let group = Group { index: 2, device: "eth0".into(), address: "224.0.0.251".parse().unwrap() };
        assert_eq!(found[1], group);
        let v6 = "1    lo              ff020000000000000000000000000001     1 0000000C 0\n";
        assert_eq!(igmp6(v6).unwrap()[0].address, "ff02::1".parse::<IpAddr>().unwrap());
    }

    #[test]
    fn groups_are_joined_again() {
        let kind = SocketKind { family: libc::AF_INET, kind: libc::SOCK_DGRAM, protocol: libc::IPPROTO_UDP };
        let socket = || UdpSocket::bind("127.0.0.1:0").unwrap();
        let (one, other) = (socket(), socket());
        let (group, local) = ("239.1.2.3".parse().unwrap(), Ipv4Addr::LOCALHOST);
        if let Err(e) = one.join_multicast_v4(&group, &local) {
            eprintln!("skipped: the loopback device takes no groups: {e}");
            return;
        }
        let joined = Groups::read().unwrap().of(one.as_fd(), kind).unwrap();
        assert_eq!(joined.len(), 1);
        assert_eq!((joined[0].group.as_slice(), joined[0].mode), (&[239, 1, 2, 3][..], 0));
        assert_eq!(Groups::read().unwrap().of(other.as_fd(), kind).unwrap(), vec![]);
        // One source only.
        let only =
            pb::RcriuMembership { mode: INCLUDE, source: vec![vec![127, 0, 0, 9]], ..joined[0].clone() };
        restore((other.as_fd(), "one"), std::slice::from_ref(&only)).unwrap();
        assert_eq!(Groups::read().unwrap().of(other.as_fd(), kind).unwrap(), vec![only]);
        restore((socket().as_fd(), "two"), &joined).unwrap();
        let bad = pb::RcriuMembership { group: vec![127, 0, 0, 1], ..joined[0].clone() };
        assert!(restore((one.as_fd(), "three"), &[bad]).is_err());
    }
}
