//! Pages that go to the page file past the page cache, while the process writes others through it.
//!
//! ```text
//! batch        | pages of the process's own ->|<- pages copied here | next batch ...
//!                          |                              |
//!                      page cache                      buffers -> disk (direct, asynchronous)
//! page file    | ............................ | ................... | ...
//! ```
//!
//! Both go on at the same time: one processor copies into the page cache, which takes memory for every page of it;
//! the other copies into a few buffers that are used again and again, and the device fetches them from there. So
//! a dump is faster than either alone, needs less of the memory that other programs have their files in, and a part
//! of it is on the disk when it ends.
//!
//! Nobody is asked how fast the device is. A share of a batch goes there that is as large as the device had done by
//! the end of the batch before, and not larger than what is copied in the time that the process takes for its part:
//! a slow device gets next to nothing, a machine where memory is hard to get for the page cache gives it nearly all,
//! and one where it is at hand nothing.
//! What a restore from the same set then reads from the disk, it reads while it copies the rest from the page cache.

use std::{
    fs::File,
    time::{Duration, Instant},
};

use memmap2::MmapMut;
use rcriu_images::{pagemap::PAGE_SIZE, sums};

use super::{
    copier::{Piece, parts},
    is_zero,
    source::Source,
};
use crate::{
    error::Result,
    sys::direct::{self, Flight, Writes},
};

/// Bytes of a buffer, which one request writes.
const BUFFER: usize = 4 << 20;
/// Buffers at most, being filled or on their way.
const BUFFERS: usize = 10;
/// Bytes read at a time: they are looked at while they are in the cache of the processor.
const STEP: u64 = 512 << 10;
/// Bytes of a batch that are worth while, and with which it begins.
const LEAST: u64 = 1 << 20;
const FIRST: u64 = 4 << 20;
/// Bytes a second at which the page cache takes pages where its memory is at hand. No more is gained past it then
/// than a restore loses that has to read from the disk.
const QUICK: f64 = 2e9;
/// The same with sums: a restore reads from the disk twice then, as it compares everything before it makes anything.
const QUICK_SUMS: f64 = 0.7e9;
/// A page file that will be shorter goes through the page cache as a whole.
pub(super) const FROM: u64 = 64 << 20;

/// The way past the page cache into a page file.
#[derive(Debug)]
pub(super) struct Uncached {
    file: File,
    writes: Writes,
    free: Vec<MmapMut>,
    /// Buffers that were made.
    made: usize,
    /// Bytes of the next batch.
    share: u64,
    /// The device has nothing left to do: it may be waited for.
    keeps_up: bool,
    /// The file system, or the kernel, does not do it after all.
    refused: bool,
    /// Sums are made.
    sums: bool,
}

/// Pages in buffers that have no place in the file yet.
#[derive(Debug, Default)]
pub(super) struct Filled {
    buffers: Vec<(MmapMut, usize)>,
    /// Address, number, and whether they may be filled on demand.
    pub stored: Vec<(u64, u64, bool)>,
    /// Of each page, if sums are made.
    pub sums: Vec<u32>,
    took: Duration,
}

impl Filled {
    /// Bytes of all.
    pub fn len(&self) -> u64 {
        self.buffers.iter().map(|(_, len)| *len as u64).sum()
    }
}

impl Uncached {
    /// `None` where the file system or the kernel refuses. If `sums`, pages are summed up while they are at hand.
    pub fn open(file: &File, sums: bool) -> Option<Uncached> {
        let writes = direct::reopen(file, true).and_then(|file| Ok((file, Writes::new(BUFFERS)?)));
        match writes {
            Ok((file, writes)) => Some(Uncached {
                file,
                writes,
                free: Vec::new(),
                made: 0,
                share: FIRST,
                keeps_up: true,
                refused: false,
                sums,
            }),
            Err(e) => {
                log::debug!("All pages go through the page cache: {e}");
                None
            }
        }
    }

    /// How many bytes of a batch of `total` bytes are to be taken; `cached` is the same file.
    pub fn share(&mut self, cached: &File, total: u64) -> Result<u64> {
        self.landed(cached, false)?;
        let free = BUFFERS - self.made + self.free.len();
        let room = if self.keeps_up { u64::MAX } else { (free * BUFFER) as u64 };
        let share = self.share.min(room).min(total / 8 * 7) / PAGE_SIZE * PAGE_SIZE;
        Ok(if share < LEAST || self.refused { 0 } else { share })
    }

