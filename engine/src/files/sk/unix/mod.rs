//! Unix sockets: pairs, listeners, connections, datagrams; names in the file system or abstract ones.
//!
//! Who is connected with whom comes from the kernel's table of unix sockets. A socket whose peer no task of
//! the tree has is refused, unless options say that the peer stays outside: then images hold an entry for
//! the peer, marked as such, with its name.

use std::{
    collections::{HashMap, HashSet},
    os::fd::{AsFd, AsRawFd},
};

use nix::{
    fcntl::readlink,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::stat::{FileStat, fstat},
};
use rcriu_images::pb;

use super::{CLOSED, ESTABLISHED, LISTEN, is_family, opts, owner, queue::Queue};
use crate::{
    error::{Context, Error, Result, SysContext},
    files::{DrainedFd, FdProbe, FdType, FileKind, FilesOut, PlanFiles, RestoredFile, watch},
    ns::net,
    options::External,
    pstree::FileId,
    sys::{sock_diag, sockopt},
};

mod peers;
mod plan;
mod restore;
mod senders;
#[cfg(test)]
mod tests;

pub(in crate::files) use plan::UnixWorld;

/// Bits of `unix_sk_entry.uflags`: the entry stands for a socket outside of the images.
const OUTSIDE: u32 = 1;
/// It was connected with the service that dumped it.
const SERVICE: u32 = 2;
/// A plugin restores it.
const CALLBACK: u32 = 4;

const STREAM: u32 = libc::SOCK_STREAM as u32;
const DGRAM: u32 = libc::SOCK_DGRAM as u32;
const SEQPACKET: u32 = libc::SOCK_SEQPACKET as u32;

/// The kind.
#[derive(Debug)]
pub(in crate::files) struct Unix;

/// What the dump knows of all unix sockets.
#[derive(Debug, Default)]
pub(super) struct UnixOut {
    table: Option<Table>,
    /// Inodes of sockets that are in the images.
    dumped: HashSet<u32>,
    /// Sockets with a peer, which must turn up as well.
    peers: Vec<Peer>,
}

#[derive(Debug)]
struct Table {
    sockets: HashMap<u32, sock_diag::UnixSocket>,
    /// Listener that a socket waits for to be accepted.
    listeners: HashMap<u32, u32>,
}

#[derive(Debug)]
struct Peer {
    ino: u32,
    of: u32,
    place: String,
}

impl UnixOut {
    fn table(&mut self, networks: &net::Networks) -> Result<&Table> {
        if self.table.is_none() {
            let sockets = networks.listed(sock_diag::unix_sockets)?;
            let pairs = |s: &sock_diag::UnixSocket| s.waiting.iter().map(|w| (*w, s.ino)).collect::<Vec<_>>();
            let listeners = sockets.values().flat_map(pairs).collect();
            self.table = Some(Table { sockets, listeners });
        }
        self.table.as_ref().ok_or_else(|| Error::bug("no table of unix sockets"))
    }
}

impl FileKind for Unix {
    fn fd_type(&self) -> FdType {
        FdType::Unixsk
    }

    fn claims(&self, fd: &FdProbe) -> bool {
        is_family(fd, libc::AF_UNIX)
    }

