//! Who is at the other end, as the kernel noted it (SO_PEERCRED): whoever made a pair, who connected, who listened.
//! Servers decide by it what a client may do, and a restore that connects everything as root would make them all root.
//!
//! User and group are kept; a process number is that of the task that makes the connection again, as no other can.
//! Who connected to a listener that has not accepted yet is not told: that is the owner of the socket then.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, UnixAddr, UnixCredentials, accept4, getsockname, getsockopt, listen,
    socket, socketpair, sockopt::PeerCredentials,
};
use rcriu_images::pb;

use super::{
    LISTEN,
    plan::{Cluster, Member},
    restore::sock_type,
};
use crate::{
    error::{Result, SysContext},
    files::{FilesOut, sk::credentials},
    sys::{fd, ids, sockopt},
};

/// For the images; `None` of a socket that never had a peer.
pub(super) fn dump(fd: BorrowedFd<'_>, out: &FilesOut<'_>) -> Result<Option<pb::RcriuCredentials>> {
    let peer: UnixCredentials = getsockopt(&fd, PeerCredentials).call("getsockopt(SO_PEERCRED)")?;
    Ok((peer.uid() != u32::MAX).then(|| credentials::dump(peer, out)))
}

/// User and group.
type Who = Option<(u32, u32)>;

/// Who is at the other end of a socket.
fn peer(member: &Member) -> Who {
    member.peer_is.as_ref().map(|peer| (peer.uid, peer.gid)).filter(|who| who.0 != u32::MAX)
}

/// Does `act` as somebody else, or, where that is denied, as ourselves.
fn acting<T>(who: Who, act: impl Fn() -> Result<T>) -> Result<T> {
    let Some((uid, gid)) = who else { return act() };
    match ids::acting_with_rights(uid, gid, &act) {
        Err(e) if matches!(e.errno(), Some(libc::EPERM | libc::EINVAL)) => {
            log::warn!("A unix socket is not connected as user {uid} and group {gid}: {e}");
            act()
        }
        other => other,
    }
}

/// listen(2), as whoever did so.
pub(super) fn listen_as(member: &Member, socket: &OwnedFd, backlog: Backlog) -> Result<()> {
    acting(peer(member), || listen(socket, backlog).call("listen"))
}

/// connect(2) to a listener that has not accepted, as the owner of the socket.
pub(super) fn connect_as(member: &Member, connect: impl Fn() -> Result<()>) -> Result<()> {
    acting(member.owner.as_ref().map(|owner| (owner.uid, owner.gid)), connect)
}

/// Both ends of a pair whose first end is `member`.
pub(super) fn pair(cluster: &Cluster, member: &Member, other: Option<&Member>) -> Result<(OwnedFd, OwnedFd)> {
    let simple = |who| {
        acting(who, || {
            socketpair(AddressFamily::Unix, sock_type(member), None, SockFlag::SOCK_CLOEXEC)
                .call("socketpair")
        })
    };
    let Some(other) = other.filter(|other| member.stream() && peer(member) != peer(other)) else {
        return simple(peer(member));
    };
    // Who was accepted has the name of the listener.
    let listens = |end: &Member| {
        cluster.members.iter().any(|m| m.entry.state == LISTEN && m.entry.name == end.entry.name)
    };
    let named = |end: &Member| !end.entry.name.is_empty();
    match (named(member), named(other)) {
        (false, false) => simple(peer(member)),
        (true, false) => connection(other, member).map(|(one, two)| (two, one)),
        (true, true) if listens(member) => connection(other, member).map(|(one, two)| (two, one)),
        _ => connection(member, other),
    }
}

/// A connection as it came about, between two who are not the same user: by way of a listener, which lives only that
/// long. Its name, one that nobody else has, stays with the server's end, which had that of the true listener.
fn connection(client: &Member, server: &Member) -> Result<(OwnedFd, OwnedFd)> {
    let new = || socket(AddressFamily::Unix, sock_type(server), SockFlag::SOCK_CLOEXEC, None).call("socket");
    let listener = new()?;
    sockopt::bind(listener.as_fd(), &(libc::AF_UNIX as libc::sa_family_t).to_ne_bytes())?;
    let name: UnixAddr = getsockname(listener.as_raw_fd()).call("getsockname")?;
    acting(peer(client), || listen(&listener, Backlog::MAXCONN).call("listen"))?;
    let one = new()?;
    acting(peer(server), || nix::sys::socket::connect(one.as_raw_fd(), &name).call("connect"))?;
    let two = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC).call("accept4")?;
    Ok((one, fd::take(two)?))
}
