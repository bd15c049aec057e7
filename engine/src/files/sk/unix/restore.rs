//! Unix sockets come back, a cluster at a time.

use std::{
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    os::unix::ffi::OsStrExt,
    path::Path,
    sync::Arc,
};

use nix::{
    fcntl::{AtFlags, OFlag, open},
    sys::{
        socket::{AddressFamily, Backlog, SockFlag, SockType, socket},
        stat::{FchmodatFlags, Mode, SFlag, fchmodat, lstat, mkdirat},
    },
    unistd::{Gid, Uid, chdir, fchdir, fchownat, unlink},
};
use rcriu_images::pb;

use super::{
    DGRAM, ESTABLISHED, LISTEN, SEQPACKET, peers,
    plan::{Cluster, Member, Role},
    senders,
};
use crate::{
    error::{Context, Error, Result, SysContext},
    files::{
        FdType, FilesTask, GroupKey, Needs, Preflight, RestoredFile, Roots, pipe,
        sk::{
            SocketKind,
            kept::{self, When},
            opts, owner, queue, shut, socket_name,
        },
    },
    sys::sockopt,
};

/// One open unix socket.
#[derive(Debug)]
pub(super) struct UnixFile {
    pub(super) cluster: Arc<Cluster>,
    pub(super) at: usize,
}

impl UnixFile {
    fn member(&self) -> &Member {
        &self.cluster.members[self.at]
    }
}

impl RestoredFile for UnixFile {
    fn name(&self) -> String {
        socket_name(self.member().entry.ino)
    }

    fn needs(&self) -> Needs {
        if self.member().role == Role::Outside {
            return Needs::default();
        }
        let number = self.cluster.members.first().map_or(0, |m| m.id.0.into());
        let last = self.cluster.last() == Some(self.at);
        Needs {
            group: Some(GroupKey { kind: FdType::Unixsk, number }),
            at_hand: if last { self.cluster.at_hand.clone() } else { Vec::new() },
            ..Needs::default()
        }
    }

    fn preflight(&self, cx: &Preflight<'_>) -> Result<()> {
        let member = self.member();
        let Some(peer) = member.peer.map(|at| &self.cluster.members[at]) else { return Ok(()) };
        if peer.role != Role::Outside || member.role == Role::Given {
            return Ok(());
        }
        if member.stream() || peer.entry.name.is_empty() {
            let ino = member.entry.ino;
            return Err(Error::host(format!("its peer, socket {}, stayed outside", peer.entry.ino))
                .remedy(format!("give --inherit-fd fd[N]:socket:[{ino}]")));
        }
        if !cx.opts.common.ext_unix_sk.enabled {
            return Err(Error::host(format!("its peer, socket {}, stayed outside", peer.entry.ino))
                .remedy("give --ext-unix-sk to connect to the socket of that name"));
        }
        Ok(())
    }

    fn fown(&self) -> Option<&pb::FownEntry> {
        Some(&self.member().entry.fown)
    }

    fn spare(&self) -> usize {
        // The cluster waits in the zone until each member's turn; helpers wait until the end.
        1 + usize::from(self.member().role == Role::Helped)
    }

    fn open(&self, cx: &mut FilesTask<'_>) -> Result<OwnedFd> {
        if cx.group.is_empty() {
            make(&self.cluster, cx)?;
        }
        cx.group
            .get_mut(self.at)
            .and_then(Option::take)
            .ok_or_else(|| Error::bug("a unix socket was not made with its cluster"))
    }

    fn finish(&self, _fd: BorrowedFd<'_>, cx: &mut FilesTask<'_>) -> Result<()> {
        if self.cluster.last() == Some(self.at) { complete(&self.cluster, cx) } else { Ok(()) }
    }
}

pub(super) fn sock_type(member: &Member) -> SockType {
    match member.entry.r#type {
        DGRAM => SockType::Datagram,
        SEQPACKET => SockType::SeqPacket,
        _ => SockType::Stream,
    }
}

