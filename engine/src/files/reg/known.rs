//! What a dump has found out of files, for those that are open many times.

use std::{
    collections::{HashMap, hash_map::Entry},
    os::fd::AsRawFd,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    sys::stat::{FileStat, Mode},
};

use crate::{
    error::Result,
    files::{DrainedFd, Roots, build_id, lease::Leases},
};

/// Answers that hold for the whole dump: who was asked stands still, and nobody else is waited for.
#[derive(Debug)]
pub(in crate::files) struct Known {
    roots: Roots,
    /// What paths lead to, by namespace.
    found: Vec<HashMap<Vec<u8>, nix::Result<FileStat>>>,
    /// Build-ids by device and inode.
    build_ids: HashMap<(u64, u64), Vec<u32>>,
    leases: Leases,
}

impl Known {
    /// Of paths that begin at `roots`.
    pub(in crate::files) fn new(roots: Roots) -> Known {
        let found = roots.each().map(|_| HashMap::new()).collect();
        Known { roots, found, build_ids: HashMap::new(), leases: Leases::default() }
    }

    /// What is at `path` in the namespace of a mount; a link at its end is not followed.
    pub(super) fn stat(&mut self, path: &[u8], mount: Option<i32>) -> nix::Result<FileStat> {
        let stat = || self.roots.of_mount(mount).lstat(path);
        let Some(found) = self.found.get_mut(self.roots.position(mount)) else { return stat() };
        if let Some(known) = found.get(path) {
            return *known;
        }
        let stat = stat();
        found.insert(path.to_vec(), stat);
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

fn dump_build_id(fd: &DrainedFd, leases: &mut Leases) -> Result<Vec<u32>> {
    if fd.probe.stat.st_size < 5 {
        return Ok(Vec::new());
    }
    let found = if leases.on(fd)? {
        // Opened once more, its lease would be broken.
        match fd.probe.info.flags.cast_signed() & (libc::O_ACCMODE | libc::O_PATH | libc::O_DIRECT) {
            libc::O_RDONLY | libc::O_RDWR => {
                fd.file.try_clone().and_then(|file| build_id::of(&std::fs::File::from(file)))
            }
            _ => Ok(None),
        }
    } else {
        opened_again(fd).and_then(|file| build_id::of(&file))
    };
    let found = found.unwrap_or_else(|e| {
        log::warn!("no build-id of {}: {e}", fd.probe.link_text());
        None
    });
    Ok(found.unwrap_or_default())
}

/// Opened for reading, whatever it was opened for.
fn opened_again(fd: &DrainedFd) -> std::io::Result<std::fs::File> {
    // Not blocking: somebody may take a lease on the file at this moment.
    let path = format!("/proc/self/fd/{}", fd.file.as_raw_fd());
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOATIME | OFlag::O_CLOEXEC;
    let file = match open(path.as_str(), flags, Mode::empty()) {
        Err(Errno::EPERM) => open(path.as_str(), flags & !OFlag::O_NOATIME, Mode::empty()),
        other => other,
    };
    Ok(file?.into())
}
