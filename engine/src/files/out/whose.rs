//! What belongs to namespaces of the tree's own.

use super::*;

impl FilesOut<'_> {
    /// Notes a device tun or tap that a task has open.
    pub(in crate::files) fn tun(&mut self, device: net::Tun) {
        if !self.tuns.contains(&device) {
            self.tuns.push(device);
        }
    }

    /// Devices tun and tap that tasks have open.
    pub fn tuns(&self) -> &[net::Tun] {
        &self.tuns
    }

    /// The lock of the tree's own network namespace.
    pub(crate) fn network_lock(&self) -> Option<&Whole> {
        self.sockets.lock()
    }

    /// Number of the tree's own network namespace, for sockets.
    pub(in crate::files) fn own_network(&self) -> Option<u32> {
        let ids = self.namespaces.as_ref().filter(|_| self.own.contains(CloneFlags::CLONE_NEWNET))?;
        ids.net_ns_id
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
