//! Reading connections, and what becomes of them when the dump ends.

use std::{
    collections::HashMap,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, recv},
};
use rcriu_images::{ImageDir, ImageKind, pb};

use super::{
    CLOSED, INFO, OPT_TIMESTAMPS, OPT_WSCALE, is_known,
    repair::{self, Queue, Repair},
    sends_end,
};
use crate::{
    error::{Context, Error, Result, SysContext},
    files::{FilesOut, sk::queue},
    interrupt,
    netlock::{Connection, Lasting, Lock, Locks, Method, Whole},
    options::NetworkLock,
    pstree::FileId,
    sys::sockopt::{self, Opt, Queued, general},
};

const PEEK_OFF: Opt = general(libc::SO_PEEK_OFF, "SO_PEEK_OFF");
const ULP: Opt = Opt { level: libc::SOL_TCP, number: libc::TCP_ULP, name: "TCP_ULP" };

/// A connection whose packets are still to be locked out.
#[derive(Debug)]
pub(in crate::files::sk) struct Met {
    pub(in crate::files::sk) id: FileId,
    /// Inode, the number of its image.
    pub(in crate::files::sk) ino: u32,
    pub(in crate::files::sk) socket: OwnedFd,
    pub(in crate::files::sk) ends: Connection,
    pub(in crate::files::sk) reuseaddr: bool,
    /// Whose it is, for messages.
    pub(in crate::files::sk) place: String,
}

/// What an entry of files.img needs from the image of the connection.
#[derive(Clone, Copy, Debug)]
pub(in crate::files::sk) struct Known {
    pub(in crate::files::sk) state: u32,
    pub(in crate::files::sk) backlog: u32,
    /// 1 for reading, 2 for writing, 3 for both.
    pub(in crate::files::sk) shutdown: u8,
}

/// The dump's side of connections.
#[derive(Debug, Default)]
pub(in crate::files::sk) struct Waiting {
    pub(in crate::files::sk) met: Vec<Met>,
    pub(in crate::files::sk) known: HashMap<FileId, Known>,
}

/// Dumps all connections that were met.
///
/// Preconditions: all tasks are frozen, all descriptors were met.
pub(in crate::files::sk) fn dump_all(out: &mut FilesOut<'_>) -> Result<()> {
    let met = std::mem::take(&mut out.sockets.tcp.met);
    out.sockets.connections.lock(met.iter().map(|met| met.ends).collect())?;
    for met in met {
        interrupt::check()?;
        let known = dump(&met, out.images).during(|| met.place.clone())?;
        out.sockets.tcp.known.insert(met.id, known);
        out.sockets.connections.held.push(Held { socket: met.socket, reuseaddr: met.reuseaddr });
    }
    Ok(())
}

/// Writes the image of a connection, which goes on afterwards; its packets are locked out.
fn dump(met: &Met, images: &ImageDir) -> Result<Known> {
    let socket = met.socket.as_fd();
    queue::refuse_urgent(socket)?;
    refuse_layered(socket)?;
    let ended = sockopt::receives_no_more(socket)?;

    let repair = Repair::start(socket, met.reuseaddr)?;
    let (info, _) = sockopt::bytes::<32>(socket, INFO)?;
    let state = u32::from(info[0]);
    if !is_known(state) {
        return Err(Error::unsupported(format!("a TCP connection in state {state} cannot be dumped"))
            .remedy("dump again in a moment"));
    }
    let (mut unacknowledged, mut unsent) =
        (sockopt::queued(socket, Queued::Out)?, sockopt::queued(socket, Queued::Unsent)?);
    let backlog = unacknowledged;
    if state == CLOSED {
        // Nobody will ever ask for it again.
        (unacknowledged, unsent) = (0, 0);
    } else if sends_end(state) {
        // The end is not data.
        (unacknowledged, unsent) = (unacknowledged.saturating_sub(1), unsent.saturating_sub(1));
    }
    let received = peek(&repair, Queue::Receive, sockopt::queued(socket, Queued::In)?)?;
    let inq_seq = repair::sequence(socket)?;
    let sent = peek(&repair, Queue::Send, unacknowledged)?;
    let outq_seq = repair::sequence(socket)?;
    let opt_mask = u32::from(info[5]);
    let scaled = opt_mask & OPT_WSCALE != 0;
    let window = repair::window(socket)?;
    let entry = pb::TcpStreamEntry {
        inq_len: received.len() as u32,
        inq_seq,
        outq_len: sent.len() as u32,
        outq_seq,
        opt_mask,
        snd_wscale: if scaled { u32::from(info[6] & 0xf) } else { 0 },
        mss_clamp: repair::mss(socket)?,
        rcv_wscale: scaled.then_some(u32::from(info[6] >> 4)),
        timestamp: if opt_mask & OPT_TIMESTAMPS == 0 { None } else { Some(repair::timestamp(socket)?) },
        cork: None,
        nodelay: None,
        unsq_len: Some(unsent),
        snd_wl1: window.map(|w| w.snd_wl1),
        snd_wnd: window.map(|w| w.snd_wnd),
        max_window: window.map(|w| w.max_window),
        rcv_wnd: window.map(|w| w.rcv_wnd),
        rcv_wup: window.map(|w| w.rcv_wup),
    };
    drop(repair);
    let mut image = images.writer(ImageKind::TcpStream, met.ino.into());
    image.write(&entry)?;
    image.write_raw(&received)?;
    image.write_raw(&sent)?;
    image.finish()?;
    log::info!(
        "file {}: connection in state {state}, {} bytes received, {} sent of which {unsent} did not leave",
        met.id,
        received.len(),
        sent.len()
    );
    let writes = state != CLOSED && sends_end(state);
    Ok(Known { state, backlog, shutdown: u8::from(ended) | u8::from(writes) << 1 })
}