    /// Reads pieces into buffers.
    pub fn fill(&mut self, cached: &File, pieces: &[Piece], source: &mut Source) -> Result<Filled> {
        let start = Instant::now();
        let mut filled = Filled::default();
        let mut roads = Vec::new();
        pieces.iter().try_for_each(|piece| source.roads(piece, &mut roads))?;
        for group in roads.chunk_by(|a, b| a.road == b.road) {
            for batch in parts(group, STEP) {
                let len = batch.iter().map(|p| p.len).sum::<u64>() as usize;
                let last = match filled.buffers.pop() {
                    Some(last) if last.1 + len <= BUFFER => last,
                    full => {
                        filled.buffers.extend(full);
                        (self.buffer(cached)?, 0)
                    }
                };
                filled.buffers.push(last);
                let Some((buffer, end)) = filled.buffers.last_mut() else { continue };
                let bytes = &mut buffer[*end..*end + len];
                source.read(&batch, bytes)?;
                let kept = without_zeros(&batch, bytes, &mut filled.stored);
                if self.sums {
                    filled.sums.extend(bytes[..kept].chunks(PAGE_SIZE as usize).map(sums::sum));
                }
                *end += kept;
            }
        }
        filled.took = start.elapsed();
        Ok(filled)
    }

    /// One to be filled. If all are on their way, waits for one.
    fn buffer(&mut self, cached: &File) -> Result<MmapMut> {
        if self.free.is_empty() && self.made >= BUFFERS && self.writes.flying() > 0 {
            self.landed(cached, true)?;
        }
        match self.free.pop() {
            Some(buffer) => Ok(buffer),
            None => {
                self.made += 1;
                direct::buffer(BUFFER)
            }
        }
    }

    /// Sends `filled` on its way to `offset` of the file.
    ///
    /// Precondition: the file is that long and has the blocks.
    pub fn send(&mut self, cached: &File, filled: Filled, mut offset: u64) -> Result<()> {
        for (buffer, len) in filled.buffers {
            let flight = Flight { buffer, offset, len };
            offset += len as u64;
            if len == 0 {
                self.free.push(flight.buffer);
            } else if let Err(flight) = self.writes.start(&self.file, flight) {
                flight.write_to(cached)?;
                self.refused = true;
                self.free.push(flight.buffer);
            }
        }
        Ok(())
    }

    /// Chooses the share of the next batch after one of `total` bytes, for whose own part the process took `own`.
    /// `before` was on its way when the batch began.
    ///
    /// Precondition: what was filled has not been sent yet.
    pub fn judge(
        &mut self,
        cached: &File,
        filled: &Filled,
        total: u64,
        own: Duration,
        before: u64,
    ) -> Result<()> {
        self.landed(cached, false)?;
        let rate = |bytes: u64, took: Duration| bytes as f64 / took.as_secs_f64().max(1e-6);
        let len = filled.len();
        let there = rate(total.saturating_sub(len), own);
        let left = self.writes.flying();
        self.keeps_up = left == 0;
        if there >= if self.sums { QUICK_SUMS } else { QUICK } {
            self.share = 0;
            return Ok(());
        }
        if self.share < LEAST {
            self.share = FIRST;
        } else if self.keeps_up {
            self.share *= 2;
        } else if left > before / 2 {
            self.share -= self.share / 4;
        }
        if len > 0 {
            // As much as can be copied here while the process writes the rest; half of it, as what a restore has to
            // read from the disk costs it more than what it finds in the page cache. Where memory for the page cache
            // is hard to get, most goes to the disk all the same.
            let here = rate(len, filled.took) / 2.0;
            self.share = self.share.min((total as f64 * here / (here + there)) as u64);
        }
        self.share = self.share.clamp(LEAST, (BUFFER * BUFFERS) as u64);
        Ok(())
    }

    /// Bytes on their way.
    pub fn flying(&self) -> u64 {
        self.writes.flying()
    }

    /// Waits for all that is on its way.
    pub fn finish(&mut self, cached: &File) -> Result<()> {
        while self.writes.flying() > 0 {
            self.landed(cached, true)?;
        }
        Ok(())
    }

    /// Takes back the buffers of what is written. What the device, or the file system, would not take is written
    /// through the page cache: that says what is wrong, if anything is.
    fn landed(&mut self, cached: &File, wait: bool) -> Result<()> {
        for (flight, whole) in self.writes.done(wait)? {
            if !whole {
                log::debug!("{} bytes at {} go through the page cache", flight.len, flight.offset);
                flight.write_to(cached)?;
                self.refused = true;
            }
            self.free.push(flight.buffer);
        }
        Ok(())
    }
}

/// Moves pages together so that those full of zeros go, where they may be left out; gives the number of bytes.
fn without_zeros(batch: &[Piece], bytes: &mut [u8], stored: &mut Vec<(u64, u64, bool)>) -> usize {
    let page = PAGE_SIZE as usize;
    let (mut from, mut to) = (0, 0);
    for piece in batch {
        let end = from + piece.len as usize;
        let mut vaddr = piece.start;
        while from < end {
            let zero = |at: usize| piece.skip_zero && is_zero(&bytes[at..at + page]);
            let left_out = zero(from);
            let run = (from..end).step_by(page).take_while(|at| zero(*at) == left_out).count();
            if !left_out {
                if to < from {
                    bytes.copy_within(from..from + run * page, to);
                }
                to += run * page;
                stored.push((vaddr, run as u64, piece.lazy));
            }
            from += run * page;
            vaddr += run as u64 * PAGE_SIZE;
        }
    }
    to
}
