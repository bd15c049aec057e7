//! Memory under write protection, in chunks of 64 KiB: what has become of each since, in memory that the dump
//! shares with the process that serves faults.
//!
//! ```text
//! before the freeze   CLEAN <-> DIRTY            written since it was protected
//! from there on       CLEAN -> SAVED(place)      somebody was about to write: old content put aside first
//!                     CLEAN -> DONE              the dump has read it
//! ```
//!
//! Whoever lifts the protection of a chunk does so after it is SAVED or DONE, so content that was read while a
//! chunk was CLEAN before and after is that of the freeze. Changes that depend on the state are made under the
//! lock, but CLEAN -> DONE, which is one exchange.

use std::{
    fs::File,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
    sync::atomic::{AtomicU32, Ordering},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rcriu_images::pagemap::PAGE_SIZE;

use crate::{
    error::{Error, Result, SysContext},
    mm::pagemap::Words,
    procfs::ProcDir,
    pstree::RealPid,
    sys::{shared::SharedWords, vm::MemFile},
};

/// Bytes of a chunk: what a fault costs at most, and how much is found changed for one byte that was written.
pub const CHUNK: u64 = PAGES * PAGE_SIZE;
const PAGES: u64 = 16;

const LOCK: usize = 0;
const FROZEN: usize = 1;
const PLACES: usize = 2;
const HEAD: usize = 4;

const CLEAN: u32 = 0;
const DIRTY: u32 = 1;
const DONE: u32 = 2;
/// The first place.
const SAVED: u32 = 3;

/// A range under protection: whole mappings when it was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    pub start: u64,
    pub end: u64,
    /// Number of its first chunk.
    first: usize,
}

impl Range {
    fn base(&self) -> u64 {
        self.start & !(CHUNK - 1)
    }

    /// Number of the chunk of an address in it.
    fn chunk(&self, at: u64) -> usize {
        self.first + ((at - self.base()) / CHUNK) as usize
    }

    /// Where a chunk of it lies.
    fn span(&self, chunk: usize) -> (u64, u64) {
        let at = self.base() + (chunk - self.first) as u64 * CHUNK;
        (at.max(self.start), (at + CHUNK).min(self.end))
    }

    /// Its chunks that `start` to `end` touches.
    fn chunks(&self, start: u64, end: u64) -> std::ops::Range<usize> {
        let (start, end) = (start.max(self.start), end.min(self.end));
        if start >= end { 0..0 } else { self.chunk(start)..self.chunk(end - 1) + 1 }
    }
}

/// Reads the memory of a task that may run: never a page that another process shares is unshared by it.
#[derive(Debug)]
pub struct Reader {
    mem: MemFile,
    words: Words,
}

impl Reader {
    /// Of the memory that thread `tid` has now.
    pub fn new(tid: RealPid) -> Result<Reader> {
        Ok(Reader { mem: MemFile::open(tid)?, words: Words::open(&ProcDir::open(tid)?)? })
    }

    /// `/proc/PID/mem`.
    pub fn mem(&self) -> &MemFile {
        &self.mem
    }

    /// `/proc/PID/pagemap`.
    pub fn words(&mut self) -> &mut Words {
        &mut self.words
    }

    /// The same as a file.
    pub fn pagemap(&self) -> &File {
        self.words.file()
    }
}

/// State of all chunks of one task.
#[derive(Debug)]
pub struct Chunks {
    ranges: Vec<Range>,
    words: SharedWords,
    /// Old content, a chunk at each place.
    aside: File,
}

/// The lock, held.
pub struct Locked<'a>(&'a AtomicU32);

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        self.0.store(0, Ordering::Release);
    }
}

impl Chunks {
    /// Over `ranges`, which ascend; old content goes to `aside`.
    pub fn new(ranges: &[(u64, u64)], aside: File) -> Result<Chunks> {
        let mut first = 0;
        let ranges: Vec<Range> = ranges
            .iter()
            .map(|(start, end)| {
                let range = Range { start: *start, end: *end, first };
                first = range.chunk(end - 1) + 1;
                range
            })
            .collect();
        Ok(Chunks { words: SharedWords::new(HEAD + 2 * first)?, ranges, aside })
    }

    /// The ranges, in order.
    pub fn ranges(&self) -> &[Range] {
        &self.ranges
    }

    fn state(&self, chunk: usize) -> &AtomicU32 {
        &self.words[HEAD + 2 * chunk]
    }

    fn pages(&self, chunk: usize) -> &AtomicU32 {
        &self.words[HEAD + 2 * chunk + 1]
    }

    /// The chunk with this address, and where it lies.
    pub fn at(&self, address: u64) -> Option<(usize, u64, u64)> {
        let after = self.ranges.partition_point(|r| r.start <= address);
        let range = self.ranges[..after].last().filter(|r| address < r.end)?;
        let chunk = range.chunk(address);
        let (start, end) = range.span(chunk);
        Some((chunk, start, end))
    }

