//! Shared anonymous memory that is also a file: open as a descriptor through `/proc/PID/map_files`, or mapped as
//! private from there.
//!
//! Such memory must stay one object, so all that map it say that they map the file. Whether it is so is known
//! only when the last task has been looked at; then the mappings written before are corrected, which happens
//! to hardly any program.

use std::collections::BTreeMap;

use rcriu_images::{ImageKind, pb};

use super::{DumpCx, collect::Pstree, finish::one};
use crate::{
    error::{Context, Result},
    files::PathUse,
    mm::status as st,
    pstree::FileId,
};

/// Turns mappings of such memory into mappings of the file.
///
/// Precondition: all tasks are dumped, the content of shared memory is not.
pub(super) fn as_files(tree: &Pstree, cx: &mut DumpCx<'_>) -> Result<()> {
    let both: Vec<u64> = cx.shmem.inodes().filter(|ino| cx.files.is_open_memory(*ino)).collect();
    let mut files: BTreeMap<u64, FileId> = BTreeMap::new();
    for ino in both {
        let Some(file) = cx.shmem.take(ino) else { continue };
        let id = cx.files.path_file(tree.tasks[0].pid, file, PathUse::Mapping)?;
        log::info!("Shared anonymous memory {ino} is also a file, id {id}");
        files.insert(ino, id);
    }
    if files.is_empty() {
        return Ok(());
    }
    for task in tree.tasks.iter().filter(|t| t.state.is_alive()) {
        let id = task.virt.0.cast_unsigned().into();
        let mut mm: pb::MmEntry = cx.images.read_one(ImageKind::Mm, id)?;
        let mut changed = false;
        let plain = |v: &&mut pb::VmaEntry| v.status & (st::ANON_SHARED | st::SYSVIPC) == st::ANON_SHARED;
        for vma in mm.vmas.iter_mut().filter(plain) {
            let Some(file) = files.get(&vma.shmid) else { continue };
            vma.status = vma.status & !st::ANON_SHARED | st::FILE_SHARED | st::MEMFD;
            vma.flags &= !(libc::MAP_ANONYMOUS as u32);
            vma.shmid = file.0.into();
            changed = true;
        }
        if changed {
            one(cx.images, ImageKind::Mm, id, &mm).during(|| format!("task {}", task.pid))?;
        }
    }
    Ok(())
}