/// Adds which socket of a cluster it was.
fn of(member: &Member) -> impl FnOnce() -> String + '_ {
    move || socket_name(member.entry.ino)
}

/// Makes all sockets of a cluster, with their names, up to what needs queues filled.
fn make(cluster: &Cluster, cx: &mut FilesTask<'_>) -> Result<()> {
    let members = &cluster.members;
    let mut made: Vec<Option<OwnedFd>> = members.iter().map(|_| None).collect();
    for (at, member) in members.iter().enumerate() {
        if made[at].is_some() {
            continue;
        }
        let network = member.entry.ns_id;
        let pair = |cx: &mut FilesTask<'_>, other: Option<&Member>| {
            cx.in_network(network, |_| peers::pair(cluster, member, other))
        };
        match member.role {
            Role::Outside => {}
            Role::Given => {
                let given = cx.inherited(|| socket_name(member.entry.ino))?;
                let given = given.ok_or_else(|| Error::bug("an inherited socket is gone"))?;
                made[at] = Some(cx.keep(given)?);
            }
            Role::Pair(other) => {
                let (one, two) = pair(cx, Some(&members[other]))?;
                made[at] = Some(cx.keep(one)?);
                // The other end may come from outside; then this one has lost its peer.
                if members[other].role == Role::Pair(at) {
                    made[other] = Some(cx.keep(two)?);
                }
            }
            Role::Helped => {
                let (one, helper) = pair(cx, None)?;
                if !member.stream() {
                    // As long as it has a peer, others cannot connect to it.
                    sockopt::disconnect(one.as_fd())?;
                }
                made[at] = Some(cx.keep(one)?);
                let helper = cx.keep(helper)?;
                cx.stash.insert(member.id, helper);
            }
            Role::Single => {
                let one = cx.in_network(network, |_| {
                    socket(AddressFamily::Unix, sock_type(member), SockFlag::SOCK_CLOEXEC, None)
                        .call("socket")
                })?;
                made[at] = Some(cx.keep(one)?);
            }
        }
    }
    for (member, socket) in members.iter().zip(&made) {
        if let (Some(socket), true) = (socket, member.role != Role::Given) {
            owner::restore(socket.as_fd(), &socket_name(member.entry.ino), member.owner.as_ref())?;
        }
    }
    // Lost names first: what they stood aside for is bound, or moved back, afterwards.
    for lost in [true, false] {
        for (member, socket) in members.iter().zip(&made) {
            if let (Some(socket), true) = (socket, member.binds() && member.lost() == lost) {
                member.root(cx.roots()).within(|| bind(member, socket.as_fd())).during(of(member))?;
            }
        }
    }
    for (member, socket) in members.iter().zip(&made) {
        if let (Some(socket), Role::Single, LISTEN) = (socket, member.role, member.entry.state) {
            let backlog = i32::try_from(member.entry.backlog).unwrap_or(i32::MAX);
            let backlog = Backlog::new(backlog).unwrap_or(Backlog::MAXCONN);
            peers::listen_as(member, socket, backlog).during(of(member))?;
        }
    }
    for (member, socket) in members.iter().zip(&made) {
        if let (Some(socket), Some(peer), Role::Single, ESTABLISHED) =
            (socket, member.peer, member.role, member.entry.state)
            && member.stream()
        {
            let listener = made[peer].as_ref().map(AsFd::as_fd);
            peers::connect_as(member, || connect(socket.as_fd(), &members[peer], listener, cx.roots()))
                .during(of(member))?;
        }
    }
    cx.group = made;
    Ok(())
}

