//! Large reads: many pages of a file, or of compressed blocks, into memory that has no content yet.
//!
//! What is read at once is cut into units, which several threads take in turn:
//!
//! ```text
//! file    |<- unit 0 ->|<- unit 1 ->|<- unit 2 ->| ...      one after the other
//! memory   huge pages where blocks are full, then preadv(2)
//! ahead                              what is not in the page cache is asked for early
//! ```
//!
//! Threads live only while a batch is read, and only in a task while no other process of the tree forks: the
//! numbers that the kernel gives them might be those that others are to get. Where several tasks are made at the
//! same time they read at the same time anyway.

use std::{
    collections::VecDeque,
    fs::File,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use nix::{
    fcntl::{PosixFadviseAdvice, posix_fadvise},
    unistd::gettid,
};

use rcriu_images::pagemap::Stored;

use super::huge::Huge;
use crate::{
    error::Result,
    interrupt,
    mm::stored::Unpacking,
    sys::{
        cached,
        map::{MAX_PIECES, Region},
        sched,
    },
};

/// Bytes of a unit at most.
pub const UNIT: u64 = 16 << 20;
/// Threads at most, the calling one among them: more than a few do not read faster from memory.
const THREADS: usize = 4;
/// Bytes that get memory and content at a time: what is read is still in the cache of the processor.
const STRETCH: u64 = 1 << 20;
/// Bytes from which on a piece is read so.
const LONG: u64 = 128 << 10;
/// `MADV_POPULATE_WRITE` (Linux 5.14).
pub const MADV_POPULATE_WRITE: i32 = 23;
/// Units asked for ahead of each thread.
const AHEAD: usize = 2;

/// How the memory of a task is read.
#[derive(Debug)]
pub struct Bulk {
    /// Threads that read, the calling one among them.
    threads: usize,
    /// Whether and where huge pages are taken.
    pub huge: Huge,
}

impl Bulk {
    /// One thread, no huge pages.
    #[cfg(test)]
    pub fn plain() -> Bulk {
        Bulk { threads: 1, huge: Huge::never() }
    }

    /// Huge pages as `huge` says. Where the caller is `alone` in making processes, as many threads as there are
    /// processors for it.
    pub fn new(huge: Huge, alone: bool) -> Bulk {
        let processors = || thread::available_parallelism().map_or(1, |n| n.get().min(THREADS));
        Bulk { threads: if alone { processors() } else { 1 }, huge }
    }

    /// Reads from `stored` at `offset` into `pieces` (address and length) of `region`, one after the other;
    /// `blocks` are ranges that get huge pages. Gives the number of bytes; fewer than asked for mean that the
    /// file ends.
    pub fn read(
        &self,
        region: &Region,
        stored: &Stored,
        offset: u64,
        pieces: &[(u64, u64)],
        blocks: &Blocks,
    ) -> Result<u64> {
        let units = units(offset, pieces);
        let (next, total) = (AtomicUsize::new(0), Mutex::new(Ok(0)));
        let helpers = Mutex::new(Vec::new());
        let threads = self.threads.min(units.len());
        let work = || {
            while let Some(unit) = units.get(next.fetch_add(1, Ordering::Relaxed)) {
                let ahead = units.get(next.load(Ordering::Relaxed)..).unwrap_or_default();
                let read = self.unit(region, stored, unit, ahead, blocks);
                let stop = read.as_ref().map_or(true, |n| *n < unit.len);
                let mut total = total.lock().unwrap_or_else(PoisonError::into_inner);
                match (&mut *total, read) {
                    (Ok(total), Ok(n)) => *total += n,
                    (total @ Ok(_), Err(e)) => *total = Err(e),
                    (Err(_), _) => {}
                }
                if stop {
                    next.store(units.len(), Ordering::Relaxed);
                }
            }
        };
        let help = || {
            helpers.lock().unwrap_or_else(PoisonError::into_inner).push(gettid());
            work();
        };
        thread::scope(|scope| {
            for _ in 1..threads {
                // No room for another process or thread: those that there are do it.
                if thread::Builder::new().spawn_scoped(scope, help).is_err() {
                    break;
                }
            }
            work();
        });
        // One that was waited for may still be on its way out, and have its number.
        for tid in helpers.into_inner().unwrap_or_else(PoisonError::into_inner) {
            while sched::has_thread(tid) {
                thread::yield_now();
            }
        }
        total.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    fn unit(
        &self,
        region: &Region,
        stored: &Stored,
        unit: &Unit,
        ahead: &[Unit],
        blocks: &Blocks,
    ) -> Result<u64> {
        interrupt::check()?;
        if let Stored::Plain(file) = stored
            && !cached::has(file, unit.offset + unit.len - 1)?
        {
            for unit in std::iter::once(unit).chain(ahead.iter().take(AHEAD * self.threads)) {
                let (offset, len) = (unit.offset.cast_signed(), unit.len.cast_signed());
                // Only advice: without it the same is read, later.
                let _ = posix_fadvise(file, offset, len, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
            }
        }
        let mut small = Vec::new();
        for &(at, len) in &unit.pieces {
            let mut from = at;
            for (start, end) in blocks.starting_in(at, at + len) {
                let taken = self.huge.take(region, start, end);
                if taken > start {
                    small.push((from, start.max(from)));
                    from = taken;
                }
            }
            small.push((from, at + len));
        }
        self::read(region, stored, unit, &small)
    }
}

/// What a thread reads from.
enum From<'a> {
    File(&'a File),
    Packed(Unpacking<'a>),
}

/// Reads a unit; `small` are the ranges of it that have no memory yet. Where they are long they get it a stretch at
/// a time: that takes half as long as a fault for each page.
fn read(region: &Region, stored: &Stored, unit: &Unit, small: &[(u64, u64)]) -> Result<u64> {
    let mut small = small.iter().filter(|range| range.0 < range.1).peekable();
    let mut done = 0;
    let mut gathered: Vec<(u64, u64)> = Vec::new();
    let mut from = match stored {
        Stored::Plain(file) => From::File(file),
        Stored::Packed(packed) => From::Packed(Unpacking::new(packed)?),
    };
    let mut next = |pieces: &[(u64, u64)]| -> Result<bool> {
        let offset = unit.offset + done;
        let n = match &mut from {
            From::File(file) => region.read_file(file, offset, pieces)?,
            From::Packed(unpacking) => unpacking.read(region, offset, pieces)?,
        };
        done += n;
        Ok(n == pieces.iter().map(|piece| piece.1).sum::<u64>())
    };
    for &(at, len) in &unit.pieces {
        if len < LONG {
            gathered.push((at, len));
            continue;
        }
        if !next(&gathered)? {
            return Ok(done);
        }
        gathered.clear();
        let end = at + len;
        for at in (at..end).step_by(STRETCH as usize) {
            let end = end.min(at + STRETCH);
            while small.next_if(|range| range.1 <= at).is_some() {}
            if let Some(range) = small.peek().filter(|range| range.0 < end) {
                let (start, end) = (range.0.max(at), range.1.min(end));
                // A kernel that does not know this takes a fault for each page.
                let _ = region.advise(start, end - start, MADV_POPULATE_WRITE);
            }
            if !next(&[(at, end - at)])? {
                return Ok(done);
            }
        }
    }
    next(&gathered)?;
    Ok(done)
}

/// What one thread reads at a time.
#[derive(Debug, Default, PartialEq, Eq)]
struct Unit {
    offset: u64,
    len: u64,
    pieces: Vec<(u64, u64)>,
}

/// Cuts pieces into units. Long pieces are cut where a block of memory begins.
fn units(mut offset: u64, pieces: &[(u64, u64)]) -> Vec<Unit> {
    let mut units: Vec<Unit> = Vec::new();
    let mut left: VecDeque<(u64, u64)> = pieces.iter().copied().collect();
    while let Some((at, len)) = left.pop_front() {
        let part = len.min(UNIT - at % UNIT);
        if part < len {
            left.push_front((at + part, len - part));
        }
        match units.last_mut() {
            Some(unit) if unit.len + part <= UNIT && unit.pieces.len() < MAX_PIECES => {
                unit.pieces.push((at, part));
                unit.len += part;
            }
            _ => units.push(Unit { offset, len: part, pieces: vec![(at, part)] }),
        }
        offset += part;
    }
    units
}

/// Blocks of a mapping that are full in the images, by their addresses, in order.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Blocks(Vec<(u64, u64)>);

impl Blocks {
    /// All blocks of `size` bytes, a power of two, inside `ranges`, which ascend; ranges that touch are one.
    pub fn inside(ranges: impl Iterator<Item = (u64, u64)>, size: u64) -> Blocks {
        let mut blocks: Vec<(u64, u64)> = Vec::new();
        let mut add = |start: u64, end: u64| {
            let (start, end) = (start.next_multiple_of(size), end - end % size);
            if start < end {
                blocks.push((start, end));
            }
        };
        let mut open = (0, 0);
        for (start, end) in ranges {
            if start == open.1 {
                open.1 = end;
            } else {
                add(open.0, open.1);
                open = (start, end);
            }
        }
        add(open.0, open.1);
        Blocks(blocks)
    }

    /// Those that start in `[from, to)`: in one range for each that they were made of.
    fn starting_in(&self, from: u64, to: u64) -> impl Iterator<Item = (u64, u64)> {
        let first = self.0.partition_point(|b| b.1 <= from);
        let here = self.0[first..].iter().take_while(move |b| b.0 < to);
        here.filter_map(move |&(start, end)| {
            let start = start.max(from.next_multiple_of(super::huge::SIZE));
            let end = end.min(to.next_multiple_of(super::huge::SIZE));
            (start < end && start < to).then_some((start, end))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1 << 20;

    #[test]
    fn units_are_cut_at_blocks() {
        let pieces = [(3 * MB, 30 * MB), (100 * MB, 4096), (200 * MB, MB)];
        let units = units(7, &pieces);
        let seen: Vec<_> = units.iter().map(|u| (u.offset - 7, u.len, u.pieces.len())).collect();
        assert_eq!(seen, [(0, 13 * MB, 1), (13 * MB, 16 * MB, 1), (29 * MB, 2 * MB + 4096, 3)]);
        assert_eq!(units[1].pieces, [(16 * MB, 16 * MB)]);
        assert_eq!(units[2].pieces, [(32 * MB, MB), (100 * MB, 4096), (200 * MB, MB)]);
        let many: Vec<(u64, u64)> = (0..MAX_PIECES as u64 + 1).map(|n| (n * 8192, 4096)).collect();
        assert_eq!(super::units(0, &many).len(), 2);
    }

    #[test]
    fn blocks_are_full() {
        let ranges = [(MB, 3 * MB), (3 * MB, 5 * MB), (6 * MB, 9 * MB), (10 * MB, 12 * MB)];
        let blocks = Blocks::inside(ranges.into_iter(), 2 * MB);
        assert_eq!(blocks.0, [(2 * MB, 4 * MB), (6 * MB, 8 * MB), (10 * MB, 12 * MB)]);
        let of = |from, to| blocks.starting_in(from, to).collect::<Vec<_>>();
        assert_eq!(of(0, 3 * MB), [(2 * MB, 4 * MB)]);
        assert_eq!(of(3 * MB, 6 * MB), []);
        assert_eq!(of(6 * MB, 64 * MB), [(6 * MB, 8 * MB), (10 * MB, 12 * MB)]);
        assert_eq!(of(11 * MB, 64 * MB), []);
    }

    #[test]
    fn threads_read_what_one_reads() {
        use std::os::unix::fs::FileExt;
        let file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..(3 * UNIT + 4096) / 4).flat_map(|n: u64| (n as u32).to_ne_bytes()).collect();
        file.write_all_at(&bytes, 0).unwrap();
        let at = 0x1700_0010_0000;
        let anon = crate::sys::map::Mapping {
            prot: super::super::READ_WRITE,
            flags: (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u32,
            file: None,
        };
        let len = bytes.len() as u64;
        let stored = Stored::Plain(file);
        let region = Region::map(at, len, anon).unwrap();
        let blocks = Blocks::inside(std::iter::once((at, at + len)), super::super::huge::SIZE);
        let bulk = Bulk { threads: 3, huge: Huge::as_allowed() };
        let read = bulk.read(&region, &stored, 0, &[(at, len)], &blocks).unwrap();
        assert_eq!(read, len);
        let mut seen = vec![0; bytes.len()];
        region.read(at, &mut seen).unwrap();
        assert!(seen == bytes);
        // A file that ends early is told, not filled up.
        let short = bulk.read(&region, &stored, 4096, &[(at, len)], &blocks).unwrap();
        assert!(short < len);
        region.unmap().unwrap();
    }
}
