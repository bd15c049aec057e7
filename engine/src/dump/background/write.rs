//! Writing the memory of a task that runs, as it was at the freeze: what was put aside where somebody was about to
//! write, the rest straight from the task.

use nix::sys::uio::RemoteIoVec;
use rcriu_images::{ImageKind, pagemap::PAGE_SIZE};

use super::{
    Kept,
    chunks::{CHUNK, Range, Reader},
    follow::Progress,
    protected::Protected,
};
use crate::{
    error::{Context, Error, Kind, Result},
    interrupt,
    kernel::Kernel,
    mm::{
        pagemap::Scanner,
        pages::{PageStore, PagesOut, Written},
        vma::{self, Vma},
    },
    procfs::{
        ProcDir,
        maps::{self, VmFlags},
    },
    stats::DumpStats,
    sys::vm,
};

/// Chunks read at once.
const BATCH: u64 = 64 * CHUNK;
const OURS: u64 = VmFlags::UFFD_MISSING | VmFlags::UFFD_WP;

/// Completes the mappings of a task: their flags, and ranges of guard pages.
///
/// Precondition: whatever could change them waits.
pub fn mappings(protected: &Protected, kept: &mut Kept, kernel: &Kernel) -> Result<()> {
    let dir = ProcDir::open(protected.pid)?;
    let now = maps::smaps(&dir)?;
    for map in &mut kept.maps {
        if map.name == b"[vsyscall]" {
            continue;
        }
        let at = now.partition_point(|m| m.end <= map.start);
        let same = now.get(at).filter(|m| m.start <= map.start && map.end <= m.end && m.prot == map.prot);
        let is = same.ok_or_else(|| {
            Error::host(format!(
                "mapping {:x}-{:x} has changed before its flags were read",
                map.start, map.end
            ))
            .remedy("dump again, or without --background")
        })?;
        let mut ours = false;
        clip(&protected.covered, map.start, map.end, |_, _| ours = true);
        map.flags = if ours { is.flags.clone().without(OURS) } else { is.flags.clone() };
        map.pkey = is.pkey;
    }
    vma::refresh(&mut kept.vmas, &kept.maps)?;
    for (start, end) in Scanner::new(&dir, kernel)?.guards()? {
        kept.vmas.push(vma::guard(start, end));
    }
    Ok(())
}

/// Writes the pagemap and the pages of a task.
pub fn pages(
    protected: &Protected,
    kept: &Kept,
    reader: Reader,
    store: &PageStore,
    progress: &Progress,
    stats: &mut DumpStats,
) -> Result<()> {
    log::info!("Dumping pages (pid: {}) behind the running task", kept.task);
    stats.memwrite.start();
    let out = store.create(ImageKind::Pagemap, kept.task.0.cast_unsigned().into())?;
    let mut writer = Writer {
        protected,
        stacks: &kept.stacks,
        reader,
        out,
        rest: protected.rest.as_slice(),
        vmas: kept.vmas.as_slice(),
        buf: vec![0; BATCH as usize],
    };
    for range in protected.chunks.ranges() {
        let mut at = range.start;
        while at < range.end {
            interrupt::check()?;
            progress.check()?;
            let next = ((at & !(BATCH - 1)) + BATCH).min(range.end);
            writer.batch(range, at, next)?;
            protected.lift(at, next)?;
            at = next;
        }
    }
    writer.rest_before(u64::MAX)?;
    protected.server.check()?;
    let Written { written, .. } = writer.out.finish()?;
    stats.memwrite.stop();
    stats.pages_scanned += written;
    stats.pages_written += written;
    log::info!("Dumped {written} pages of {}", kept.task);
    Ok(())
}

struct Writer<'a> {
    protected: &'a Protected,
    stacks: &'a [u64],
    reader: Reader,
    out: PagesOut,
    /// Pages of mappings that were not protected, still to be written.
    rest: &'a [(u64, Vec<u8>)],
    /// Mappings from the one on that the next page may be in.
    vmas: &'a [Vma],
    buf: Vec<u8>,
}

/// Pages with content, in one chunk.
#[derive(Clone, Copy)]
struct Run {
    start: u64,
    end: u64,
    /// Nobody else maps them.
    exclusive: bool,
}

