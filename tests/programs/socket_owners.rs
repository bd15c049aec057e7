//! Sockets of several users: whose they are, and whom the kernel has noted as the peer (SO_PEERCRED), in pairs,
//! connections, and connections that nobody has accepted yet.
//!
//! # Safety
//! A descriptor that accept(2) has just given belongs to nobody else.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, UnixAddr, UnixCredentials, accept, bind, connect,
    getsockname, getsockopt, listen, setsockopt, socket, socketpair, sockopt,
};
use nix::sys::stat::fstat;
use nix::unistd::{Gid, Uid, getegid, geteuid, setegid, seteuid};

use crate::kit::{Check, rest, same};

type Who = (u32, u32);

/// Does `act` as another user, which only root can.
fn acting<T>(who: Who, act: impl FnOnce() -> Result<T>) -> Result<T> {
    let own = (geteuid(), getegid());
    if !own.0.is_root() {
        return act();
    }
    setegid(Gid::from_raw(who.1)).context("setegid")?;
    seteuid(Uid::from_raw(who.0)).context("seteuid")?;
    let done = act();
    seteuid(own.0).context("seteuid")?;
    setegid(own.1).context("setegid")?;
    done
}

fn new(family: AddressFamily, kind: SockType) -> Result<OwnedFd> {
    socket(family, kind, SockFlag::SOCK_CLOEXEC, None).context("socket")
}

fn owner(file: &OwnedFd) -> Result<Who> {
    let stat = fstat(file.as_fd()).context("fstat")?;
    Ok((stat.st_uid, stat.st_gid))
}

fn peer(socket: &OwnedFd) -> Result<Who> {
    let found: UnixCredentials = getsockopt(socket, sockopt::PeerCredentials).context("SO_PEERCRED")?;
    Ok((found.uid(), found.gid()))
}

/// A datagram socket of the loopback device that shares its port with others of its user.
fn shared(port: u16) -> Result<OwnedFd> {
    let socket = new(AddressFamily::Inet, SockType::Datagram)?;
    setsockopt(&socket, sockopt::ReusePort, &true).context("SO_REUSEPORT")?;
    bind(socket.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, port)).context("bind")?;
    Ok(socket)
}

fn accepted(listener: &OwnedFd) -> Result<OwnedFd> {
    let number = accept(listener.as_raw_fd()).context("accept")?;
    // SAFETY: a new descriptor, which nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

pub fn run(_: &[String]) -> Check {
    let own = (geteuid().as_raw(), getegid().as_raw());
    let who = |uid, gid| if own.0 == 0 { (uid, gid) } else { own };
    let (server, client, late, other) = (who(1, 2), who(3, 4), who(2, 1), who(4, 3));
    let unix = |kind| new(AddressFamily::Unix, kind);
    let mut sets = Vec::new();
    for kind in [SockType::Stream, SockType::SeqPacket] {
        let name = UnixAddr::new_abstract(format!("owners-{}-{kind:?}", std::process::id()).as_bytes())?;
        let listener = acting(server, || {
            let listener = unix(kind)?;
            bind(listener.as_raw_fd(), &name).context("bind")?;
            listen(&listener, Backlog::new(8)?).context("listen")?;
            Ok(listener)
        })?;
        let connected = |who| {
            acting(who, || {
                let socket = unix(kind)?;
                connect(socket.as_raw_fd(), &name).context("connect").map(|()| socket)
            })
        };
        let one = connected(client)?;
        let two = acting(server, || accepted(&listener))?;
        let waiting = connected(late)?;
        let pair = acting(other, || {
            socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).context("socketpair")
        })?;
        sets.push((listener, one, two, waiting, pair));
    }
    let udp = acting(client, || shared(0))?;
    let port = getsockname::<SockaddrIn>(udp.as_raw_fd()).context("getsockname")?.port();
    let netlink = acting(client, || new(AddressFamily::Netlink, SockType::Raw))?;
    rest()?;
    for (listener, one, two, waiting, pair) in &sets {
        same("owner of the listener", owner(listener)?, server)?;
        same("owner of the client", owner(one)?, client)?;
        same("owner of the server's end", owner(two)?, server)?;
        same("who listens", peer(listener)?, server)?;
        same("peer of the client", peer(one)?, server)?;
        same("peer of the server's end", peer(two)?, client)?;
        same("owners of a pair", [owner(&pair.0)?, owner(&pair.1)?], [other; 2])?;
        same("peers of a pair", [peer(&pair.0)?, peer(&pair.1)?], [other; 2])?;
        same("owner of who waits", owner(waiting)?, late)?;
        same("peer of who waits", peer(waiting)?, server)?;
        same("peer of who is accepted late", peer(&accepted(listener)?)?, late)?;
    }
    same("owner of the datagram socket", owner(&udp)?, client)?;
    same("owner of the netlink socket", owner(&netlink)?, client)?;
    acting(client, || shared(port)).context("another socket of the same user beside it")?;
    if own.0 == 0 {
        same("sockets of others beside it", acting(other, || shared(port)).is_err(), true)?;
    }
    Ok(())
}
