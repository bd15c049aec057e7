//! Datagrams are sent again by the socket that has sent them, so that their receiver can answer: one of the tree's, or,
//! where that is gone, a socket of its name for the moment. CRIU loses who it was.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, socket};

use super::{
    DGRAM,
    plan::{Cluster, Member, Role, bound, known_as},
};
use crate::{
    error::{Error, Result, SysContext},
    files::{FilesTask, sk::queue},
    sys::sockopt,
};

/// Fills the queue of `member`: as each sender, or through `helper`, which is connected to it and has no name.
pub(super) fn send(
    cluster: &Cluster,
    member: &Member,
    helper: BorrowedFd<'_>,
    cx: &mut FilesTask<'_>,
) -> Result<()> {
    // Its order is that of the queue; most have one sender, or none with a name.
    for packets in member.packets.chunk_by(|a, b| a.name == b.name) {
        let name = packets.first().and_then(|packet| packet.name.as_deref());
        let Some(name) = name.filter(|_| member.entry.r#type == DGRAM) else {
            queue::send(helper, None, packets, cx)?;
            continue;
        };
        let known = known_as(name, &member.entry);
        let found = cluster.members.iter().find(|m| m.entry.r#type == DGRAM && bound(&m.entry) == known);
        let own = found.filter(|m| matches!(m.role, Role::Single | Role::Helped));
        let sent = match own {
            Some(own) => {
                let (address, _file) = address(member, cx)?;
                queue::send(cx.at_hand(own.id)?, Some(&address), packets, cx)
            }
            None => gone(name, member, cx).and_then(|sender| {
                let (address, _file) = address(member, cx)?;
                queue::send(sender.as_fd(), Some(&address), packets, cx)
            }),
        };
        match sent {
            // Only nothing was sent when a name or an address was in the way.
            Err(e)
                if matches!(e.errno(), Some(libc::EADDRINUSE | libc::EADDRNOTAVAIL | libc::ECONNREFUSED)) =>
            {
                log::warn!("Messages of {} are sent as from nobody: {e}", name.escape_ascii());
                queue::send(helper, None, packets, cx)?;
            }
            other => other?,
        }
    }
    Ok(())
}

/// A socket for the moment with the name of one that is gone.
fn gone(name: &[u8], member: &Member, cx: &mut FilesTask<'_>) -> Result<OwnedFd> {
    if name.first() != Some(&0) {
        let e = Error::sys("bind", libc::EADDRNOTAVAIL);
        return Err(e.during("a name in the file system, whose socket is gone"));
    }
    cx.in_network(member.entry.ns_id, |_| {
        let socket =
            socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).call("socket")?;
        sockopt::bind_unix(socket.as_fd(), name)?;
        Ok(socket)
    })
}

/// Where to send to, valid as long as the file is open: through it, whatever its path leads to by now.
fn address(member: &Member, cx: &FilesTask<'_>) -> Result<(UnixAddr, Option<OwnedFd>)> {
    if let Some((0, name)) = member.entry.name.split_first() {
        return Ok((UnixAddr::new_abstract(name).call("sockaddr_un")?, None));
    }
    let file = sockopt::unix_file(cx.at_hand(member.id)?).map_err(|e| match e.errno() {
        // It has lost its name, which nobody can send to then.
        Some(libc::ENOENT | libc::EPERM) => Error::sys("ioctl(SIOCUNIXFILE)", libc::EADDRNOTAVAIL),
        _ => e,
    })?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok((UnixAddr::new(path.as_str()).call("sockaddr_un")?, Some(file)))
}