impl Writer<'_> {
    /// Reads and writes `from` to `to` of a range.
    fn batch(&mut self, range: &Range, from: u64, to: u64) -> Result<()> {
        let protected = self.protected;
        let mut runs = Vec::new();
        self.reader.words().content(from, to, |start, end, exclusive| {
            clip(&protected.covered, start, end, |start, end| runs.push(Run { start, end, exclusive }));
            Ok(())
        })?;
        // Cut at the borders of chunks; what is put aside need not be read.
        let mut cut: Vec<(usize, Run)> = Vec::new();
        for run in &runs {
            for (chunk, start, end) in protected.chunks.within(range, run.start, run.end) {
                if !protected.chunks.is_saved(chunk) {
                    let (start, end) = (start.max(run.start), end.min(run.end));
                    cut.push((chunk, Run { start, end, ..*run }));
                }
            }
        }
        let mut buf = std::mem::take(&mut self.buf);
        let read = self.read(&cut, &mut buf);
        let written = read.and_then(|()| self.emit_batch(range, from, to, &cut, &buf));
        self.buf = buf;
        written
    }

    fn emit_batch(
        &mut self,
        range: &Range,
        from: u64,
        to: u64,
        cut: &[(usize, Run)],
        buf: &[u8],
    ) -> Result<()> {
        let protected = self.protected;
        let mut cut = cut.iter().peekable();
        let mut at = 0;
        for (chunk, start, _) in protected.chunks.within(range, from, to) {
            let was_read = protected.chunks.done(chunk, start, |start, bytes| {
                let end = start + bytes.len() as u64;
                let mut result = Ok(());
                clip(&protected.covered, start, end, |from, to| {
                    let part = &bytes[(from - start) as usize..(to - start) as usize];
                    if result.is_ok() {
                        result = self.emit(from, part);
                    }
                });
                result
            })?;
            while let Some((_, run)) = cut.next_if(|(c, _)| *c == chunk) {
                let len = (run.end - run.start) as usize;
                if was_read {
                    self.emit(run.start, &buf[at..at + len])?;
                }
                at += len;
            }
        }
        Ok(())
    }

    /// Fills `buf` with the content of `runs`, one after the other. Of those that were put aside meanwhile, and whose
    /// memory may be gone since, it is anything.
    fn read(&mut self, runs: &[(usize, Run)], buf: &mut [u8]) -> Result<()> {
        let mut at = 0;
        for group in runs.chunk_by(|(_, a), (_, b)| a.exclusive == b.exclusive) {
            let len: u64 = group.iter().map(|(_, r)| r.end - r.start).sum();
            let bytes = &mut buf[at..at + len as usize];
            at += len as usize;
            if group[0].1.exclusive {
                let pieces: Vec<RemoteIoVec> = group
                    .iter()
                    .map(|(_, r)| RemoteIoVec { base: r.start as usize, len: (r.end - r.start) as usize })
                    .collect();
                match vm::read_pieces(self.protected.pid, &pieces, bytes) {
                    Ok(n) if n == bytes.len() => continue,
                    // The leader has ended, others have the memory; or a part is gone.
                    Ok(_) => {}
                    Err(e) if matches!(e.kind(), Kind::TaskDied(_)) => {}
                    Err(e) => return Err(e),
                }
            }
            let mut rest = bytes;
            for (chunk, run) in group {
                let (this, others) = rest.split_at_mut((run.end - run.start) as usize);
                match self.reader.mem().read(run.start, this) {
                    Err(e) if !self.protected.chunks.is_saved(*chunk) => {
                        return Err(e).during(|| format!("content of {:x}-{:x}", run.start, run.end));
                    }
                    _ => {}
                }
                rest = others;
            }
        }
        Ok(())
    }

    /// Writes pages at `start`, after what lies before them.
    fn emit(&mut self, start: u64, bytes: &[u8]) -> Result<()> {
        self.rest_before(start)?;
        self.write(start, bytes)
    }

    fn rest_before(&mut self, limit: u64) -> Result<()> {
        while let Some(((start, bytes), others)) = self.rest.split_first()
            && *start < limit
        {
            self.rest = others;
            self.write(*start, bytes)?;
        }
        Ok(())
    }

    fn write(&mut self, start: u64, bytes: &[u8]) -> Result<()> {
        let end = start + bytes.len() as u64;
        let mut at = start;
        while at < end {
            while self.vmas.first().is_some_and(|v| v.entry.end <= at) {
                self.vmas = &self.vmas[1..];
            }
            let Some(vma) = self.vmas.first().filter(|v| v.entry.start < end) else { return Ok(()) };
            let from = at.max(vma.entry.start);
            let to = end.min(vma.entry.end);
            if vma.has_pages() {
                let part = &bytes[(from - start) as usize..(to - start) as usize];
                put(&mut self.out, vma, self.stacks, from, part)?;
            }
            at = to;
        }
        Ok(())
    }
}

/// Writes pages of one mapping; those in use as stacks cannot come late.
fn put(out: &mut PagesOut, vma: &Vma, stacks: &[u64], start: u64, bytes: &[u8]) -> Result<()> {
    let mut one = |at: u64, bytes: &[u8], lazy: bool| match (bytes.is_empty(), vma.zero_is_absent()) {
        (true, _) => Ok(()),
        (false, true) => out.add_nonzero(at, bytes, lazy),
        (false, false) => out.add(at, bytes, lazy),
    };
    if !vma.may_be_lazy() {
        return one(start, bytes, false);
    }
    let end = start + bytes.len() as u64;
    let mut at = start;
    let from = stacks.partition_point(|s| *s < start);
    for stack in stacks[from..].iter().take_while(|s| **s < end) {
        let split = |address: u64| (address - start) as usize;
        one(at, &bytes[split(at)..split(*stack)], true)?;
        one(*stack, &bytes[split(*stack)..split(stack + PAGE_SIZE)], false)?;
        at = stack + PAGE_SIZE;
    }
    one(at, &bytes[(at - start) as usize..], true)
}

/// Calls `found` for the parts of `start` to `end` that lie in `ranges`, which ascend.
fn clip(ranges: &[(u64, u64)], start: u64, end: u64, mut found: impl FnMut(u64, u64)) {
    let from = ranges.partition_point(|(_, last)| *last <= start);
    for (from, to) in ranges[from..].iter().take_while(|(from, _)| *from < end) {
        found(start.max(*from), end.min(*to));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_in_ranges_are_found() {
        let parts = |start, end| {
            let mut all = Vec::new();
            clip(&[(10, 20), (20, 30), (40, 50)], start, end, |from, to| all.push((from, to)));
            all
        };
        assert_eq!(parts(0, 10), []);
        assert_eq!(parts(15, 45), [(15, 20), (20, 30), (40, 45)]);
        assert_eq!(parts(42, 44), [(42, 44)]);
        assert_eq!(parts(50, 60), []);
    }
}
