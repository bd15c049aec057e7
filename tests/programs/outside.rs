//! A unix socket whose peer is outside of the tree: by name, or the other end of a pair, given as stdin.
//!
//! # Safety
//!
//! Descriptor 0 is this program's own from start to end.

use std::io::Write;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};

use anyhow::Context;

use crate::kit::{Check, rest};

/// See the module. Argument: path of a socket for datagrams.
pub fn run(args: &[String]) -> Check {
    match args.first() {
        Some(path) => {
            let socket = UnixDatagram::unbound().context("socket")?;
            socket.connect(path).with_context(|| format!("connect {path}"))?;
            socket.send(b"before").context("send")?;
            rest()?;
            socket.send(b"after").context("send after the restore").map(drop)
        }
        None => {
            // SAFETY: stdin is a socket by agreement, and nobody else uses it.
            let mut socket = UnixStream::from(unsafe { OwnedFd::from_raw_fd(0) });
            socket.write_all(b"before").context("write")?;
            rest()?;
            socket.write_all(b"after").context("write after the restore")
        }
    }
}