    /// Takes the lock; `other` is the process that shares it, which may die with it.
    pub fn lock(&self, other: &OwnedFd) -> Result<Locked<'_>> {
        let word = &self.words[LOCK];
        let mut looks = 0u32;
        while word.compare_exchange_weak(0, 1, Ordering::Acquire, Ordering::Relaxed).is_err() {
            looks += 1;
            if looks.is_multiple_of(1024) && gone(other)? {
                return Err(Error::host("the process that serves page faults of the tree has ended"));
            }
            std::thread::yield_now();
        }
        Ok(Locked(word))
    }

    /// Whether old content is to be put aside.
    pub fn frozen(&self) -> bool {
        self.words[FROZEN].load(Ordering::Acquire) != 0
    }

    /// From here on content counts. With the lock.
    pub fn freeze(&self, _: &Locked<'_>) {
        self.words[FROZEN].store(1, Ordering::Release);
    }

    /// Notes that a chunk is written. With the lock, before the freeze.
    pub fn written(&self, chunk: usize, _: &Locked<'_>) {
        self.state(chunk).store(DIRTY, Ordering::Release);
    }

    /// Runs of written chunks, as addresses.
    pub fn dirty(&self) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for range in &self.ranges {
            for chunk in range.chunks(range.start, range.end) {
                if self.state(chunk).load(Ordering::Acquire) != DIRTY {
                    continue;
                }
                let (start, end) = range.span(chunk);
                match runs.last_mut() {
                    Some((_, last)) if *last == start && start != range.start => *last = end,
                    _ => runs.push((start, end)),
                }
            }
        }
        runs
    }

    /// Forgets that the chunks of a run were written. With the lock, before they are protected again.
    pub fn forget(&self, start: u64, end: u64, _: &Locked<'_>) {
        for range in &self.ranges {
            for chunk in range.chunks(start, end) {
                self.state(chunk).store(CLEAN, Ordering::Release);
            }
        }
    }

    /// Puts the content of a chunk aside unless that is not needed any more. With the lock, after the freeze.
    pub fn save(
        &self,
        (chunk, start, end): (usize, u64, u64),
        reader: &mut Reader,
        _: &Locked<'_>,
    ) -> Result<()> {
        if self.state(chunk).load(Ordering::Acquire) != CLEAN {
            return Ok(());
        }
        let place = self.words[PLACES].fetch_add(1, Ordering::Relaxed);
        let base = start & !(CHUNK - 1);
        let mut mask = 0;
        let mut buf = [0; CHUNK as usize];
        let (aside, mem) = (&self.aside, &reader.mem);
        reader.words.content(start, end, |from, to, _| {
            let bytes = &mut buf[..(to - from) as usize];
            mem.read(from, bytes)?;
            for page in (from - base) / PAGE_SIZE..(to - base) / PAGE_SIZE {
                mask |= 1 << page;
            }
            aside.write_all_at(bytes, u64::from(place) * CHUNK + (from - base)).call("pwrite(old content)")
        })?;
        self.pages(chunk).store(mask, Ordering::Release);
        // The dump may have read it meanwhile.
        let _ = self.state(chunk).compare_exchange(
            CLEAN,
            SAVED.saturating_add(place),
            Ordering::AcqRel,
            Ordering::Acquire,
        );
        Ok(())
    }

    /// Puts `start` to `end` aside, as [`Chunks::save`].
    pub fn save_range(&self, start: u64, end: u64, reader: &mut Reader, locked: &Locked<'_>) -> Result<()> {
        for range in &self.ranges {
            for chunk in range.chunks(start, end) {
                let (from, to) = range.span(chunk);
                self.save((chunk, from, to), reader, locked)?;
            }
        }
        Ok(())
    }

    /// Bytes between `start` and `end` that are neither read nor put aside.
    pub fn open(&self, start: u64, end: u64) -> u64 {
        let open = |range: &Range| {
            let chunks = range.chunks(start, end);
            chunks.filter(|c| self.state(*c).load(Ordering::Acquire) == CLEAN).count() as u64
        };
        self.ranges.iter().map(open).sum::<u64>() * CHUNK
    }

    /// Whether the chunk is put aside.
    pub fn is_saved(&self, chunk: usize) -> bool {
        self.state(chunk).load(Ordering::Acquire) >= SAVED
    }

    /// Takes a chunk as read. If it was put aside before, `found` gets that content instead: address and bytes of
    /// each run of pages that had any. Says which.
    pub fn done(
        &self,
        chunk: usize,
        start: u64,
        mut found: impl FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<bool> {
        let was = self.state(chunk).compare_exchange(CLEAN, DONE, Ordering::AcqRel, Ordering::Acquire);
        let place = match was {
            Ok(_) => return Ok(true),
            Err(state) if state >= SAVED => u64::from(state - SAVED),
            Err(_) => return Err(Error::bug("memory that was read twice")),
        };
        let base = start & !(CHUNK - 1);
        let mask = self.pages(chunk).load(Ordering::Acquire);
        let mut buf = [0; CHUNK as usize];
        let mut page = 0;
        while page < PAGES {
            let run = (mask >> page).trailing_ones();
            if run == 0 {
                page += 1;
                continue;
            }
            let bytes = &mut buf[..run as usize * PAGE_SIZE as usize];
            let from = page * PAGE_SIZE;
            self.aside.read_exact_at(bytes, place * CHUNK + from).call("pread(old content)")?;
            found(base + from, bytes)?;
            page += u64::from(run);
        }
        Ok(false)
    }

    /// The chunks of a part of a range, with where they lie.
    pub fn within(&self, range: &Range, start: u64, end: u64) -> impl Iterator<Item = (usize, u64, u64)> {
        let range = *range;
        range.chunks(start, end).map(move |chunk| {
            let (from, to) = range.span(chunk);
            (chunk, from, to)
        })
    }
}

