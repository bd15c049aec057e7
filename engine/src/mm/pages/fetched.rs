//! Memory that is read by the threads that compress it, while the dump goes on.
//!
//! What they find out, which pages are zero, comes later; regions that were added meanwhile wait for that, as a
//! pagemap is in the order of addresses. The task must stand still until [`PagesOut::finish`].

use std::sync::Arc;

use nix::sys::uio::RemoteIoVec;
use rcriu_images::{
    packed::{Memory, PackedWriter, Piece, Run, Unread},
    pagemap::{Place, Region},
};

use super::{super::sink::Sink, PagesOut, copier, source};
use crate::{
    error::{Error, Kind, Result},
    pstree::RealPid,
    sys::vm,
};

/// What comes next in a pagemap.
#[derive(Debug)]
pub(super) enum Later {
    /// What the next job has found in the memory of this task.
    Job(RealPid),
    Region(Region),
}

/// Memory of a task that stands still.
struct OfTask(RealPid);

impl Memory for OfTask {
    fn read(&self, pieces: &[Piece], buf: &mut [u8]) -> std::result::Result<(), Unread> {
        let remote: Vec<_> =
            pieces.iter().map(|p| RemoteIoVec { base: p.start as usize, len: p.len as usize }).collect();
        let (got, errno) = match vm::read_pieces(self.0, &remote, buf) {
            Ok(got) if got == buf.len() => return Ok(()),
            Ok(got) => (got as u64, libc::EFAULT),
            Err(e) => (0, e.errno().unwrap_or(libc::ESRCH)),
        };
        let at = source::ends_in(pieces.iter().map(|p| p.len), got);
        Err(Unread { piece: pieces[at.unwrap_or(0)], errno })
    }
}

impl PagesOut {
    fn packed(&mut self) -> Option<&mut PackedWriter> {
        match &mut self.sink {
            Sink::Packed { pages, .. } => Some(pages),
            Sink::Files { .. } | Sink::Server { .. } => None,
        }
    }

    /// Whether so many bytes of memory should be fetched by those who compress them.
    pub(super) fn fetches(&mut self, bytes: u64) -> bool {
        self.packed().is_some_and(|pages| pages.fetches(bytes))
    }

    /// Has the pages fetched; addresses must ascend. The task stands still until this is finished.
    pub(super) fn fetch(&mut self, tid: RealPid, pieces: &[copier::Piece]) -> Result<()> {
        let Some(pages) = self.packed() else { return Err(Error::bug("pages are not compressed")) };
        let memory: Arc<dyn Memory> = Arc::new(OfTask(tid));
        let pieces: Vec<_> = pieces
            .iter()
            .map(|p| Piece { start: p.start, len: p.len, lazy: p.lazy, skip_zero: p.skip_zero })
            .collect();
        match pages.fetch(&memory, &pieces) {
            Ok(jobs) => {
                self.waiting.extend((0..jobs).map(|_| Later::Job(tid)));
                self.fetched()
            }
            Err(e) => Err(self.unread(tid, e.into())),
        }
    }

    /// What jobs have found so far goes to the pagemap.
    fn fetched(&mut self) -> Result<()> {
        let Some(pages) = self.packed() else { return Ok(()) };
        for runs in pages.fetched() {
            self.waiting.pop_front();
            for Run { vaddr, pages, lazy } in runs {
                self.written += pages;
                self.region_now(Region { vaddr, pages, place: Place::Present { first: 0 }, lazy })?;
            }
            while let Some(Later::Region(region)) = self.waiting.front() {
                let region = *region;
                self.waiting.pop_front();
                self.region_now(region)?;
            }
        }
        Ok(())
    }

    /// Waits for all jobs.
    pub(super) fn fetched_all(&mut self) -> Result<()> {
        let Some(Later::Job(tid)) = self.waiting.front() else { return Ok(()) };
        let tid = *tid;
        match self.packed().map_or(Ok(()), PackedWriter::drain) {
            Ok(()) => self.fetched(),
            Err(e) => Err(self.unread(tid, e.into())),
        }
    }

    /// The reason for an error, where memory could not be read.
    fn unread(&mut self, tid: RealPid, e: Error) -> Error {
        match self.packed().and_then(PackedWriter::unread) {
            None => e,
            Some(Unread { errno: libc::ESRCH, .. }) => Error::new(Kind::TaskDied(tid.0)),
            Some(Unread { piece, errno }) => {
                source::unreadable(piece.start, piece.len, Error::sys("process_vm_readv", errno))
            }
        }
    }
}
