//! The network namespaces of a tree that is dumped: which is which, and what all of them together list.

use std::{
    collections::HashMap,
    hash::Hash,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use nix::{
    fcntl::OFlag,
    sched::CloneFlags,
    sys::stat::{FileStat, fstat},
};

use crate::{
    error::{Context, Result, SysContext},
    ns::enter::here,
    procfs::ProcDir,
    pstree::RealPid,
};

/// One of them.
#[derive(Debug)]
struct Space {
    /// Number in images.
    id: u32,
    device: u64,
    inode: u64,
    file: OwnedFd,
}

/// All of them, that of the root task first; none if the tree is in ours.
#[derive(Clone, Debug, Default)]
pub struct Networks(Arc<Vec<Space>>);

impl Networks {
    /// Those of a task in each and their numbers in images.
    ///
    /// Precondition: the tasks are stopped.
    pub fn of(tasks: &[(RealPid, u32)]) -> Result<Networks> {
        let one = |(pid, id): &(RealPid, u32)| {
            let file = ProcDir::open(*pid)?.file("ns/net", OFlag::O_RDONLY)?;
            let stat = fstat(&file).call("fstat")?;
            Ok(Space { id: *id, device: stat.st_dev, inode: stat.st_ino, file })
        };
        Ok(Networks(Arc::new(tasks.iter().map(one).collect::<Result<_>>()?)))
    }

    /// Whether the tree has none of its own.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether there is more than one.
    pub fn is_several(&self) -> bool {
        self.0.len() > 1
    }

    /// Number of the root task's.
    pub fn first(&self) -> Option<u32> {
        Some(self.0.first()?.id)
    }

    /// Number of the namespace that a file of it, or what is told of it, is of.
    pub fn number_of(&self, stat: &FileStat) -> Option<u32> {
        let found = self.0.iter().find(|space| (space.device, space.inode) == (stat.st_dev, stat.st_ino));
        found.map(|space| space.id)
    }

    /// Inode of namespace `id`.
    pub fn inode(&self, id: u32) -> Option<u64> {
        self.0.iter().find(|space| space.id == id).map(|space| space.inode)
    }

    /// Number and file of each.
    pub fn each(&self) -> impl Iterator<Item = (u32, BorrowedFd<'_>)> {
        self.0.iter().map(|space| (space.id, space.file.as_fd()))
    }

    /// Acts in namespace `id`.
    ///
    /// Precondition: this thread is in the first.
    pub fn within<T>(&self, id: Option<u32>, act: impl FnOnce() -> Result<T>) -> Result<T> {
        match self.0.iter().skip(1).find(|space| Some(space.id) == id) {
            Some(space) => here(space.file.as_fd(), CloneFlags::CLONE_NEWNET, act),
            None => act(),
        }
    }

    /// What `table` lists in each of them, keys being different in all; of this thread's own if there is at most one.
    ///
    /// Precondition: if there is one or more, this thread is in the first.
    pub fn listed<K: Eq + Hash, V>(
        &self,
        table: impl Fn() -> Result<HashMap<K, V>>,
    ) -> Result<HashMap<K, V>> {
        let mut all = table()?;
        for space in self.0.iter().skip(1) {
            let more = here(space.file.as_fd(), CloneFlags::CLONE_NEWNET, &table);
            all.extend(more.during(|| format!("network namespace {}", space.id))?);
        }
        Ok(all)
    }
}
