//! Making connections again, in the engine and before the first fork.

use std::{
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    os::unix::fs::FileExt,
};

use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, Shutdown, send, shutdown},
};
use rcriu_images::{ImageDir, ImageKind, pb};

use super::{
    OPT_SACK, OPT_TIMESTAMPS, OPT_WSCALE, SYN_SENT, end_is_acknowledged, has_ended,
    repair::{self, Agreed, Queue, Window},
    segment::{self, Segment},
    sends_end, sends_end_first,
};
use crate::{
    error::{Context, Error, Result, SysContext},
    files::{
        Zone,
        sk::{inet, opts},
    },
    interrupt,
    netlock::Connection,
    sys::sockopt,
};

/// Most bytes that are queued by one call; halved when the kernel cannot take that much at once.
const PORTION: usize = 64 << 10;
const LEAST: usize = 1 << 10;

/// The image of a connection.
#[derive(Debug)]
pub(in crate::files::sk) struct Stream {
    entry: pb::TcpStreamEntry,
    ino: u32,
    /// Where the queues begin in the image.
    offset: u64,
}

/// A connection in repair mode, made by the engine and kept until tasks run.
#[derive(Debug)]
pub struct Revived {
    socket: OwnedFd,
    reuseaddr: bool,
}

impl Revived {
    pub(crate) fn new(socket: OwnedFd, reuseaddr: bool) -> Self {
        Revived { socket, reuseaddr }
    }

    /// Moves the descriptor to where it survives.
    pub(in crate::files) fn keep(self, zone: Zone) -> Result<Self> {
        Ok(Revived { socket: zone.keep(self.socket)?, ..self })
    }

    /// Whether its port may be used again by others, once it goes on.
    pub(crate) fn reuses_address(&self) -> bool {
        self.reuseaddr
    }

    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The connection goes on. Packets flow already.
    pub(in crate::files) fn resume(self) -> Result<()> {
        repair::end(self.socket.as_fd(), self.reuseaddr)
    }
}

impl Stream {
    /// Reads the image of the connection with inode `ino`; `None` if there is none.
    pub(in crate::files::sk) fn read(images: &ImageDir, ino: u32) -> Result<Option<Stream>> {
        let Some(mut image) = images.reader(ImageKind::TcpStream, ino.into())? else { return Ok(None) };
        let Some(entry) = image.next::<pb::TcpStreamEntry>()? else {
            return Err(image.bad("it has no entry").into());
        };
        let queues = u64::from(entry.inq_len) + u64::from(entry.outq_len);
        if image.left().is_some_and(|left| left < queues) {
            return Err(image.bad(format!("queues of {queues} bytes are cut off")).into());
        }
        let wrong = if entry.unsq_len.is_none_or(|unsent| unsent > entry.outq_len) {
            Some("it does not say what was not sent")
        } else if entry.opt_mask & OPT_WSCALE != 0 && entry.rcv_wscale.is_none() {
            Some("the scale of its window is missing")
        } else if entry.opt_mask & OPT_TIMESTAMPS != 0 && entry.timestamp.is_none() {
            Some("its clock is missing")
        } else {
            None
        };
        if let Some(wrong) = wrong {
            return Err(image.bad(wrong).into());
        }
        Ok(Some(Stream { offset: image.offset(), entry, ino }))
    }

    /// Whether anything is left to be read of a connection that is closed.
    pub(in crate::files::sk) fn is_empty(&self) -> bool {
        self.entry.inq_len == 0
    }

    /// Makes the connection on `socket`, a new one, which is left in repair mode: its packets are locked out.
    pub(in crate::files::sk) fn restore(
        &self,
        socket: BorrowedFd<'_>,
        file: &inet::InetFile,
        images: &ImageDir,
    ) -> Result<()> {
        let entry = &self.entry;
        let state = file.state();
        // Sending must not wait, and everything has to fit.
        nix::fcntl::fcntl(socket, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))
            .call("fcntl(F_SETFL)")?;
        opts::widen(socket)?;
        repair::start(socket)?;
        file.bind(socket)?;

