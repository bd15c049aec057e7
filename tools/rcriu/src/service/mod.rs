//! The RPC that container runtimes use: protobuf messages over a unix SOCK_SEQPACKET socket.
//!
//! `swrk FD` serves one client over an inherited socket and ends; `service` listens and starts a worker for
//! each client. A request's options are turned into the same [`Raw`] that the command line
//! fills, so both mean the same and refuse the same.
//!
//! ```text
//! client                        we
//!   DUMP{opts}      ---->
//!                   <----  NOTIFY{script: pre-dump}       only with notify_scripts
//!   NOTIFY{success} ---->
//!                   ...
//!                   <----  DUMP{success, dump}            or success: false, cr_errno, cr_errmsg
//! ```

mod connection;
mod listen;
mod notify;
mod opts;
mod prepare;
mod requests;

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::process::ExitCode;

use rcriu_engine::error::{Error, Result};
use rcriu_engine::process;

use crate::cli::Raw;

pub use listen::{WORKER, listen};

/// Who the client is to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// It started us: descriptors it left open are meant for us, and we may give it a child.
    Parent,
    /// It connected to a service.
    Stranger,
}

/// Serves the client at the other end of the inherited descriptor that `words` names.
pub fn swrk(raw: &Raw, words: &[OsString]) -> Result<ExitCode> {
    let fd = match words {
        [word] => word.to_str().and_then(|w| w.parse::<RawFd>().ok()),
        _ => None,
    };
    let fd =
        fd.ok_or_else(|| Error::usage("swrk needs one number: the descriptor of the client's socket"))?;
    let client = connection::Connection::new(process::take_descriptor(fd)?)?;
    requests::serve(client, raw, Trust::Parent)
}

/// Serves one client of [`listen()`], whose socket is our standard input.
pub fn worker(raw: &Raw) -> Result<ExitCode> {
    let socket = process::duplicate_descriptor(0)?;
    process::empty_standard_input()?;
    requests::serve(connection::Connection::new(socket)?, raw, Trust::Stranger)
}