/// Fills queues and does everything that could be in the way of that.
fn complete(cluster: &Cluster, cx: &mut FilesTask<'_>) -> Result<()> {
    let members = &cluster.members;
    for member in members {
        match member.role {
            Role::Pair(other) if members[other].role != Role::Given => {
                let from = cx.at_hand(members[other].id)?;
                queue::send(from, None, &member.packets, cx).during(of(member))?;
            }
            Role::Helped => {
                let helper = cx.stash.remove(&member.id);
                let helper = helper.ok_or_else(|| Error::bug("a socket's helper is gone"))?;
                senders::send(cluster, member, helper.as_fd(), cx).during(of(member))?;
            }
            _ if member.packets.is_empty() || member.role == Role::Outside => {}
            _ => {
                return Err(Error::unsupported("what it had received cannot be sent again")
                    .remedy("both ends must come from the images")
                    .during(of(member)()));
            }
        }
    }
    connect_datagrams(cluster, cx)?;
    for member in members.iter().filter(|m| !matches!(m.role, Role::Outside | Role::Given)) {
        let socket = cx.at_hand(member.id)?;
        let finish = || {
            shut(socket, member.entry.shutdown)?;
            opts::restore(socket, &member.entry.opts)?;
            let kind = member.entry.r#type.cast_signed();
            let sort = SocketKind { family: libc::AF_UNIX, kind, protocol: 0 };
            for when in [When::New, When::Last] {
                kept::restore((socket, &socket_name(member.entry.ino)), sort, &member.option, when);
            }
            let flags = member.entry.flags.cast_signed();
            pipe::set_flags(&socket.try_clone_to_owned().call("dup")?, flags)
        };
        finish().during(of(member))?;
    }
    Ok(())
}

/// Connects datagram sockets with their peers. A socket that has a peer takes messages from that one only,
/// and lets nobody else connect: so whoever connects to a socket does so before that socket itself connects.
fn connect_datagrams(cluster: &Cluster, cx: &FilesTask<'_>) -> Result<()> {
    let members = &cluster.members;
    let connects =
        |m: &Member| !m.stream() && m.peer.is_some() && matches!(m.role, Role::Single | Role::Helped);
    // Each of two that are connected with each other takes the other one.
    let waits = |at: usize, peer: usize| peer != at && members[peer].peer != Some(at);
    let mut awaited = vec![0usize; members.len()];
    for (at, member) in members.iter().enumerate() {
        if let (true, Some(peer)) = (connects(member), member.peer)
            && waits(at, peer)
        {
            awaited[peer] += 1;
        }
    }
    let mut ready: Vec<usize> =
        (0..members.len()).filter(|&at| connects(&members[at]) && awaited[at] == 0).collect();
    while let Some(at) = ready.pop() {
        let member = &members[at];
        let Some(peer) = member.peer else { continue };
        let other = &members[peer];
        let there = if other.role == Role::Outside { None } else { Some(cx.at_hand(other.id)?) };
        connect(cx.at_hand(member.id)?, other, there, cx.roots()).during(of(member))?;
        if waits(at, peer) {
            awaited[peer] -= 1;
            if awaited[peer] == 0 && connects(other) {
                ready.push(peer);
            }
        }
    }
    match (0..members.len()).find(|&at| connects(&members[at]) && awaited[at] > 0) {
        Some(at) => {
            Err(Error::image("datagram sockets are connected in a circle").during(of(&members[at])()))
        }
        None => Ok(()),
    }
}

/// Connects `socket` with `peer`: through its open file if it has one and is bound to a file, so that it does
/// not matter what the path leads to by now, and else by name.
fn connect(
    socket: BorrowedFd<'_>,
    peer: &Member,
    there: Option<BorrowedFd<'_>>,
    roots: &Roots,
) -> Result<()> {
    let name = || peer.entry.name.escape_ascii().to_string();
    match (there, peer.path()) {
        (Some(there), Some(_)) => match sockopt::unix_file(there) {
            // Asking takes CAP_NET_ADMIN; who restores without has just bound it.
            Err(e) if e.errno() == Some(libc::EPERM) => connect(socket, peer, None, roots),
            file => {
                let file = file?;
                let path = format!("/proc/self/fd/{}\0", file.as_raw_fd());
                sockopt::connect_unix(socket, path.as_bytes()).during(name)
            }
        },
        (None, Some(_)) => {
            let by_name = || sockopt::connect_unix(socket, &peer.entry.name);
            peer.root(roots).within(|| in_folder(peer, by_name)).during(name)
        }
        (_, None) => sockopt::connect_unix(socket, &peer.entry.name).during(name),
    }
}

