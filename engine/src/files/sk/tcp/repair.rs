//! Repair mode and what can be read and set in it (`tcp(7)`, `linux/tcp.h`).

use std::os::fd::BorrowedFd;

use super::super::opts;
use crate::{
    error::{Error, Result},
    sys::sockopt::{self, Opt},
};

const fn opt(number: i32, name: &'static str) -> Opt {
    Opt { level: libc::SOL_TCP, number, name }
}

const REPAIR: Opt = opt(libc::TCP_REPAIR, "TCP_REPAIR");
const REPAIR_QUEUE: Opt = opt(libc::TCP_REPAIR_QUEUE, "TCP_REPAIR_QUEUE");
const QUEUE_SEQ: Opt = opt(libc::TCP_QUEUE_SEQ, "TCP_QUEUE_SEQ");
const REPAIR_OPTIONS: Opt = opt(libc::TCP_REPAIR_OPTIONS, "TCP_REPAIR_OPTIONS");
const REPAIR_WINDOW: Opt = opt(29, "TCP_REPAIR_WINDOW");
const TIMESTAMP: Opt = opt(libc::TCP_TIMESTAMP, "TCP_TIMESTAMP");
const MAXSEG: Opt = opt(libc::TCP_MAXSEG, "TCP_MAXSEG");

/// Values of TCP_REPAIR; leaving it without telling the peer is Linux 4.20.
const OFF: i32 = 0;
const ON: i32 = 1;
const OFF_QUIETLY: i32 = -1;

/// A queue of a connection, as TCP_REPAIR_QUEUE numbers them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Queue {
    None = 0,
    Receive = 1,
    Send = 2,
}

/// `struct tcp_repair_window`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Window {
    pub(super) snd_wl1: u32,
    pub(super) snd_wnd: u32,
    pub(super) max_window: u32,
    pub(super) rcv_wnd: u32,
    pub(super) rcv_wup: u32,
}

/// Options that were agreed upon when the connection was made, as numbers of TCP options.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Agreed {
    Mss(u32),
    /// Shifts of windows: the peer's, ours.
    Scale(u32, u32),
    Sack,
    Timestamps,
}

/// Starts repair mode. SO_REUSEADDR is lost by it.
///
/// # Errors
/// EPERM without CAP_NET_ADMIN.
pub(super) fn start(socket: BorrowedFd<'_>) -> Result<()> {
    sockopt::set_int(socket, REPAIR, ON).map_err(|e| match e.errno() {
        Some(libc::EPERM) => e.remedy("connections can be dumped and restored with CAP_NET_ADMIN only"),
        _ => e,
    })
}

/// Ends repair mode and tells the peer, who may have been waiting for a word; sets SO_REUSEADDR again.
pub(super) fn end(socket: BorrowedFd<'_>, reuseaddr: bool) -> Result<()> {
    sockopt::set_int(socket, REPAIR, OFF)?;
    sockopt::set_int(socket, opts::REUSEADDR, reuseaddr.into())
}

/// Ends repair mode, no packet leaves.
pub(super) fn end_quietly(socket: BorrowedFd<'_>, reuseaddr: bool) -> Result<()> {
    match sockopt::set_int(socket, REPAIR, OFF_QUIETLY) {
        Err(e) if e.errno() == Some(libc::EINVAL) => sockopt::set_int(socket, REPAIR, OFF)?,
        other => other?,
    }
    sockopt::set_int(socket, opts::REUSEADDR, reuseaddr.into())
}

/// A connection in repair mode, until this is dropped: then it goes on quietly.
#[derive(Debug)]
pub(super) struct Repair<'a> {
    pub(super) socket: BorrowedFd<'a>,
    reuseaddr: bool,
}

impl<'a> Repair<'a> {
    pub(super) fn start(socket: BorrowedFd<'a>, reuseaddr: bool) -> Result<Self> {
        start(socket)?;
        Ok(Repair { socket, reuseaddr })
    }
}

impl Drop for Repair<'_> {
    fn drop(&mut self) {
        if let Err(e) = end_quietly(self.socket, self.reuseaddr) {
            log::error!("A connection does not go on: {e}");
        }
    }
}

/// Chooses the queue that is read, written and numbered from now on.
pub(super) fn choose(socket: BorrowedFd<'_>, queue: Queue) -> Result<()> {
    sockopt::set_int(socket, REPAIR_QUEUE, queue as i32)
}

/// The number behind the last byte of the chosen queue.
pub(super) fn sequence(socket: BorrowedFd<'_>) -> Result<u32> {
    sockopt::int(socket, QUEUE_SEQ).map(i32::cast_unsigned)
}

/// Sets the number of the first byte of a queue, before there is a connection.
pub(super) fn set_sequence(socket: BorrowedFd<'_>, queue: Queue, number: u32) -> Result<()> {
    choose(socket, queue)?;
    sockopt::set_int(socket, QUEUE_SEQ, number.cast_signed())
}

/// The largest segment the peer takes.
pub(super) fn mss(socket: BorrowedFd<'_>) -> Result<u32> {
    sockopt::int(socket, MAXSEG).map(i32::cast_unsigned)
}

/// The clock of timestamps.
pub(super) fn timestamp(socket: BorrowedFd<'_>) -> Result<u32> {
    sockopt::int(socket, TIMESTAMP).map(i32::cast_unsigned)
}

/// Lets the clock of timestamps go on from `now`.
pub(super) fn set_timestamp(socket: BorrowedFd<'_>, now: u32) -> Result<()> {
    sockopt::set_int(socket, TIMESTAMP, now.cast_signed())
}

/// Sets what was agreed upon.
pub(super) fn agree(socket: BorrowedFd<'_>, options: &[Agreed]) -> Result<()> {
    // struct tcp_repair_opt { opt_code, opt_val }
    let words = options.iter().flat_map(|option| match *option {
        Agreed::Mss(mss) => [2, mss],
        Agreed::Scale(theirs, ours) => [3, theirs & 0xffff | ours << 16],
        Agreed::Sack => [4, 0],
        Agreed::Timestamps => [8, 0],
    });
    let bytes: Vec<u8> = words.flat_map(u32::to_ne_bytes).collect();
    sockopt::set_bytes(socket, REPAIR_OPTIONS, &bytes)
}

/// Windows; `None` before Linux 4.8.
pub(super) fn window(socket: BorrowedFd<'_>) -> Result<Option<Window>> {
    let (bytes, len) = match sockopt::bytes::<20>(socket, REPAIR_WINDOW) {
        Err(e) if e.errno() == Some(libc::ENOPROTOOPT) => return Ok(None),
        other => other?,
    };
    if len != bytes.len() {
        return Err(Error::host("TCP_REPAIR_WINDOW is short"));
    }
    let word = |n: usize| bytes[4 * n..4 * n + 4].try_into().map_or(0, u32::from_ne_bytes);
    Ok(Some(Window {
        snd_wl1: word(0),
        snd_wnd: word(1),
        max_window: word(2),
        rcv_wnd: word(3),
        rcv_wup: word(4),
    }))
}

/// Sets windows.
pub(super) fn set_window(socket: BorrowedFd<'_>, window: Window) -> Result<()> {
    let Window { snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup } = window;
    let bytes: Vec<u8> =
        [snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup].into_iter().flat_map(u32::to_ne_bytes).collect();
    sockopt::set_bytes(socket, REPAIR_WINDOW, &bytes)
}
