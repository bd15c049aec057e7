//! Where a task acts that has files of namespaces it is not in.

use std::os::fd::BorrowedFd;

use nix::sched::CloneFlags;

use super::FilesTask;
use crate::{error::Result, ns::enter::here};

impl<'a> FilesTask<'a> {
    /// The namespace of a kind, of which there are several, with this number in images.
    pub(in crate::files) fn space(&self, kind: u32, id: u32) -> Option<BorrowedFd<'a>> {
        self.shared.spaces().get(CloneFlags::from_bits_retain(kind.cast_signed()), id)
    }

    /// Acts in network namespace `id`, as a socket stays in the one it was made in.
    pub(in crate::files) fn in_network<T>(
        &mut self,
        id: Option<u32>,
        act: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        let other = id.filter(|id| Some(*id) != self.network);
        match other.and_then(|id| self.shared.spaces().get(CloneFlags::CLONE_NEWNET, id)) {
            Some(space) => here(space, CloneFlags::CLONE_NEWNET, || act(self)),
            None => act(self),
        }
    }
}
