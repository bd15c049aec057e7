//! What the engine does in the ipc namespaces of a restored tree.

use nix::sched::CloneFlags;
use rcriu_images::ImageDir;

use super::home::Home;
use crate::{
    error::Result,
    files::FilesShared,
    ns::{
        enter::{here, inside},
        ipc::Ipc,
    },
    pstree::RealPid,
};

impl Home {
    /// All tasks have attached their segments of System V shared memory: those settings follow that would have been in the
    /// way. `root` is the root task.
    pub fn attached(&self, root: RealPid, files: &FilesShared) -> Result<()> {
        self.each_ipc(root, files, Ipc::attached)
    }

    /// Fills them, where root of the tree's user namespace may not. He waits, and has his maps.
    pub(super) fn limits(&self, root: RealPid, files: &FilesShared, images: &ImageDir) -> Result<()> {
        let Some(user) = &self.user else { return Ok(()) };
        self.each_ipc(root, files, |ipc| ipc.restore_from_outside(images, user))
    }

    fn each_ipc(
        &self,
        root: RealPid,
        files: &FilesShared,
        act: impl Fn(&Ipc) -> Result<()> + Sync,
    ) -> Result<()> {
        let kind = CloneFlags::CLONE_NEWIPC;
        self.ipc.each().try_for_each(|(id, ipc)| match files.spaces().get(kind, id) {
            Some(space) => here(space, kind, || act(ipc)),
            None => inside(root, kind, || act(ipc)),
        })
    }
}
