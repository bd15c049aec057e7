//! Sockets: what all families share, and a file or folder for each family.
//!
//! What a socket is comes from the socket itself (options), what it is tied to from the kernel's tables of the
//! network namespaces of the tree, asked for once.

use std::{
    cmp::Reverse,
    collections::HashMap,
    os::fd::{AsFd, BorrowedFd},
};

use nix::sys::statfs::FsType;
use rcriu_images::ImageDir;

use super::{FdProbe, FilesOut};
use crate::{
    error::{Context, Result},
    netlock::{Locks, Whole},
    options::DumpOptions,
    pstree::{FileId, RealPid},
    sys::{
        sock_diag,
        sockopt::{self, general},
    },
};

mod credentials;
mod inet;
mod joined;
mod kept;
mod netlink;
mod opts;
mod owner;
mod packet;
mod queue;
mod tcp;
mod unix;

pub(super) use inet::Inet;
pub(super) use netlink::Netlink;
pub(super) use packet::Packet;
pub use tcp::Connections;
pub use tcp::Revived;
pub(super) use unix::{Unix, UnixWorld};

/// File system of sockets (`linux/magic.h`).
const SOCKFS_MAGIC: FsType = FsType(0x534f_434b);

/// `TCP_*` states, which other families use as well.
const ESTABLISHED: u32 = 1;
const CLOSED: u32 = 7;
const LISTEN: u32 = 10;

/// What a socket says of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SocketKind {
    /// `AF_*`.
    pub family: i32,
    /// `SOCK_*`.
    pub kind: i32,
    /// `IPPROTO_*`, `NETLINK_*`.
    pub protocol: i32,
}

impl SocketKind {
    /// Of an open file on the file system `fs`; `None` if that is not a socket.
    pub(super) fn of(file: BorrowedFd<'_>, fs: FsType) -> Result<Option<Self>> {
        if fs != SOCKFS_MAGIC {
            return Ok(None);
        }
        Ok(Some(SocketKind {
            family: sockopt::int(file, general(libc::SO_DOMAIN, "SO_DOMAIN"))?,
            kind: sockopt::int(file, general(libc::SO_TYPE, "SO_TYPE"))?,
            protocol: sockopt::int(file, general(libc::SO_PROTOCOL, "SO_PROTOCOL"))?,
        }))
    }
}

/// Whether `fd` is a socket of `family`.
fn is_family(fd: &FdProbe, family: i32) -> bool {
    fd.socket.is_some_and(|socket| socket.family == family)
}

/// The dump's side of sockets.
#[derive(Debug)]
pub(super) struct SocketsOut {
    queues: queue::QueuesOut,
    waiting: Vec<queue::Queue>,
    unix: unix::UnixOut,
    inet: inet::InetOut,
    /// By the numbers of their network namespaces, as the groups.
    fresh: HashMap<Option<u32>, kept::Fresh>,
    groups: HashMap<Option<u32>, joined::Groups>,
    /// The lowest pid among the tasks that have the socket.
    lowest: HashMap<FileId, RealPid>,
    tcp: tcp::Waiting,
    connections: Connections,
    netlink: Option<HashMap<u32, sock_diag::NetlinkSocket>>,
    packet: Option<HashMap<u32, sock_diag::PacketSocket>>,
    /// Numbers of packet sockets, by inode.
    packet_ids: HashMap<u64, FileId>,
}

impl SocketsOut {
    pub(super) fn new(images: &ImageDir, opts: &DumpOptions, lock: Option<Locks>) -> Self {
        SocketsOut {
            queues: queue::QueuesOut::new(images),
            waiting: Vec::new(),
            unix: unix::UnixOut::default(),
            inet: inet::InetOut::default(),
            fresh: HashMap::new(),
            groups: HashMap::new(),
            lowest: HashMap::new(),
            tcp: tcp::Waiting::default(),
            connections: Connections::new(opts.network_lock, lock),
            netlink: None,
            packet: None,
            packet_ids: HashMap::new(),
        }
    }

    /// The lock of network namespace `id` of the tree's own.
    pub(super) fn lock(&self, id: u32) -> Option<&Whole> {
        self.connections.whole(id)
    }

    /// The packet socket with this inode, if a task had it open so far.
    pub(in crate::files) fn packet(&self, ino: u64) -> Option<FileId> {
        self.packet_ids.get(&ino).copied()
    }

    /// Takes note of a task that has the socket.
    pub(super) fn met(&mut self, id: FileId, task: RealPid) {
        let lowest = self.lowest.entry(id).or_insert(task);
        *lowest = task.min(*lowest);
    }

    /// Where files.img has a socket that waits for all others, as a key to sort by. CRIU has the last of two
    /// connected ones make both, which it can do only in the task that has the lowest pid.
    pub(super) fn place(&self, id: FileId) -> Reverse<Option<RealPid>> {
        Reverse(self.lowest.get(&id).copied())
    }

    /// Completes the image; connections remain to be let go.
    pub(super) fn finish(self) -> Result<Connections> {
        self.queues.finish()?;
        Ok(self.connections)
    }
}

/// What can only be dumped once every descriptor was met: queues, whose files may be new ones, and peers
/// that turn out to be nobody's.
pub(super) fn dump_rest(out: &mut FilesOut<'_>) -> Result<()> {
    while let Some(queue) = out.sockets.waiting.pop() {
        queue::dump(&queue, out).during(|| queue.place.clone())?;
    }
    // Needs: nothing turns up any more.
    tcp::dump_all(out)?;
    unix::dump_outside(out)
}

/// How messages call a socket: `socket:[4711]`, which is what /proc and --inherit-fd call it.
fn socket_name(ino: u32) -> String {
    format!("socket:[{ino}]")
}

/// shutdown(2) as images have it: 1 for reading, 2 for writing, 3 for both.
fn shut(fd: impl AsFd, how: Option<i32>) -> Result<()> {
    use nix::sys::socket::{Shutdown, shutdown};
    let how = match how {
        Some(1) => Shutdown::Read,
        Some(2) => Shutdown::Write,
        Some(3) => Shutdown::Both,
        _ => return Ok(()),
    };
    crate::error::SysContext::call(shutdown(std::os::fd::AsRawFd::as_raw_fd(&fd.as_fd()), how), "shutdown")
}
