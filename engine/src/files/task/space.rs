//! Where a task acts that has files of namespaces it is not in.

use nix::sched::CloneFlags;

use super::FilesTask;
use crate::{error::Result, files::Spaces, ns::enter::here};

impl<'a> FilesTask<'a> {
    /// Namespaces of which there are several of a kind.
    pub(in crate::files) fn spaces(&self) -> &'a Spaces {
        self.shared.spaces()
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