/// Runs `f` in the folder that the socket's name is relative to.
fn in_folder<T>(member: &Member, f: impl FnOnce() -> Result<T>) -> Result<T> {
    let Some(folder) = &member.entry.name_dir else { return f() };
    let here = open(".", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty());
    let here = here.call("open(.)")?;
    chdir(folder.as_slice()).call("chdir").during(|| folder.escape_ascii().to_string())?;
    let result = f();
    fchdir(&here).call("fchdir")?;
    result
}

/// Binds a socket to its name.
fn bind(member: &Member, socket: BorrowedFd<'_>) -> Result<()> {
    let Some(path) = member.path() else {
        return sockopt::bind_unix(socket, &member.entry.name).during(|| {
            format!("abstract name @{}", member.entry.name.get(1..).unwrap_or(&[]).escape_ascii())
        });
    };
    in_folder(member, || {
        if member.lost() {
            return bind_lost(member, socket, path);
        }
        match sockopt::bind_unix(socket, &member.entry.name) {
            // The name that the original left behind.
            Err(e) if e.errno() == Some(libc::EADDRINUSE) => {
                let found = lstat(path).call("lstat")?;
                if found.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFSOCK.bits() {
                    return Err(
                        Error::host("something other than a socket is there now").remedy("move it away")
                    );
                }
                unlink(path).call("unlink")?;
                sockopt::bind_unix(socket, &member.entry.name)?;
            }
            other => other?,
        }
        set_rights(member, path)
    })
    .during(|| path.escape_ascii().to_string())
}

fn set_rights(member: &Member, path: &[u8]) -> Result<()> {
    let Some(perms) = &member.entry.file_perms else { return Ok(()) };
    let here = nix::fcntl::AT_FDCWD;
    let (uid, gid) = (Uid::from_raw(perms.uid), Gid::from_raw(perms.gid));
    fchownat(here, path, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW).call("fchownat")?;
    let mode = Mode::from_bits_truncate(perms.mode);
    fchmodat(here, path, mode, FchmodatFlags::FollowSymlink).call("fchmodat")
}

/// Binds to a path that is not there any more: made for the moment, with its folders, and whatever has taken
/// its place meanwhile moved aside.
fn bind_lost(member: &Member, socket: BorrowedFd<'_>, path: &[u8]) -> Result<()> {
    let whole = Path::new(std::ffi::OsStr::from_bytes(path));
    let mut folders = Vec::new();
    for folder in whole.ancestors().skip(1).filter(|f| !f.as_os_str().is_empty()) {
        match lstat(folder) {
            Ok(_) => break,
            Err(nix::errno::Errno::ENOENT) => folders.push(folder),
            Err(e) => return Err(Error::sys("lstat", e as i32).during(folder.display().to_string())),
        }
    }
    for folder in folders.iter().rev() {
        let made = mkdirat(nix::fcntl::AT_FDCWD, *folder, Mode::from_bits_truncate(0o755));
        made.call("mkdir").during(|| folder.display().to_string())?;
    }
    let aside = [path, b".rcriu-aside"].concat();
    let aside = Path::new(std::ffi::OsStr::from_bytes(&aside));
    let moved = match std::fs::rename(whole, aside) {
        Ok(()) => true,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => false,
        Err(e) => return Err(Error::io("rename", &e)),
    };
    let bound = sockopt::bind_unix(socket, &member.entry.name).and_then(|()| {
        let rights = set_rights(member, path);
        unlink(path).call("unlink")?;
        rights
    });
    if moved {
        std::fs::rename(aside, whole).call("rename")?;
    }
    for folder in &folders {
        std::fs::remove_dir(folder).call("rmdir").during(|| folder.display().to_string())?;
    }
    bound
}