    fn dump(&self, fd: &DrainedFd, id: FileId, out: &mut FilesOut<'_>) -> Result<pb::FileEntry> {
        let ino = fd.probe.stat.st_ino as u32;
        let table = out.sockets.unix.table(&out.networks)?;
        let socket = table.sockets.get(&ino).cloned().ok_or_else(|| {
            Error::unsupported("a unix socket of another network namespace cannot be dumped")
                .remedy("close it before the dump, or have a task of the tree be in that namespace")
        })?;
        if ![STREAM, DGRAM, SEQPACKET].contains(&socket.kind) {
            return Err(Error::unsupported(format!(
                "a unix socket of type {} cannot be dumped",
                socket.kind
            ))
            .remedy("close it before the dump"));
        }
        let (state, peer) = connection(&socket, table)?;
        // The table is of one alone as a rule.
        let ns_id = match out.networks.is_several() {
            true => out.network_of(fd.file.as_fd())?,
            false => out.networks.first(),
        };
        let mut entry = pb::UnixSkEntry {
            id: id.0,
            ino,
            r#type: socket.kind,
            state,
            flags: fd.probe.info.flags,
            uflags: 0,
            ns_id,
            backlog: socket.sent,
            peer,
            fown: fd.fown,
            opts: opts::dump(fd.file.as_fd(), libc::AF_UNIX)?,
            name: socket.name.clone(),
            shutdown: (socket.shutdown != 0).then_some(i32::from(socket.shutdown)),
            ..Default::default()
        };
        if let Some(kind) = fd.probe.socket {
            let option = out.sockets.fresh.entry(None).or_default().differing(fd.file.as_fd(), kind, false);
            let (owner, peer) = (owner::dump(&fd.probe.stat, out), peers::dump(fd.file.as_fd(), out)?);
            if !option.is_empty() || owner.is_some() || peer.is_some() {
                out.more(pb::RcriuFileEntry { id: id.0, option, owner, peer, ..Default::default() })?;
            }
        }
        if socket.name.first().is_some_and(|first| *first != 0) {
            dump_name(fd, &mut entry, out)?;
        }
        if peer != 0 {
            out.sockets.unix.peers.push(Peer { ino: peer, of: ino, place: fd.probe.place() });
        }
        // A stream that is not connected has no queue to look into.
        if (state == ESTABLISHED || socket.kind == DGRAM) && readable(fd)? {
            out.sockets.waiting.push(Queue {
                id,
                file: fd.file.try_clone().call("dup")?,
                kind: socket.kind,
                ended: socket.shutdown & 1 != 0,
                place: fd.probe.place(),
            });
        }
        out.sockets.unix.dumped.insert(ino);
        Ok(pb::FileEntry {
            r#type: FdType::Unixsk as i32,
            id: id.0,
            usk: Some(entry.into()),
            ..Default::default()
        })
    }

    /// Its place in the image depends on who else has it.
    fn is_late(&self) -> bool {
        true
    }

    fn collect(&self, entry: &pb::FileEntry, plan: &mut PlanFiles<'_>) -> Result<Box<dyn RestoredFile>> {
        let id = FileId(entry.id);
        Ok(Box::new(plan.unix()?.member(id)?))
    }
}

/// State and peer as images have them: a socket that waits to be accepted has the listener for a peer.
fn connection(socket: &sock_diag::UnixSocket, table: &Table) -> Result<(u32, u32)> {
    match socket.state {
        LISTEN if socket.waiting.contains(&0) => {
            return Err(Error::unsupported("a connection that was closed already waits to be accepted")
                .remedy("let the task accept it before the dump"));
        }
        LISTEN | CLOSED | ESTABLISHED => {}
        state => return Err(Error::unsupported(format!("a unix socket in state {state} cannot be dumped"))),
    }
    if socket.peer != 0 {
        let Some(peer) = table.sockets.get(&socket.peer) else {
            return Err(Error::unsupported(format!(
                "its peer, unix socket {}, cannot be found",
                socket.peer
            ))
            .remedy("dump when both ends are in network namespaces that tasks of the tree are in"));
        };
        if peer.peer != socket.ino && peer.name.is_empty() {
            return Err(Error::unsupported(format!(
                "its peer, unix socket {}, has no name to connect to and is connected elsewhere",
                socket.peer
            ))
            .remedy("close the socket before the dump"));
        }
        return Ok((socket.state, socket.peer));
    }
    if socket.state != ESTABLISHED || socket.kind == DGRAM {
        return Ok((socket.state, 0));
    }
    match table.listeners.get(&socket.ino) {
        Some(_) if socket.sent != 0 => {
            Err(Error::unsupported("data was sent on a connection that waits to be accepted")
                .remedy("let the other side accept it before the dump"))
        }
        Some(listener) => Ok((ESTABLISHED, *listener)),
        None if socket.shutdown == 3 => Ok((ESTABLISHED, 0)),
        None => Err(Error::unsupported("a connection whose other end cannot be found")
            .remedy("close the socket before the dump")),
    }
}