/// Whether the process of a pidfd has ended.
pub fn gone(pidfd: &OwnedFd) -> Result<bool> {
    let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    match poll(&mut fds, PollTimeout::ZERO) {
        Err(nix::errno::Errno::EINTR) => Ok(false),
        other => Ok(other.call("poll")? != 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunks(ranges: &[(u64, u64)]) -> Chunks {
        Chunks::new(ranges, tempfile::tempfile().unwrap()).unwrap()
    }

    #[test]
    fn every_address_has_its_chunk() {
        let all = chunks(&[(0x1_3000, 0x3_1000), (0x4_0000, 0x4_1000)]);
        assert_eq!(all.at(0x1_2fff), None);
        assert_eq!(all.at(0x1_3000), Some((0, 0x1_3000, 0x2_0000)));
        assert_eq!(all.at(0x2_0000), Some((1, 0x2_0000, 0x3_0000)));
        assert_eq!(all.at(0x3_0fff), Some((2, 0x3_0000, 0x3_1000)));
        assert_eq!(all.at(0x3_1000), None);
        assert_eq!(all.at(0x4_0800), Some((3, 0x4_0000, 0x4_1000)));
        assert_eq!(all.at(0x4_1000), None);
    }

    #[test]
    fn written_chunks_are_joined_within_a_range_only() {
        let all = chunks(&[(0x1_0000, 0x4_0000), (0x4_0000, 0x5_0000)]);
        let me = crate::sys::pidfd::open(RealPid(std::process::id() as i32), 0).unwrap();
        let locked = all.lock(&me).unwrap();
        for chunk in [0, 2, 3] {
            all.written(chunk, &locked);
        }
        assert_eq!(all.dirty(), [(0x1_0000, 0x2_0000), (0x3_0000, 0x4_0000), (0x4_0000, 0x5_0000)]);
        all.forget(0x3_0000, 0x4_0000, &locked);
        assert_eq!(all.dirty(), [(0x1_0000, 0x2_0000), (0x4_0000, 0x5_0000)]);
    }

    #[test]
    fn old_content_comes_back() {
        let mut memory = memmap2::MmapMut::map_anon(4 * CHUNK as usize).unwrap();
        let start = (memory.as_ptr().addr() as u64).next_multiple_of(CHUNK);
        let offset = (start - memory.as_ptr().addr() as u64) as usize;
        // Pages 1 and 2 of the chunk, and the last.
        for page in [1, 2, 15] {
            memory[offset + page * 4096] = page as u8;
        }
        let all = chunks(&[(start, start + 2 * CHUNK)]);
        let me = RealPid(std::process::id() as i32);
        let pidfd = crate::sys::pidfd::open(me, 0).unwrap();
        let mut reader = Reader::new(me).unwrap();
        let locked = all.lock(&pidfd).unwrap();
        all.freeze(&locked);
        assert_eq!(all.open(start, start + 2 * CHUNK), 2 * CHUNK);
        all.save(all.at(start).unwrap(), &mut reader, &locked).unwrap();
        assert_eq!(all.open(start, start + 2 * CHUNK), CHUNK);
        memory[offset + 4096] = 99;
        let mut seen = Vec::new();
        let read = all.done(0, start, |at, bytes| {
            seen.push((at - start, bytes.len(), bytes[0]));
            Ok(())
        });
        assert!(!read.unwrap());
        assert_eq!(seen, [(4096, 2 * 4096, 1), (15 * 4096, 4096, 15)]);
        assert!(all.done(1, start + CHUNK, |_, _| panic!("nothing was put aside")).unwrap());
        assert!(all.done(1, start + CHUNK, |_, _| Ok(())).is_err());
    }
}
