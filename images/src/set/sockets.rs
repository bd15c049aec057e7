//! Sockets by kind and state.

use std::collections::BTreeMap;

use super::ImageSet;

/// Protocol family and type, as far as people tell sockets apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SocketKind {
    Tcp,
    Udp,
    Raw,
    Unix,
    Netlink,
    Packet,
    Other,
}

/// State of a socket; only streams have others than [`SocketState::Open`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SocketState {
    Open,
    Listen,
    Established,
    SynSent,
    /// One side has closed, or both are about to.
    Closing,
    Closed,
}

impl SocketKind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Raw => "raw",
            Self::Unix => "unix",
            Self::Netlink => "netlink",
            Self::Packet => "packet",
            Self::Other => "other",
        }
    }
}

impl SocketState {
    /// By the kernel's number of a TCP state, which unix sockets use as well.
    fn of(number: u32) -> Self {
        match number {
            1 => Self::Established,
            2 | 3 => Self::SynSent,
            7 => Self::Closed,
            10 => Self::Listen,
            4..=6 | 8 | 9 | 11 => Self::Closing,
            _ => Self::Open,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Listen => "listening",
            Self::Established => "established",
            Self::SynSent => "connecting",
            Self::Closing => "closing",
            Self::Closed => "closed",
        }
    }
}

/// How many sockets there are of each kind and state.
pub fn sockets(set: &ImageSet) -> BTreeMap<(SocketKind, SocketState), usize> {
    const STREAM: u32 = 1;
    const DGRAM: u32 = 2;
    const SEQPACKET: u32 = 5;
    let mut counts = BTreeMap::new();
    for file in set.files.values() {
        let found = if let Some(sk) = &file.isk {
            let kind = match (sk.r#type, sk.proto) {
                (STREAM, 6) => SocketKind::Tcp,
                (DGRAM, 17 | 136) => SocketKind::Udp,
                (DGRAM | 3, _) => SocketKind::Raw,
                _ => SocketKind::Other,
            };
            let state = if kind == SocketKind::Tcp { SocketState::of(sk.state) } else { SocketState::Open };
            (kind, state)
        } else if let Some(sk) = &file.usk {
            let stream = matches!(sk.r#type, STREAM | SEQPACKET);
            (SocketKind::Unix, if stream { SocketState::of(sk.state) } else { SocketState::Open })
        } else if file.nlsk.is_some() {
            (SocketKind::Netlink, SocketState::Open)
        } else if file.psk.is_some() {
            (SocketKind::Packet, SocketState::Open)
        } else {
            continue;
        };
        *counts.entry(found).or_insert(0) += 1;
    }
    counts
}
