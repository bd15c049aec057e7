//! Reading pages of one task from outside.
//!
//! process_vm_readv(2) pins pages, and since Linux 5.19 pinning gives the task its own copy of a page that it
//! shares with parent or child since a fork. Those go through `/proc/PID/mem`, which copies each page twice.

use nix::sys::uio::RemoteIoVec;
use rcriu_images::pagemap::PAGE_SIZE;

use super::copier::{Piece, Road};
use crate::{
    error::{Error, Result},
    mm::pagemap::Words,
    procfs::ProcDir,
    pstree::RealPid,
    sys::vm::{self, MemFile},
};

/// Bytes from which on it is worth asking who else maps a page.
const WORTH_ASKING: u64 = 16 * PAGE_SIZE;

/// The memory of a task, seen from outside.
#[derive(Debug)]
pub struct Source {
    tid: RealPid,
    words: Words,
    mem: Option<MemFile>,
}

impl Source {
    /// Of the live thread whose folder `dir` is.
    pub fn new(dir: &ProcDir) -> Result<Self> {
        Ok(Source { tid: dir.pid(), words: Words::open(dir)?, mem: None })
    }

    /// Reads consecutive memory, whatever its protection; the task stands still.
    pub fn read_all(&mut self, start: u64, buf: &mut [u8]) -> Result<()> {
        let len = buf.len() as u64;
        if len < WORTH_ASKING {
            return self.memory()?.read(start, buf);
        }
        let mut parts = Vec::new();
        self.roads(&Piece { start, len, lazy: false, skip_zero: false, road: Road::Own }, &mut parts)?;
        let mut rest = buf;
        for part in parts {
            let (this, others) = rest.split_at_mut(part.len as usize);
            // What it may not read itself process_vm_readv(2) does not either.
            if part.road == Road::Mem || vm::read(self.tid, part.start, this).is_err() {
                self.memory()?.read(part.start, this)?;
            }
            rest = others;
        }
        Ok(())
    }

    /// Appends what `piece` consists of, each part with the road on which it can be read.
    pub(super) fn roads(&mut self, piece: &Piece, parts: &mut Vec<Piece>) -> Result<()> {
        self.words.sharing(piece.start, piece.start + piece.len, |start, end, exclusive| {
            let road = if exclusive { Road::Read } else { Road::Mem };
            parts.push(Piece { start, len: end - start, road, ..*piece });
            Ok(())
        })
    }

    /// Reads pieces of one road, one after the other.
    pub(super) fn read(&mut self, group: &[Piece], buf: &mut [u8]) -> Result<()> {
        if group.first().is_some_and(|piece| piece.road == Road::Read) {
            return read_pieces(self.tid, group, buf);
        }
        let mut rest = buf;
        for piece in group {
            let (this, others) = rest.split_at_mut(piece.len as usize);
            self.memory()?.read(piece.start, this).map_err(|e| unreadable(piece.start, piece.len, e))?;
            rest = others;
        }
        Ok(())
    }

    /// Its memory as a file.
    pub(super) fn memory(&mut self) -> Result<&mut MemFile> {
        Ok(match &mut self.mem {
            Some(mem) => mem,
            none => none.insert(MemFile::open(self.tid)?),
        })
    }
}

fn read_pieces(tid: RealPid, pieces: &[Piece], buf: &mut [u8]) -> Result<()> {
    let remote: Vec<_> =
        pieces.iter().map(|p| RemoteIoVec { base: p.start as usize, len: p.len as usize }).collect();
    let got = vm::read_pieces(tid, &remote, buf)? as u64;
    if got == buf.len() as u64 {
        return Ok(());
    }
    let piece = ends_in(pieces.iter().map(|p| p.len), got).and_then(|at| pieces.get(at));
    let error = Error::sys("process_vm_readv", libc::EFAULT);
    Err(piece.map_or(error.clone(), |p| unreadable(p.start, p.len, error)))
}

/// Which of consecutive pieces of these lengths has the byte that `got` bytes end before.
pub(super) fn ends_in(mut lengths: impl Iterator<Item = u64>, got: u64) -> Option<usize> {
    let mut before = 0;
    lengths.position(|len| {
        before += len;
        before > got
    })
}

pub(super) fn unreadable(start: u64, len: u64, e: Error) -> Error {
    e.during(format!("content of {start:x}-{:x}", start + len))
        .remedy("guard pages of madvise need Linux 6.15 or later to be recognised")
}
