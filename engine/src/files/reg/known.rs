//! What a dump has found out of files, for those that are open many times.

use std::collections::{HashMap, hash_map::Entry};

use nix::sys::stat::FileStat;

use super::{dump_build_id, stat_of};
use crate::{
    error::Result,
    files::{DrainedFd, lease::Leases},
};

/// Answers that hold for the whole dump: who was asked stands still, and nobody else is waited for.
#[derive(Debug, Default)]
pub(in crate::files) struct Known {
    /// What paths lead to.
    found: HashMap<Vec<u8>, nix::Result<FileStat>>,
    /// Build-ids by device and inode.
    build_ids: HashMap<(u64, u64), Vec<u32>>,
    leases: Leases,
}

impl Known {
    /// What is at `path`; a link at its end is not followed.
    pub(super) fn stat(&mut self, path: &[u8]) -> nix::Result<FileStat> {
        if let Some(known) = self.found.get(path) {
            return *known;
        }
        let stat = stat_of(path);
        self.found.insert(path.to_vec(), stat);
        stat
    }

    /// The build-id of a file, empty if it has none.
    pub(super) fn build_id(&mut self, fd: &DrainedFd) -> Result<Vec<u32>> {
        let inode = (fd.probe.stat.st_dev, fd.probe.stat.st_ino);
        Ok(match self.build_ids.entry(inode) {
            Entry::Occupied(known) => known.get().clone(),
            Entry::Vacant(unknown) => unknown.insert(dump_build_id(fd, &mut self.leases)?).clone(),
        })
    }
}
