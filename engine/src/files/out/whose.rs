//! What belongs to namespaces of the tree's own.

use std::os::fd::BorrowedFd;

use nix::{
    sched::CloneFlags,
    sys::stat::{fstat, stat},
};

use super::{FdProbe, FilesOut};
use crate::{
    error::{Error, Result, SysContext},
    netlock::Whole,
    ns::net,
    pstree::FileId,
    sys::sockopt,
};

impl FilesOut<'_> {
    /// Notes a device tun or tap of network namespace `id` that a task has open.
    pub(in crate::files) fn tun(&mut self, id: u32, device: net::Tun) {
        if !self.tuns.contains(&(id, device.clone())) {
            self.tuns.push((id, device));
        }
    }

    /// Devices tun and tap of network namespace `id` that tasks have open.
    pub fn tuns(&self, id: u32) -> Vec<net::Tun> {
        self.tuns.iter().filter(|(of, _)| *of == id).map(|(_, device)| device.clone()).collect()
    }

    /// The tree's own network namespaces.
    pub fn networks(&self) -> &net::Networks {
        &self.networks
    }

    /// The lock of network namespace `id` of the tree's own.
    pub(crate) fn network_lock(&self, id: u32) -> Option<&Whole> {
        self.sockets.lock(id)
    }

    /// Number of the network namespace that a socket or an open file of tun belongs to, which stays the one it was made
    /// in, wherever its task goes; none if the tree has no network namespace of its own.
    ///
    /// # Errors
    /// A namespace that no task of the tree is in.
    pub(in crate::files) fn network_of(&self, file: BorrowedFd<'_>) -> Result<Option<u32>> {
        let theirs = match sockopt::network(file) {
            // Only who may do so can tell, and not before Linux 5.1 of tun.
            Err(e)
                if matches!(e.errno(), Some(libc::EPERM | libc::ENOTTY | libc::EINVAL))
                    && !self.networks.is_several() =>
            {
                return Ok(self.networks.first());
            }
            other => fstat(other?).call("fstat")?,
        };
        if self.networks.is_empty() {
            let ours = stat("/proc/thread-self/ns/net").call("stat(/proc/thread-self/ns/net)")?;
            if (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino) {
                return Ok(None);
            }
        } else if let Some(number) = self.networks.number_of(&theirs) {
            return Ok(Some(number));
        }
        let ino = theirs.st_ino;
        Err(Error::unsupported(format!("it is of another network namespace (net:[{ino}])"))
            .remedy("close it before the dump, or have a task of the tree be in that namespace"))
    }

    /// The number of the packet socket with inode `ino`, if it was met.
    pub fn packet_socket(&self, ino: u64) -> Option<FileId> {
        self.sockets.packet(ino)
    }

    /// The number of the io_uring with inode `ino`, if it was met, and how long the memory of its requests is.
    pub fn uring(&self, ino: u64) -> Option<(FileId, u64)> {
        self.urings.of(ino)
    }

    /// Numbers of pairs whose master a task has open.
    pub fn masters(&self) -> Vec<u32> {
        self.ttys.masters()
    }

    /// Number of the mount that a file of the tree's own mount namespace lies on.
    pub(in crate::files) fn own_mount(&self, probe: &FdProbe) -> Option<i32> {
        self.own_number(probe.info.mnt_id)
    }

    /// The same of a mount.
    pub(in crate::files) fn own_number(&self, mount: Option<i32>) -> Option<i32> {
        mount.filter(|_| self.own.contains(CloneFlags::CLONE_NEWNS))
    }
}