        // Numbers of what comes next, ends of streams not counted.
        let mut received = entry.inq_seq.wrapping_sub(has_ended(state).into());
        let mut written = entry.outq_seq.wrapping_sub(sends_end(state).into());
        repair::set_sequence(socket, Queue::Receive, received.wrapping_sub(entry.inq_len))?;
        let first = written.wrapping_sub(entry.outq_len);
        let remote = file.remote();
        if state == SYN_SENT {
            // What was sent is the request itself; it is sent again.
            repair::set_sequence(socket, Queue::Send, first.wrapping_sub(1))?;
            repair::end_quietly(socket, true)?;
            connect(socket, remote)?;
            repair::start(socket)?;
        } else {
            repair::set_sequence(socket, Queue::Send, first)?;
            connect(socket, remote)?;
            repair::agree(socket, &self.agreed())?;
        }
        if let Some(clock) = entry.timestamp.filter(|_| entry.opt_mask & OPT_TIMESTAMPS != 0) {
            repair::set_timestamp(socket, clock)?;
        }
        self.queues(socket, images)?;
        let window = self.window();
        if let Some(mut window) = window {
            if has_ended(state) {
                // The end that is still to come takes a number.
                window.rcv_wup = window.rcv_wup.wrapping_sub(1);
                window.rcv_wnd = window.rcv_wnd.wrapping_add(1);
            }
            repair::set_window(socket, window)?;
        }
        let ends = Connection::new(file.local(), remote);
        let scale = if entry.opt_mask & OPT_WSCALE == 0 { 0 } else { entry.snd_wscale & 0xf };
        let window = window.map_or(u32::from(u16::MAX), |w| w.snd_wnd >> scale);
        let window = u16::try_from(window).unwrap_or(u16::MAX);
        let tell = |sequence, acknowledged, end| {
            segment::send(&ends, Segment { sequence, acknowledged, window, end }, file.device())
        };
        if sends_end(state) && sends_end_first(state) {
            send_end(socket, end_is_acknowledged(state))?;
        }
        if has_ended(state) {
            tell(received, written.wrapping_sub(entry.outq_len), true)?;
            received = received.wrapping_add(1);
        }
        if sends_end(state) && !sends_end_first(state) {
            send_end(socket, end_is_acknowledged(state))?;
        }
        if end_is_acknowledged(state) {
            written = written.wrapping_add(1);
            tell(received, written, false)?;
        }
        repair::choose(socket, Queue::None)?;
        self.check(socket, state)
    }

    /// Whether the kernel sees the connection as it was dumped.
    fn check(&self, socket: BorrowedFd<'_>, state: u32) -> Result<()> {
        let (info, _) = sockopt::bytes::<32>(socket, super::INFO)?;
        if u32::from(info[0]) == state || state == SYN_SENT {
            return Ok(());
        }
        Err(Error::host(format!("the connection is in state {} instead of {state}", info[0])).remedy(
            "a packet filter may drop packets with the mark 0xc114 on their way through this machine",
        ))
    }

    fn agreed(&self) -> Vec<Agreed> {
        let entry = &self.entry;
        let mut agreed = Vec::new();
        if entry.opt_mask & OPT_SACK != 0 {
            agreed.push(Agreed::Sack);
        }
        if entry.opt_mask & OPT_WSCALE != 0 {
            agreed.push(Agreed::Scale(entry.snd_wscale, entry.rcv_wscale.unwrap_or(0)));
        }
        if entry.opt_mask & OPT_TIMESTAMPS != 0 {
            agreed.push(Agreed::Timestamps);
        }
        agreed.push(Agreed::Mss(entry.mss_clamp));
        agreed
    }

    /// Windows, if the dumping kernel could tell them.
    fn window(&self) -> Option<Window> {
        let entry = &self.entry;
        Some(Window {
            snd_wl1: entry.snd_wl1?,
            snd_wnd: entry.snd_wnd?,
            max_window: entry.max_window?,
            rcv_wnd: entry.rcv_wnd?,
            rcv_wup: entry.rcv_wup?,
        })
    }

    /// Fills both queues.
    fn queues(&self, socket: BorrowedFd<'_>, images: &ImageDir) -> Result<()> {
        let entry = &self.entry;
        if entry.inq_len == 0 && entry.outq_len == 0 {
            return Ok(());
        }
        let image = images.open_raw(ImageKind::TcpStream, self.ino.into())?;
        let image = image.ok_or_else(|| Error::image("the image of a connection is gone"))?;
        let read = |offset: u64, length: u32| {
            let mut bytes = vec![0; length as usize];
            image.read_exact_at(&mut bytes, self.offset + offset).call("pread").map(|()| bytes)
        };
        let bytes = read(0, entry.inq_len)?;
        if !bytes.is_empty() {
            repair::choose(socket, Queue::Receive)?;
            fill(socket, &bytes).during(|| "receive queue".into())?;
        }
        let bytes = read(entry.inq_len.into(), entry.outq_len)?;
        let unsent = entry.unsq_len.unwrap_or(0).min(entry.outq_len) as usize;
        let (sent, unsent) = bytes.split_at(bytes.len() - unsent);
        if !sent.is_empty() {
            // The kernel takes them as sent: acknowledgements may arrive.
            repair::choose(socket, Queue::Send)?;
            fill(socket, sent).during(|| "send queue".into())?;
        }
        if !unsent.is_empty() {
            repair::end_quietly(socket, true)?;
            let filled = fill(socket, unsent).during(|| "send queue, unsent part".into());
            repair::start(socket)?;
            filled?;
        }
        Ok(())
    }
}

/// connect(2), which waits for nobody.
fn connect(socket: BorrowedFd<'_>, to: SocketAddr) -> Result<()> {
    match sockopt::connect(socket, &inet::raw(&to)) {
        Err(e) if e.errno() == Some(libc::EINPROGRESS) => Ok(()),
        Err(e) if e.errno() == Some(libc::EADDRNOTAVAIL) => {
            Err(e.during(to.to_string()).remedy("the same connection exists on this machine already"))
        }
        other => other.during(|| to.to_string()),
    }
}

/// Appends to the queue that was chosen.
fn fill(socket: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<()> {
    let mut most = PORTION;
    while !bytes.is_empty() {
        let portion = &bytes[..bytes.len().min(most)];
        match send(socket.as_raw_fd(), portion, MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT) {
            Ok(n) if n > 0 => bytes = &bytes[n.min(bytes.len())..],
            Err(Errno::EINTR) => interrupt::check()?,
            // The kernel wants a piece of memory in one for all of it.
            Ok(_) | Err(Errno::ENOMEM | Errno::ENOBUFS | Errno::EAGAIN) if most > LEAST => most /= 2,
            Ok(_) => return Err(Error::host("the queue takes no more")),
            Err(e) => {
                return Err(Error::sys("send", e as i32)
                    .during(format!("{} bytes are left", bytes.len()))
                    .remedy("see net.ipv4.tcp_mem, net.core.rmem_max and net.core.wmem_max"));
            }
        }
    }
    Ok(())
}

/// Ends our stream. `acknowledged` says that the peer has seen it: then it is not sent again.
fn send_end(socket: BorrowedFd<'_>, acknowledged: bool) -> Result<()> {
    repair::choose(socket, if acknowledged { Queue::Send } else { Queue::None })?;
    shutdown(socket.as_raw_fd(), Shutdown::Write).call("shutdown")?;
    repair::choose(socket, Queue::None)
}
