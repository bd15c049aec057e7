//! Large reads: many pages of a file, or of compressed blocks, into memory that has no content yet.
//!
//! What is read at once is cut into units, which several threads take in turn:
//!
//! ```text
//! file     |<- unit ->|<- unit ->|<- unit ->|<- unit ->| ...     one after the other
//! cached                           huge pages where blocks are full, then preadv(2)
//! others   huge pages, then from the disk into them, past the page cache, some at a time for each thread
//! forced   as for a debugger, into small mappings that have their protections already
//! ```
//!
//! What is not in the page cache would take memory twice through it, and the disk would wait for the processor. So
//! each thread keeps a few requests on their way and copies from the page cache meanwhile. A small set is read through
//! the page cache in any case: the next restore of it finds it there.
//!
//! Threads live only while a batch is read, and only in a task while no other process of the tree forks: the
//! numbers that the kernel gives them might be those that others are to get. Where several tasks are made at the
//! same time they read at the same time anyway.

use std::{
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

use rcriu_images::pagemap::{PAGE_SIZE, Stored};

use super::{
    forced::force,
    huge::{self, Huge},
    units::{Blocks, Unit, units},
};
use crate::{
    error::Result,
    interrupt,
    mm::stored::Unpacking,
    sys::{
        cached,
        direct::{self, Reads},
        map::Region,
        sched,
    },
};

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
/// Bytes that are not in the page cache from which on they are not brought there.
const UNCACHED: u64 = 64 << 20;
/// Bytes of a direct read, and how many each thread has on their way.
const DIRECT: u64 = 2 * huge::SIZE;
const FLYING: usize = 4;

/// How the memory of a task is read.
#[derive(Debug)]
pub struct Bulk {
    /// Threads that read, the calling one among them.
    threads: usize,
    /// Whether and where huge pages are taken.
    pub huge: Huge,
    /// From how many bytes on what is not in the page cache is read past it.
    uncached: u64,
}

impl Bulk {
    /// One thread, no huge pages.
    #[cfg(test)]
    pub fn plain() -> Bulk {
        Bulk { threads: 1, huge: Huge::never(), uncached: UNCACHED }
    }

    /// Huge pages as `huge` says. Where the caller is `alone` in making processes, as many threads as there are
    /// processors for it.
    pub fn new(huge: Huge, alone: bool) -> Bulk {
        let processors = || thread::available_parallelism().map_or(1, |n| n.get().min(THREADS));
        Bulk { threads: if alone { processors() } else { 1 }, huge, uncached: UNCACHED }
    }

    /// Reads from `stored` at `offset` into `pieces` (address and length) of `region`, one after the other;
    /// `to` says what the memory is like. Gives the number of bytes; fewer than asked for mean that the file ends.
    pub fn read(
        &self,
        region: &Region,
        stored: &Stored,
        offset: u64,
        pieces: &[(u64, u64)],
        to: &To,
    ) -> Result<u64> {
        let units = units(offset, pieces);
        let Sorted { units, uncached, file } = match (stored, to) {
            (Stored::Plain(file), To::Writable(_)) => self.sorted(units, file),
            _ => Sorted { units, ..Sorted::default() },
        };
        let job = Job { region, stored, to, units: Queue::new(units), uncached: Queue::new(uncached), file };
        let total = Mutex::new(Ok(0));
        let helpers = Mutex::new(Vec::new());
        let threads = self.threads.min(job.units.all.len() + job.uncached.all.len());
        let work = || {
            let read = self.work(&job);
            if read.is_err() {
                job.stop();
            }
            let mut total = total.lock().unwrap_or_else(PoisonError::into_inner);
            match (&mut *total, read) {
                (Ok(total), Ok(n)) => *total += n,
                (total @ Ok(_), Err(e)) => *total = Err(e),
                (Err(_), _) => {}
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

    /// Tells units that are in the page cache from those that are better read past it, if there are so many.
    fn sorted(&self, units: Vec<Unit>, file: &File) -> Sorted {
        let mut sorted = Sorted::default();
        let mut left = 0;
        for mut unit in units.iter().cloned() {
            // Where pages stand at odd places, none is read so.
            let parts = match unit.offset % PAGE_SIZE {
                0 => cached::parts(file, unit.offset, unit.len, true).unwrap_or_default(),
                _ => Vec::new(),
            };
            for (at, len) in parts.into_iter().enumerate().filter(|(_, len)| *len > 0) {
                if at % 2 == 0 {
                    sorted.units.push(unit.cut(len));
                    continue;
                }
                left += len;
                let mut part = unit.cut(len);
                while part.len > 0 {
                    sorted.uncached.push(part.cut(part.until(DIRECT)));
                }
            }
            sorted.units.extend((unit.len > 0).then_some(unit));
        }
        if left >= self.uncached
            && let Ok(file) = direct::reopen(file, false)
        {
            return Sorted { file: Some(file), ..sorted };
        }
        Sorted { units, ..Sorted::default() }
    }

    /// What one thread does; gives the number of bytes.
    fn work(&self, job: &Job<'_>) -> Result<u64> {
        let mut total = 0;
        let mut reads = job.file.as_ref().and_then(|_| Reads::new(job.region, FLYING).ok());
        loop {
            interrupt::check()?;
            let flying = reads.as_ref().map_or(0, Reads::flying);
            if flying < FLYING
                && let Some((at, unit)) = job.uncached.next()
            {
                total += self.start(job, at, unit, reads.as_mut())?;
            } else if let Some((at, unit)) = job.units.next() {
                let n = self.unit(job, unit, job.units.all.get(at..).unwrap_or_default())?;
                total += n;
                if n < unit.len {
                    job.stop();
                }
            } else if flying == 0 {
                return Ok(total);
            }
            if let Some(reads) = &mut reads {
                let full = reads.flying() >= FLYING || job.uncached.is_empty();
                let wait = reads.flying() > 0 && full && job.units.is_empty();
                for (at, result) in reads.done(wait)? {
                    let Some(unit) = job.uncached.all.get(at as usize) else { continue };
                    total += if result == unit.len.cast_signed() { unit.len } else { job.again(unit)? };
                }
            }
        }
    }

    /// Has a unit come from the disk; bytes that are there already.
    fn start(&self, job: &Job<'_>, at: usize, unit: &Unit, reads: Option<&mut Reads<'_>>) -> Result<u64> {
        for (start, end) in self.small(job, unit) {
            // A kernel that does not know this takes a fault for each page.
            let _ = job.region.advise(start, end - start, MADV_POPULATE_WRITE);
        }
        if let (Some(file), Some(reads)) = (&job.file, reads)
            && reads.start(file, unit.offset, &unit.pieces, at as u64).is_ok()
        {
            return Ok(0);
        }
        job.again(unit)
    }

    /// Reads a unit through the page cache; `ahead` are those that come next.
    fn unit(&self, job: &Job<'_>, unit: &Unit, ahead: &[Unit]) -> Result<u64> {
        if let (Stored::Plain(file), None) = (job.stored, &job.file)
            && !cached::has(file, unit.offset + unit.len - 1)?
        {
            for unit in std::iter::once(unit).chain(ahead.iter().take(AHEAD * self.threads)) {
                let (offset, len) = (unit.offset.cast_signed(), unit.len.cast_signed());
                // Only advice: without it the same is read, later.
                let _ = posix_fadvise(file, offset, len, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
            }
        }
        match job.to {
            To::Writable(_) => read(job.region, job.stored, unit, &self.small(job, unit)),
            To::Protected => force(job.region, job.stored, unit),
        }
    }

    /// Gives blocks of a unit huge pages; the ranges of it that still have no memory.
    fn small(&self, job: &Job<'_>, unit: &Unit) -> Vec<(u64, u64)> {
        let To::Writable(blocks) = job.to else { return Vec::new() };
        let mut small = Vec::new();
        for &(at, len) in &unit.pieces {
            let mut from = at;
            for (start, end) in blocks.starting_in(at, at + len) {
                let taken = self.huge.take(job.region, start, end);
                if taken > start {
                    small.push((from, start.max(from)));
                    from = taken;
                }
            }
            small.push((from, at + len));
        }
        small.retain(|range| range.0 < range.1);
        small
    }
}

/// What memory is like that is read into.
pub enum To {
    /// Writable; these ranges get huge pages.
    Writable(Blocks),
    /// It may not be written, or not all of it: mappings with their final protections.
    Protected,
}

/// Units by where they are.
#[derive(Default)]
struct Sorted {
    units: Vec<Unit>,
    uncached: Vec<Unit>,
    /// For those.
    file: Option<File>,
}

/// What the threads share.
struct Job<'a> {
    region: &'a Region,
    stored: &'a Stored,
    to: &'a To,
    units: Queue,
    uncached: Queue,
    file: Option<File>,
}

impl Job<'_> {
    /// Nobody begins another unit.
    fn stop(&self) {
        self.units.next.store(self.units.all.len(), Ordering::Relaxed);
        self.uncached.next.store(self.uncached.all.len(), Ordering::Relaxed);
    }

    /// Reads a unit, whose memory is there, through the page cache because the direct way has failed: that says what
    /// is wrong, if anything is.
    fn again(&self, unit: &Unit) -> Result<u64> {
        let n = read(self.region, self.stored, unit, &[])?;
        if n < unit.len {
            self.stop();
        }
        Ok(n)
    }
}

/// Units that are taken in turn.
struct Queue {
    all: Vec<Unit>,
    next: AtomicUsize,
}

impl Queue {
    fn new(all: Vec<Unit>) -> Queue {
        Queue { all, next: AtomicUsize::new(0) }
    }

    fn is_empty(&self) -> bool {
        self.next.load(Ordering::Relaxed) >= self.all.len()
    }

    /// The next one and its number.
    fn next(&self) -> Option<(usize, &Unit)> {
        if self.is_empty() {
            return None;
        }
        let at = self.next.fetch_add(1, Ordering::Relaxed);
        Some((at, self.all.get(at)?))
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
    let mut small = small.iter().peekable();
    let mut done = 0;
    let mut gathered: Vec<(u64, u64)> = Vec::new();
    let mut from = match stored {
        Stored::Plain(file) => From::File(file),
        Stored::Packed(packed) => From::Packed(Unpacking::new(packed)),
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

#[cfg(test)]
mod tests;
