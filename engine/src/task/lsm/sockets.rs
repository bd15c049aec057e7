//! SELinux labels of sockets. A socket gets that of its maker, unless `attr/sockcreate` says another; for a restore that
//! is the only way to one that is not the engine's.

use std::{collections::HashMap, os::fd::BorrowedFd};

use rcriu_images::pb;

use super::{Host, Labels, Module, text};
use crate::{
    error::{Context, Error, Result},
    options::LsmKind,
    pstree::FileId,
    restore::read::Snapshot,
    sys::xattr,
};

const ATTRIBUTE: &std::ffi::CStr = c"security.selinux";
const SOCKCREATE: &str = "/proc/thread-self/attr/sockcreate";

/// Labels of the sockets of a dump.
#[derive(Debug)]
pub struct SocketLabels {
    /// Whether sockets have any.
    are_there: bool,
    known: HashMap<FileId, String>,
}

impl SocketLabels {
    /// Asks whether sockets have labels here.
    pub fn ask() -> SocketLabels {
        SocketLabels { are_there: Host::look().module == Some(Module::SeLinux), known: HashMap::new() }
    }

    /// Takes note of a socket.
    ///
    /// # Errors
    /// A label that the kernel does not tell.
    pub fn met(&mut self, id: FileId, socket: BorrowedFd<'_>) -> Result<()> {
        if self.are_there && !self.known.contains_key(&id) {
            let label = xattr::of_open(socket, ATTRIBUTE).during(|| "its SELinux label".into())?;
            self.known.insert(id, text(&label));
        }
        Ok(())
    }

    /// The label of a socket that was met.
    pub fn of(&self, id: FileId) -> Option<String> {
        self.known.get(&id).cloned()
    }
}

/// Which labels sockets get. One that a task gave its sockets without being asked follows the task to the label
/// that `--lsm-profile` gives.
pub fn wanted(labels: &Labels, snapshot: &Snapshot) -> HashMap<FileId, String> {
    let given = labels.given();
    if labels.host().module != Some(Module::SeLinux) || given.is_some_and(|g| g.kind != LsmKind::SeLinux) {
        return HashMap::new();
    }
    let dumped = Labels::dumped(snapshot);
    let of = |fd: &pb::FdinfoEntry| {
        let old = fd.xattr_security_selinux.clone().filter(|label| !label.is_empty())?;
        let follows = given.filter(|_| dumped.contains(old.as_str()));
        Some((FileId(fd.id), follows.map_or(old, |given| given.name.clone())))
    };
    snapshot.fd_tables.values().flatten().filter_map(of).collect()
}

/// As long as this lives, sockets that this thread makes have a label of their own.
#[derive(Debug)]
pub struct Making(());

impl Making {
    /// From here on they have `label`.
    pub fn with(label: &str) -> Result<Making> {
        set(label)
            .map_err(|e| Error::io("write", &e).during(format!("{SOCKCREATE}: SELinux label {label:?}")))?;
        Ok(Making(()))
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        // An empty line takes it back.
        if let Err(e) = set("\n") {
            log::warn!("{SOCKCREATE}: {e}");
        }
    }
}

fn set(label: &str) -> std::io::Result<()> {
    std::fs::write(SOCKCREATE, label)
}