/// A protocol on top, in the kernel (TLS), has state of its own.
fn refuse_layered(socket: BorrowedFd<'_>) -> Result<()> {
    let (name, len) = match sockopt::bytes::<16>(socket, ULP) {
        Err(e) if e.errno() == Some(libc::ENOPROTOOPT) => return Ok(()),
        other => other?,
    };
    let name = String::from_utf8_lossy(&name[..len]).trim_end_matches('\0').to_owned();
    if name.is_empty() {
        return Ok(());
    }
    Err(Error::unsupported(format!("a TCP connection with a protocol on top of it in the kernel ({name})"))
        .remedy("switch the offload off in the program, or close the connection before the dump"))
}

/// Copies all `length` bytes of a queue, which stays as it is.
fn peek(repair: &Repair<'_>, queue: Queue, length: u32) -> Result<Vec<u8>> {
    let socket = repair.socket;
    repair::choose(socket, queue)?;
    if length == 0 {
        return Ok(Vec::new());
    }
    // Where the task's own peeking has got to must not matter, and must not change (Linux 6.10).
    let offset = sockopt::int(socket, PEEK_OFF).unwrap_or(-1);
    if offset >= 0 {
        sockopt::set_int(socket, PEEK_OFF, -1)?;
    }
    let length = length as usize;
    // One more than there should be tells whether there is more.
    let mut bytes = vec![0; length + 1];
    let got = loop {
        match recv(socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
            Err(Errno::EINTR) => interrupt::check()?,
            other => break other,
        }
    };
    if offset >= 0 {
        sockopt::set_int(socket, PEEK_OFF, offset)?;
    }
    let got = got.call("recv(MSG_PEEK)").during(|| format!("{queue:?} queue"))?;
    if got != length {
        return Err(Error::host(format!("{got} bytes are queued instead of {length}")));
    }
    bytes.truncate(length);
    Ok(bytes)
}

/// A connection that was dumped.
#[derive(Debug)]
struct Held {
    socket: OwnedFd,
    reuseaddr: bool,
}

/// The connections of a dump, without packets. Dropped, they go on.
#[derive(Debug)]
pub struct Connections {
    /// The locks of the tree's own network namespaces, which are those of its connections, with their numbers; `None` if it
    /// has none.
    wholes: Option<Vec<(u32, Whole)>>,
    method: Method,
    ends: Vec<Connection>,
    held: Vec<Held>,
    /// How many of `held` are in repair mode.
    repaired: usize,
    lock: Option<Lock>,
    lasting: Option<Lasting>,
}

impl Connections {
    /// `locks` are those of the tree's own network namespaces, and how they were made.
    pub(in crate::files::sk) fn new(how: NetworkLock, locks: Option<Locks>) -> Self {
        let (method, wholes) = match locks {
            Some((method, wholes)) => (method, Some(wholes)),
            None => (Method::of_dump(how), None),
        };
        Connections {
            wholes,
            method,
            ends: Vec::new(),
            held: Vec::new(),
            repaired: 0,
            lock: None,
            lasting: None,
        }
    }

    /// The lock of network namespace `id` of the tree's own.
    pub(crate) fn whole(&self, id: u32) -> Option<&Whole> {
        self.wholes.iter().flatten().find(|(known, _)| *known == id).map(|(_, whole)| whole)
    }

    /// Tells the inventory how a restore is to unlock the network; the lock bears the name of the dump, which
    /// stands there already.
    pub fn sign(&mut self, inventory: &mut pb::InventoryEntry) {
        inventory.network_lock_method = Some(self.method.number());
        self.method.name(inventory.dump_criu_run_id.as_deref().unwrap_or_default());
    }

    /// Keeps packets away from now on.
    fn lock(&mut self, mut ends: Vec<Connection>) -> Result<()> {
        if self.wholes.is_some() {
            return Ok(());
        }
        // Both ends may be ours.
        ends.sort_unstable();
        ends.dedup();
        if !ends.is_empty() {
            self.method.find_program();
        }
        self.lock = Some(Lock::new(&self.method, &ends)?);
        self.ends = ends;
        Ok(())
    }

    /// The tasks are about to be killed: their ends will be silent, and packets stay away after us.
    pub fn settle(&mut self) -> Result<()> {
        match &mut self.wholes {
            Some(wholes) => wholes.iter_mut().try_for_each(|(_, whole)| whole.settle())?,
            None => self.lasting = Some(Lasting::set(&self.method, &self.ends)?),
        }
        while let Some(held) = self.held.get(self.repaired) {
            repair::start(held.socket.as_fd())?;
            self.repaired += 1;
        }
        Ok(())
    }

    /// The tasks are dead: the connections are in the images only.
    pub fn gone(mut self) {
        // The last descriptors, in repair mode: closing them is silent.
        self.held.clear();
        self.repaired = 0;
        if let Some(lasting) = self.lasting.take() {
            lasting.keep();
        }
        for (_, whole) in self.wholes.take().into_iter().flatten() {
            whole.keep();
        }
    }
}

impl Drop for Connections {
    fn drop(&mut self) {
        let complain = |result: Result<()>| {
            if let Err(e) = result {
                log::error!("A connection does not go on: {e}");
            }
        };
        for held in &self.held[..self.repaired] {
            complain(repair::end_quietly(held.socket.as_fd(), held.reuseaddr));
        }
        drop(self.lasting.take());
        drop(self.lock.take());
        drop(self.wholes.take());
        // Leaving repair mode asks the peer for a word, and its answer gets things going.
        for held in &self.held {
            let socket = held.socket.as_fd();
            complain(repair::start(socket).and_then(|()| repair::end(socket, held.reuseaddr)));
        }
    }
}
