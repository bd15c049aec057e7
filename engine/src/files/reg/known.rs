//! What a dump has found out of files, for those that are open many times.

use std::{collections::HashMap, os::fd::AsRawFd};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    sys::stat::{FileStat, Mode},
};

use super::stat_of;
use crate::files::{DrainedFd, build_id};

/// Answers that hold for the whole dump: who was asked stands still, and nobody else is waited for.
#[derive(Debug, Default)]
pub(in crate::files) struct Known {
    /// What paths lead to.
    found: HashMap<Vec<u8>, nix::Result<FileStat>>,
    /// Build-ids by device and inode.
    build_ids: HashMap<(u64, u64), Vec<u32>>,
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
    pub(super) fn build_id(&mut self, fd: &DrainedFd) -> Vec<u32> {
        let inode = (fd.probe.stat.st_dev, fd.probe.stat.st_ino);
        self.build_ids.entry(inode).or_insert_with(|| dump_build_id(fd)).clone()
    }
}

fn dump_build_id(fd: &DrainedFd) -> Vec<u32> {
    if fd.probe.stat.st_size < 5 {
        return Vec::new();
    }
    // Not blocking: somebody may hold a lease on the file.
    let path = format!("/proc/self/fd/{}", fd.file.as_raw_fd());
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOATIME | OFlag::O_CLOEXEC;
    let file = match open(path.as_str(), flags, Mode::empty()) {
        Err(Errno::EPERM) => open(path.as_str(), flags & !OFlag::O_NOATIME, Mode::empty()),
        other => other,
    };
    let found = file
        .map_err(std::io::Error::from)
        .and_then(|file| build_id::of(&std::fs::File::from(file)))
        .unwrap_or_else(|e| {
            log::warn!("no build-id of {}: {e}", fd.probe.link_text());
            None
        });
    found.unwrap_or_default()
}
