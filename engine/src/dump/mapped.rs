//! Files and shared memory that a task has mapped.

use std::os::fd::OwnedFd;

use super::collect::Task;
use crate::{
    error::Result,
    files::{FilesOut, PathUse},
    mm::{shmem::SharedOut, sysv::SegmentsOut, vma::MappedFiles},
    pstree::{FileId, RealPid},
};

/// Gives mapped files their numbers.
pub(super) struct Mapped<'a, 'b> {
    pub task: RealPid,
    pub files: &'a mut FilesOut<'b>,
    pub shmem: &'a mut SharedOut,
    pub segments: &'a mut SegmentsOut,
    /// Number of the ipc namespace of the task.
    pub space: u32,
}

/// Number of the ipc namespace of a task.
pub(super) fn space(task: &Task) -> u32 {
    task.ids.ipc_ns_id.unwrap_or_default()
}

impl MappedFiles for Mapped<'_, '_> {
    fn mapped(&mut self, fd: OwnedFd) -> Result<FileId> {
        self.files.path_file(self.task, fd, PathUse::Mapping)
    }

    fn shared(&mut self, fd: OwnedFd, ino: u64) {
        self.shmem.add(fd, ino);
    }

    fn segment(&mut self, fd: OwnedFd, id: i32) {
        self.segments.add(fd, self.space, id);
    }
}
