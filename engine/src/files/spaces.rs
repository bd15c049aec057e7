//! Namespaces of the kinds of which tasks of one tree may have several, but those of mounts ([`Roots`](super::Roots)):
//! descriptors of all of them.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use nix::{
    sched::{CloneFlags, setns},
    sys::stat::{FileStat, fstat},
};
use rcriu_images::pb;

use crate::{
    error::{Context, Error, Result, SysContext},
    ns,
};

/// Kinds, with their files in the folder of a process in /proc, and how messages call them.
pub const KINDS: [(CloneFlags, &str, &str); 3] = [
    (CloneFlags::CLONE_NEWUTS, "ns/uts", "uts"),
    (CloneFlags::CLONE_NEWIPC, "ns/ipc", "ipc"),
    (CloneFlags::CLONE_NEWNET, "ns/net", "network"),
];

/// Those of which there are several.
#[derive(Clone, Debug, Default)]
pub struct Spaces(Arc<Vec<Space>>);

/// One of them.
#[derive(Debug)]
pub struct Space {
    /// Its kind.
    pub kind: CloneFlags,
    /// Its number in images.
    pub id: u32,
    /// The namespace.
    pub file: OwnedFd,
}

impl Spaces {
    /// These; of each kind the root task's first.
    pub fn new(list: Vec<Space>) -> Spaces {
        Spaces(Arc::new(list))
    }

    /// All of them.
    pub fn each(&self) -> impl Iterator<Item = &Space> {
        self.0.iter()
    }

    /// The namespace of this kind with this number in images; none if there is only one of the kind.
    pub fn get(&self, kind: CloneFlags, id: u32) -> Option<BorrowedFd<'_>> {
        self.each().find(|space| space.kind == kind && space.id == id).map(|space| space.file.as_fd())
    }

    /// Number in images of the namespace that a file is, if it is one of these.
    pub(super) fn number_of(&self, file: &FileStat) -> Option<u32> {
        let is = |space: &&Space| {
            let stat = fstat(&space.file);
            stat.is_ok_and(|stat| (stat.st_dev, stat.st_ino) == (file.st_dev, file.st_ino))
        };
        self.each().find(is).map(|space| space.id)
    }

    /// The calling task enters all that it was in: `ids` are its numbers.
    ///
    /// World: Task, right after its birth: it may have been forked by one that is elsewhere.
    pub fn enter(&self, ids: &pb::TaskKobjIdsEntry) -> Result<()> {
        for (kind, _, name) in KINDS {
            if self.each().all(|space| space.kind != kind) {
                continue;
            }
            let own = ns::id(ids, kind).and_then(|id| self.get(kind, id));
            let own = own.ok_or_else(|| Error::bug(format!("a {name} namespace that is not made")))?;
            setns(own, kind).call("setns").during(|| format!("{name} namespace"))?;
        }
        Ok(())
    }
}