/// What belongs to a name in the file system: the folder it is relative to, rights, whether it is there still.
fn dump_name(fd: &DrainedFd, entry: &mut pb::UnixSkEntry, out: &FilesOut<'_>) -> Result<()> {
    let perms = |stat: &FileStat| pb::FilePermsEntry {
        mode: stat.st_mode,
        uid: out.users.user(stat.st_uid),
        gid: out.users.group(stat.st_gid),
    };
    let file = match sockopt::unix_file(fd.file.as_fd()) {
        Err(e) if e.errno() == Some(libc::EPERM) => {
            let stat = by_name(entry, out).map_err(|why| e.remedy(why))?;
            entry.file_perms = Some(perms(&stat));
            return Ok(());
        }
        other => other?,
    };
    let mount = watch::mount_of(&file)?;
    entry.mnt_id = out.own_number(mount);
    let stat = fstat(&file).call("fstat")?;
    let link = readlink(format!("/proc/self/fd/{}", file.as_raw_fd()).as_str()).call("readlink")?;
    let mut path = std::os::unix::ffi::OsStringExt::into_vec(link);
    if let Some(plain) = path.strip_suffix(b" (deleted)")
        && out.roots.of_mount(mount).lstat(&path).map_or(true, |found| found.st_ino != stat.st_ino)
    {
        entry.deleted = Some(true);
        path = plain.to_vec();
    }
    entry.file_perms = Some(perms(&stat));
    let name = entry.name.split(|c| *c == 0).next().unwrap_or_default();
    let shown = || path.escape_ascii().to_string();
    if name.starts_with(b"/") {
        return Ok(());
    }
    let plain = name.strip_prefix(b"./").unwrap_or(name);
    let folder = path.strip_suffix(plain).and_then(|folder| folder.strip_suffix(b"/"));
    let folder = folder.ok_or_else(|| {
        Error::unsupported(format!("the socket bound as {} was moved to {}", name.escape_ascii(), shown()))
            .remedy("move it back, or bind it by its full path")
    })?;
    let folder = if folder.is_empty() { b"/" } else { folder };
    entry.name_dir = Some(folder.to_vec());
    Ok(())
}

/// The file of a socket where the kernel tells it to nobody without CAP_NET_ADMIN.
///
/// # Errors
/// What to do where the name does not lead to a socket.
fn by_name(entry: &pb::UnixSkEntry, out: &FilesOut<'_>) -> std::result::Result<FileStat, &'static str> {
    let name = entry.name.split(|c| *c == 0).next().unwrap_or_default();
    if !name.starts_with(b"/") {
        return Err("dump with CAP_NET_ADMIN, or bind the socket by its full path");
    }
    let found =
        out.roots.main().lstat(name).ok().filter(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFSOCK);
    found.ok_or("dump with CAP_NET_ADMIN: the name of the socket leads to it no more")
}

/// Whether anything can be read, if only the end.
fn readable(fd: &DrainedFd) -> Result<bool> {
    let mut wait = [PollFd::new(fd.file.as_fd(), PollFlags::POLLIN)];
    Ok(poll(&mut wait, PollTimeout::ZERO).call("poll")? > 0)
}

/// Peers that are no sockets of the tree: refused, or written as what stays outside.
pub(super) fn dump_outside(out: &mut FilesOut<'_>) -> Result<()> {
    let mut written = HashSet::new();
    for peer in std::mem::take(&mut out.sockets.unix.peers) {
        if out.sockets.unix.dumped.contains(&peer.ino) {
            continue;
        }
        let socket =
            out.sockets.unix.table(&out.networks)?.sockets.get(&peer.ino).cloned().unwrap_or_default();
        may_be_outside(&peer, &socket, out).during(|| peer.place.clone())?;
        if !written.insert(peer.ino) {
            continue;
        }
        let id = out.fresh_id()?;
        let entry = pb::UnixSkEntry {
            id: id.0,
            ino: peer.ino,
            r#type: DGRAM,
            state: LISTEN,
            uflags: OUTSIDE,
            name: socket.name,
            ..Default::default()
        };
        out.write(pb::FileEntry {
            r#type: FdType::Unixsk as i32,
            id: id.0,
            usk: Some(entry.into()),
            ..Default::default()
        })?;
    }
    Ok(())
}

fn may_be_outside(peer: &Peer, socket: &sock_diag::UnixSocket, out: &FilesOut<'_>) -> Result<()> {
    let common = &out.opts.common;
    if common.external.iter().any(|e| matches!(e, External::Unix { inode } if *inode == peer.of)) {
        return Ok(());
    }
    let legacy = &common.ext_unix_sk;
    if legacy.inodes.contains(&peer.of) {
        return Ok(());
    }
    let name = match socket.name.split_first() {
        None => "without a name".to_owned(),
        Some((0, name)) => format!("@{}", name.escape_ascii()),
        Some(_) => socket.name.split(|c| *c == 0).next().unwrap_or_default().escape_ascii().to_string(),
    };
    let what = format!(
        "unix socket {} is connected with socket {} ({name}), which no task of the tree has",
        peer.of, peer.ino
    );
    if socket.kind != DGRAM || socket.name.is_empty() {
        return Err(Error::unsupported(what).remedy(format!(
            "dump its peer too, or give --external unix[{}] here and --inherit-fd fd[N]:socket:[{}] to restore",
            peer.of, peer.of
        )));
    }
    if legacy.enabled {
        return Ok(());
    }
    Err(Error::unsupported(what).remedy("dump its peer too, or give --ext-unix-sk"))
}
