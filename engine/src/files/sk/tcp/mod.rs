//! TCP connections: what an entry of files.img leaves out, in an image for each.
//!
//! ```text
//! dump     every connection met is noted; when all are known their packets are locked out, each is read in
//!          repair mode, and goes on as soon as it has been read
//! kill     repair mode for all, so that closing is silent; the lock stays; tasks die
//! restore  the engine itself makes connections before the first fork, in repair mode: tasks take them as
//!          they find them; repair mode ends right before tasks run
//! ```
//! In repair mode (TCP_REPAIR) nothing a socket is told to do reaches the network, and its queues and sequence
//! numbers can be read and written. Whatever happens to a dump, its guards end repair mode before packets flow
//! again: the peer sees a pause, no more.

mod dump;
mod repair;
mod restore;
mod segment;

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::BorrowedFd;

pub use dump::Connections;
pub(super) use dump::{Met, Waiting, dump_all};
pub use restore::Revived;
pub(super) use restore::Stream;

use super::CLOSED;
use crate::{
    error::{Error, Result},
    sys::sockopt::{self, Opt, general},
};

const PEERNAME: Opt = general(libc::SO_PEERNAME, "SO_PEERNAME");
const INFO: Opt = Opt { level: libc::SOL_TCP, number: libc::TCP_INFO, name: "TCP_INFO" };

/// `TCP_*` states of `include/net/tcp_states.h`.
const SYN_SENT: u32 = 2;
const FIN_WAIT1: u32 = 4;
const FIN_WAIT2: u32 = 5;
const CLOSE_WAIT: u32 = 8;
const LAST_ACK: u32 = 9;
const CLOSING: u32 = 11;

/// `TCPI_OPT_*`.
const OPT_TIMESTAMPS: u32 = 1;
const OPT_SACK: u32 = 2;
const OPT_WSCALE: u32 = 4;

/// Whether a connection in `state` can be dumped.
pub(super) fn is_known(state: u32) -> bool {
    [super::ESTABLISHED, SYN_SENT, FIN_WAIT1, FIN_WAIT2, CLOSED, CLOSE_WAIT, LAST_ACK, CLOSING]
        .contains(&state)
}

/// The end of the stream was sent, or stands in the queue behind what is to be sent.
fn sends_end(state: u32) -> bool {
    [FIN_WAIT1, FIN_WAIT2, CLOSING, LAST_ACK, CLOSED].contains(&state)
}

/// The peer has acknowledged the end of the stream.
fn end_is_acknowledged(state: u32) -> bool {
    [FIN_WAIT2, CLOSED].contains(&state)
}

/// The peer has ended its stream.
fn has_ended(state: u32) -> bool {
    [CLOSE_WAIT, LAST_ACK, CLOSING, CLOSED].contains(&state)
}

/// Our end was sent before the peer's was received.
fn sends_end_first(state: u32) -> bool {
    [FIN_WAIT1, FIN_WAIT2, CLOSING].contains(&state)
}

/// The peer, also of a connection that is being made or was lost; `None` if there never was one.
pub(super) fn peer(socket: BorrowedFd<'_>, v6: bool) -> Result<Option<SocketAddr>> {
    // No more may be asked for than there is.
    let bytes = if v6 {
        sockopt::bytes::<28>(socket, PEERNAME).map(|(bytes, _)| bytes.to_vec())
    } else {
        sockopt::bytes::<16>(socket, PEERNAME).map(|(bytes, _)| bytes.to_vec())
    };
    match bytes {
        Ok(bytes) => {
            let peer = address(&bytes).ok_or_else(|| Error::host("SO_PEERNAME is no address"))?;
            Ok(Some(peer).filter(|peer| peer.port() != 0))
        }
        Err(e) if e.errno() == Some(libc::ENOTCONN) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Reads `struct sockaddr_in` or `sockaddr_in6`.
fn address(bytes: &[u8]) -> Option<SocketAddr> {
    let port = u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?);
    match i32::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?)) {
        libc::AF_INET => {
            let ip: [u8; 4] = bytes.get(4..8)?.try_into().ok()?;
            Some(SocketAddrV4::new(Ipv4Addr::from(ip), port).into())
        }
        libc::AF_INET6 => {
            let ip: [u8; 16] = bytes.get(8..24)?.try_into().ok()?;
            let scope = u32::from_ne_bytes(bytes.get(24..28)?.try_into().ok()?);
            Some(SocketAddrV6::new(Ipv6Addr::from(ip), port, 0, scope).into())
        }
        _ => None,
    }
}
