//! Packing blocks, from bytes or straight from memory.

use std::{fmt, sync::Arc};

use super::{BLOCK, Memory, Piece, Run, Unread, is_zero};
use crate::pagemap::PAGE_SIZE;

const PAGE: usize = PAGE_SIZE as usize;

/// What is to be packed.
pub(super) enum Work {
    /// Whole pages.
    Bytes(Vec<u8>),
    /// Pages to be read first.
    Memory(Arc<dyn Memory>, Vec<Piece>),
}

impl fmt::Debug for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Work::Bytes(bytes) => write!(f, "{} bytes", bytes.len()),
            Work::Memory(_, pieces) => write!(f, "{pieces:x?}"),
        }
    }
}

/// Blocks after packing.
#[derive(Debug, Default)]
pub(super) struct Done {
    /// One block after the other, as they go to the file.
    pub packed: Vec<u8>,
    /// Bytes that each takes, and its pages. See `rcriu_blocks_entry.length`.
    pub blocks: Vec<(u32, u32)>,
    /// Where memory was read: which pages were not left out.
    pub runs: Option<Vec<Run>>,
    pub unread: Option<Unread>,
    /// To be used again.
    pub raw: Vec<u8>,
}

pub(super) struct Packer {
    zstd: zstd::bulk::Compressor<'static>,
    /// Pages that were read: small enough to stay in the cache of a processor until they are packed.
    read: Vec<u8>,
    /// A block after packing.
    out: Vec<u8>,
}

impl Packer {
    pub fn new(level: i32) -> std::io::Result<Self> {
        let mut zstd = zstd::bulk::Compressor::new(level)?;
        // Sums are made of the files, if they are wanted; lengths are in the index.
        zstd.include_checksum(false)?;
        Ok(Self { zstd, read: Vec::new(), out: vec![0; BLOCK] })
    }

    /// Packs what `work` has in blocks, the last of which may be shorter, into the empty `packed`.
    pub fn pack(&mut self, work: Work, packed: Vec<u8>) -> Done {
        let mut done = Done { packed, ..Done::default() };
        match work {
            Work::Bytes(raw) => {
                raw.chunks(BLOCK).for_each(|block| self.block(block, &mut done));
                done.raw = raw;
            }
            Work::Memory(memory, pieces) => {
                let mut runs = Vec::new();
                done.unread = self.memory(&*memory, &pieces, &mut runs, &mut done).err();
                done.runs = Some(runs);
            }
        }
        done
    }

    /// Reads a block's worth at a time. Pages that are left out make room for others.
    fn memory(
        &mut self,
        memory: &dyn Memory,
        pieces: &[Piece],
        runs: &mut Vec<Run>,
        done: &mut Done,
    ) -> Result<(), Unread> {
        let mut read = std::mem::take(&mut self.read);
        read.resize(2 * BLOCK, 0);
        let (mut have, mut rest) = (0, pieces.to_vec());
        while !rest.is_empty() {
            let now = take(&mut rest, BLOCK);
            let len: usize = now.iter().map(|piece| piece.len as usize).sum();
            memory.read(&now, &mut read[have..have + len])?;
            let mut at = have;
            for piece in &now {
                have = keep(piece, &mut read, &mut at, have, runs);
            }
            if have >= BLOCK {
                self.block(&read[..BLOCK], done);
                read.copy_within(BLOCK..have, 0);
                have -= BLOCK;
            }
        }
        if have > 0 {
            self.block(&read[..have], done);
        }
        self.read = read;
        Ok(())
    }

    fn block(&mut self, block: &[u8], done: &mut Done) {
        let pages = (block.len() / PAGE) as u32;
        if is_zero(block) {
            return done.blocks.push((0, pages));
        }
        // Less than a sixteenth is not worth the unpacking; no room is an error.
        let room = block.len() - block.len() / 16;
        let bytes = match self.zstd.compress_to_buffer(block, &mut self.out[..room]) {
            Ok(len) => &self.out[..len],
            Err(_) => block,
        };
        done.packed.extend_from_slice(bytes);
        done.blocks.push((bytes.len() as u32, pages));
    }
}

/// Takes pieces of `most` bytes in all.
fn take(rest: &mut Vec<Piece>, most: usize) -> Vec<Piece> {
    let (mut room, mut now, mut whole) = (most as u64, Vec::new(), 0);
    for piece in rest.iter_mut() {
        let len = piece.len.min(room);
        if len == 0 {
            break;
        }
        now.push(Piece { len, ..*piece });
        (piece.start, piece.len, room) = (piece.start + len, piece.len - len, room - len);
        whole += usize::from(piece.len == 0);
    }
    rest.drain(..whole);
    now
}

/// Moves the pages of `piece`, which stand at `at`, to `have`, but for those that are left out.
fn keep(piece: &Piece, read: &mut [u8], at: &mut usize, mut have: usize, runs: &mut Vec<Run>) -> usize {
    for vaddr in (piece.start..piece.start + piece.len).step_by(PAGE) {
        let page = *at..*at + PAGE;
        *at = page.end;
        if piece.skip_zero && is_zero(&read[page.clone()]) {
            continue;
        }
        if page.start != have {
            read.copy_within(page, have);
        }
        have += PAGE;
        match runs.last_mut() {
            Some(run) if run.vaddr + run.pages * PAGE_SIZE == vaddr && run.lazy == piece.lazy => {
                run.pages += 1
            }
            _ => runs.push(Run { vaddr, pages: 1, lazy: piece.lazy }),
        }
    }
    have
}
