//! io_uring instances with nothing on their way.
//!
//! Kernel and program share a ring's memory, and each side's place in it. The kernel keeps places of its own besides,
//! which no call sets: they move as it takes requests and gives events. So a ring is made anew and has as many requests
//! that do nothing (`IORING_OP_NOP`) behind it as the old one had of any kind; then the memory is put back, with events
//! that nobody has taken and requests that were not submitted.
//!
//! ```text
//! dump     ask.rs   what it is, and that nothing is registered with it or on its way
//!          shape.rs how its memory is laid out
//! restore  make.rs  in the engine, which may make one whatever the rights of the task are
//! ```
//!
//! Mappings speak of a ring by its number, as a descriptor does: see [`rings`](crate::dump).

mod ask;
mod make;
mod shape;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    os::fd::{AsFd, OwnedFd},
};

use rcriu_images::pb;

use super::{DrainedFd, FdProbe, FdType, FileKind, FilesOut, FilesTask, PlanFiles, RestoredFile, pipe};
use crate::{
    error::{Error, Result},
    options::RestoreOptions,
    pstree::FileId,
    sys::uring::{CQE32, NO_SQARRAY, SQE128, Shape},
};

/// Requests that a restore repeats at most: ten million take about a second.
const MOST: u32 = 100_000_000;
/// Limits of the kernel.
const MOST_REQUESTS: u32 = 32_768;
const MOST_EVENTS: u32 = 2 * MOST_REQUESTS;

/// The kind.
#[derive(Debug)]
pub(super) struct Uring;

/// Rings that a dump has met, by inode, with the bytes of their requests.
#[derive(Debug, Default)]
pub(super) struct UringsOut(HashMap<u64, Option<(FileId, u64)>>);

impl UringsOut {
    /// `None` also if several have the same inode: before Linux 5.12 all have.
    pub(super) fn of(&self, ino: u64) -> Option<(FileId, u64)> {
        *self.0.get(&ino)?
    }

    fn met(&mut self, ino: u64, id: FileId, requests: u64) {
        self.0.entry(ino).and_modify(|known| *known = None).or_insert(Some((id, requests)));
    }
}

impl FileKind for Uring {
    fn fd_type(&self) -> FdType {
        FdType::RcriuUring
    }

    fn claims(&self, fd: &FdProbe) -> bool {
        fd.anonymous("[io_uring]")
    }

    fn dump(&self, fd: &DrainedFd, id: FileId, out: &mut FilesOut<'_>) -> Result<pb::FileEntry> {
        if fd.fown.pid != 0 || fd.fown.signum != 0 {
            return Err(Error::unsupported(
                "an io_uring with an owner of signals (F_SETOWN) cannot be dumped",
            )
            .remedy("close it before the dump"));
        }
        let uring = pb::RcriuUring { id: id.0, flags: fd.probe.info.flags, ..ask::all(fd.file.as_fd())? };
        out.urings.met(fd.probe.stat.st_ino, id, shape(&uring).requests());
        Ok(pb::FileEntry {
            r#type: FdType::RcriuUring as i32,
            id: id.0,
            uring: Some(uring.into()),
            ..Default::default()
        })
    }

    fn collect(&self, entry: &pb::FileEntry, _: &mut PlanFiles<'_>) -> Result<Box<dyn RestoredFile>> {
        let uring = entry.uring.as_deref().cloned();
        let uring = uring.ok_or_else(|| Error::image("files.img: an io_uring's entry without the ring"))?;
        check(&uring)?;
        Ok(Box::new(UringFile(uring)))
    }
}

fn shape(entry: &pb::RcriuUring) -> Shape {
    Shape { sq_entries: entry.sq_entries, cq_entries: entry.cq_entries, flags: entry.setup }
}

/// Requests that gave no event.
fn silent(entry: &pb::RcriuUring) -> u32 {
    entry.taken.wrapping_sub(entry.given)
}

/// What no dump writes.
fn check(entry: &pb::RcriuUring) -> Result<()> {
    let bad = |what: &str| Err(Error::image(format!("files.img: an io_uring {what}")));
    if entry.setup & !(SQE128 | CQE32 | NO_SQARRAY) != 0 {
        return bad(&format!("with the unknown flags {:#x}", entry.setup));
    }
    let fits = |entries: u32, most: u32| entries.is_power_of_two() && entries <= most;
    if !fits(entry.sq_entries, MOST_REQUESTS)
        || !fits(entry.cq_entries, MOST_EVENTS)
        || entry.cq_entries < entry.sq_entries
    {
        return bad(&format!("of {} requests and {} events", entry.sq_entries, entry.cq_entries));
    }
    if entry.taken > MOST || silent(entry) > entry.taken {
        return bad(&format!("that has taken {} requests and given {} events", entry.taken, entry.given));
    }
    Ok(())
}

/// A ring to be restored.
#[derive(Debug)]
struct UringFile(pb::RcriuUring);

impl RestoredFile for UringFile {
    fn name(&self) -> String {
        format!("io_uring {:#x}", self.0.id)
    }

    /// Tasks that have it mapped need it too, whether they have a descriptor or not.
    fn is_given(&self, _: &RestoreOptions) -> bool {
        true
    }

    fn give(&self, _: Option<OwnedFd>) -> Result<OwnedFd> {
        make::ring(&self.0)
    }

    fn open(&self, cx: &mut FilesTask<'_>) -> Result<OwnedFd> {
        let made = cx.given(FileId(self.0.id))?;
        let made = made.ok_or_else(|| Error::bug("an io_uring that nobody made"))?;
        pipe::set_flags(&made, self.0.flags.cast_signed())?;
        Ok(made)
    }

    fn has_finish(&self) -> bool {
        false
    }
}
