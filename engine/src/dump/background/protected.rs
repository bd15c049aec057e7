//! A task whose memory is write-protected, so that it can run on while that is read.
//!
//! ```text
//! stop for a moment   make a userfaultfd in the task
//! it runs             protect large mappings; writes are noted and let through, and protected again
//! frozen              protect the little that was written last; keep the few pages of all other mappings
//! it runs             a write waits until the old content is put aside; the rest is read in order
//! ```
//!
//! What is done while the task is frozen does not grow with its memory: no page table is walked but of what was
//! written last. A fork would copy them all, and so is taken for tasks whose memory is small or in huge pages.
//!
//! Missing pages are reported too: one that comes into being after the freeze is no part of the snapshot. Memory
//! shared with other processes can be changed past the protection, so it is read while frozen, as always.

use std::{fs::File, os::fd::OwnedFd, time::Duration};

use rcriu_images::pagemap::PAGE_SIZE;

use super::{
    choose::{REST, choose, is_same, large_tasks, uncovered},
    chunks::{Chunks, Reader},
    server::{Server, lift, protect},
};
use crate::{
    dump::task::whole_maps,
    error::{Context, Error, Kind, Result, SysContext},
    infect::{self, Infected, Ledger, StoppedTask},
    interrupt,
    kernel::Kernel,
    options::DumpOptions,
    procfs::{
        ProcDir,
        maps::{self, Map},
    },
    pstree::RealPid,
    stats::DumpStats,
    sys::{
        pagemap_scan::{self, Category, Query, Region},
        userfaultfd::{self, Features, Mode},
    },
};

/// Bytes protected in one call, which keeps others from changing the address space.
const STEP: u64 = 16 << 20;
/// Times that what was written meanwhile is protected again before the freeze.
const ROUNDS: usize = 8;
/// So few written chunks need no further round.
const FEW: u64 = 8 << 20;

/// See the module. Dropped, the protection ends.
#[derive(Debug)]
pub struct Protected {
    pub pid: RealPid,
    uffd: Option<OwnedFd>,
    pub chunks: Chunks,
    pub server: Server,
    /// For whoever follows the task, and before for the server and the freeze; for whoever reads the memory.
    readers: Option<(Reader, Reader)>,
    guards: bool,
    /// Mappings with their flags as they were before the freeze.
    before: Vec<Map>,
    /// What of the ranges was under protection at the freeze.
    pub covered: Vec<(u64, u64)>,
    /// Pages of everything else: where, and what was there.
    pub rest: Vec<(u64, Vec<u8>)>,
}

/// Protects large tasks of the tree of `opts.pid`, which runs.
///
/// The time for which tasks are stopped for it counts as frozen.
pub fn prepare(
    opts: &DumpOptions,
    kernel: &Kernel,
    ledger: &Ledger,
    stats: &mut DumpStats,
) -> Result<Vec<Protected>> {
    let mut all = Vec::new();
    let able =
        kernel.uffd_wp_async && kernel.pagemap_scan && kernel.pidfd_getfd && kernel.pidfd_open && kernel.kcmp;
    // A frozen group would not come to the first stop.
    if !opts.background || !able || opts.freeze_cgroup.is_some() {
        return Ok(all);
    }
    for pid in large_tasks(RealPid(opts.pid)) {
        interrupt::check()?;
        match Protected::new(pid, opts, kernel, ledger, stats) {
            Ok(Some(task)) => all.push(task),
            Ok(None) => {}
            // It was only to be faster.
            Err(e) if matches!(e.kind(), Kind::Interrupted(_) | Kind::TimedOut) => return Err(e),
            Err(e) => log::info!("Memory of task {pid} is not protected, it will be copied: {e}"),
        }
    }
    Ok(all)
}

impl Protected {
    fn new(
        pid: RealPid,
        opts: &DumpOptions,
        kernel: &Kernel,
        ledger: &Ledger,
        stats: &mut DumpStats,
    ) -> Result<Option<Protected>> {
        let dir = ProcDir::open(pid)?;
        let before = maps::smaps(&dir)?;
        let Some(ranges) = choose(&before) else { return Ok(None) };
        let limit = interrupt::remaining(opts.freeze_timeout).min(Duration::from_secs(5));
        stats.frozen.start();
        let made = Self::make(pid, kernel, ledger, limit);
        stats.frozen.stop();
        let Some((uffd, mut readers)) = made? else { return Ok(None) };
        userfaultfd::api(&uffd, Features::PAGEFAULT_FLAG_WP)?;
        let chunks = Chunks::new(&ranges, aside(opts)?)?;
        let server = Server::start(&uffd, &chunks, &mut readers.0)?;
        let guards = kernel.pagemap_scan_guards;
        let task = Protected {
            pid,
            uffd: Some(uffd),
            chunks,
            server,
            readers: Some(readers),
            guards,
            before,
            covered: Vec::new(),
            rest: Vec::new(),
        };
        task.protect(&ranges)?;
        Ok(Some(task))
    }

    /// Stops the task to make a userfaultfd in it; what reads its memory is opened too.
    fn make(
        pid: RealPid,
        kernel: &Kernel,
        ledger: &Ledger,
        limit: Duration,
    ) -> Result<Option<(OwnedFd, (Reader, Reader))>> {
        let mut stopped = StoppedTask::seize(pid, kernel, limit)?;
        if stopped.job_stop().is_some() || stopped.leader_gone() {
            return Ok(None);
        }
        stopped.watched_by(ledger);
        let infected = Infected::new(&stopped, kernel)?;
        let uffd = infected.userfaultfd(false);
        infected.cure()?;
        // Of the memory that it has now, should it execute another program.
        let readers = (Reader::new(pid)?, Reader::new(pid)?);
        stopped.release()?;
        Ok(Some((uffd?, readers)))
    }

    fn uffd(&self) -> Result<&OwnedFd> {
        self.uffd.as_ref().ok_or_else(|| Error::bug("a closed userfaultfd"))
    }

    /// Protects while the task runs.
    fn protect(&self, ranges: &[(u64, u64)]) -> Result<()> {
        let uffd = self.uffd()?;
        for (start, end) in ranges {
            userfaultfd::register(uffd, *start, end - start, Mode::WP | Mode::MISSING)
                .during(|| format!("mapping {start:x}-{end:x}"))?;
            let mut at = *start;
            while at < *end {
                interrupt::check()?;
                let next = (at + STEP).min(*end);
                protect(uffd, at, next, true).during(|| format!("mapping {start:x}-{end:x}"))?;
                at = next;
            }
        }
        for _ in 0..ROUNDS {
            let runs = self.chunks.dirty();
            let bytes: u64 = runs.iter().map(|(start, end)| end - start).sum();
            log::debug!("{bytes} bytes of task {} were written meanwhile", self.pid);
            if bytes <= FEW {
                break;
            }
            self.again(&runs)?;
        }
        self.server.check()
    }

    /// Protects what was written.
    fn again(&self, runs: &[(u64, u64)]) -> Result<()> {
        for (start, end) in runs {
            let mut at = *start;
            while at < *end {
                let next = (at + STEP).min(*end);
                let locked = self.chunks.lock(self.server.pidfd())?;
                self.chunks.forget(at, next, &locked);
                protect_what_is_there(self.uffd()?, at, next)?;
                at = next;
            }
        }
        Ok(())
    }

    /// What is to be known of the task now that it is frozen: its protection, if that can be used, and its mappings.
    pub fn settled(mut self, stopped: &StoppedTask, dir: &ProcDir) -> Result<(Option<Protected>, Vec<Map>)> {
        if stopped.job_stop().is_none() && !stopped.leader_gone() {
            let mut maps = self.maps(dir)?;
            if infect::remove_leftover(stopped, &maps)? {
                maps = self.maps(dir)?;
            }
            match self.settle(&maps) {
                Ok(()) => return Ok((Some(self), maps)),
                Err(e) => log::warn!("The protection of task {} is given up: {e}", self.pid),
            }
        }
        drop(self);
        Ok((None, whole_maps(stopped, dir)?))
    }

    /// Mappings of the frozen task: flags are those of before, where the mapping is the same, and none for others.
    fn maps(&self, dir: &ProcDir) -> Result<Vec<Map>> {
        let mut maps = maps::maps(dir)?;
        let mut before = self.before.iter().peekable();
        for map in &mut maps {
            while before.next_if(|b| b.start < map.start).is_some() {}
            if let Some(was) = before.peek()
                && is_same(map, was)
            {
                map.flags = was.flags.clone();
                map.pkey = was.pkey;
            }
        }
        Ok(maps)
    }

    /// From here on content counts: protects what was written last, and keeps what is not protected at all.
    ///
    /// Precondition: the task is frozen; `maps` are its mappings now.
    ///
    /// # Errors
    /// [`Kind::Host`] if too much is not protected: then it has to be copied otherwise.
    fn settle(&mut self, maps: &[Map]) -> Result<()> {
        self.server.check()?;
        let locked = self.chunks.lock(self.server.pidfd())?;
        let uffd = self.uffd.as_ref().ok_or_else(|| Error::bug("a closed userfaultfd"))?;
        let mut covered = Vec::new();
        for range in self.chunks.ranges() {
            let from = maps.partition_point(|m| m.end <= range.start);
            for map in maps[from..].iter().take_while(|m| m.start < range.end) {
                let (start, end) = (map.start.max(range.start), map.end.min(range.end));
                // Whatever is not what was registered cannot be protected.
                match protect(uffd, start, start + PAGE_SIZE, true) {
                    Ok(()) => covered.push((start, end)),
                    Err(e) if matches!(e.errno(), Some(libc::ENOENT)) => {}
                    Err(e) => return Err(e),
                }
            }
        }
        let dirty = self.chunks.dirty();
        let bytes: u64 = dirty.iter().map(|(start, end)| end - start).sum();
        for (start, end) in &dirty {
            self.chunks.forget(*start, *end, &locked);
            protect_what_is_there(uffd, *start, *end)?;
        }
        self.chunks.freeze(&locked);
        drop(locked);
        self.covered = covered;
        self.rest = self.keep_rest(maps)?;
        let rest: usize = self.rest.iter().map(|(_, bytes)| bytes.len()).sum();
        log::info!(
            "Memory of task {} is protected: {bytes} bytes written last, {rest} bytes of other mappings",
            self.pid
        );
        Ok(())
    }

    /// Private pages outside of what is covered.
    fn keep_rest(&self, maps: &[Map]) -> Result<Vec<(u64, Vec<u8>)>> {
        let (reader, _) = self.readers.as_ref().ok_or_else(|| Error::bug("a task that is read already"))?;
        let pagemap = reader.pagemap();
        let query = content(self.guards);
        let mut regions = vec![Region::default(); 512];
        let mut kept: Vec<(u64, Vec<u8>)> = Vec::new();
        let mut left = REST;
        let mut keep = |start: u64, end: u64| -> Result<()> {
            left = left.checked_sub(end - start).ok_or_else(|| {
                Error::host("too much of its memory is in mappings that are new or cannot be protected")
            })?;
            let mut bytes = vec![0; (end - start) as usize];
            reader.mem().read(start, &mut bytes).during(|| format!("content of {start:x}-{end:x}"))?;
            kept.push((start, bytes));
            Ok(())
        };
        for (start, end, all) in uncovered(maps, &self.covered) {
            if all {
                keep(start, end)?;
                continue;
            }
            let mut at = start;
            while at < end {
                let (count, walked) = pagemap_scan::scan(pagemap, at, end, &query, &mut regions)?;
                for region in &regions[..count] {
                    if !region.categories().intersects(Category::GUARD) {
                        keep(region.start, region.end)?;
                    }
                }
                at = pagemap_scan::next(at, walked, &regions[..count])?;
            }
        }
        Ok(kept)
    }

    /// Who read its memory from here on.
    pub fn readers(&mut self) -> Result<(Reader, Reader)> {
        self.readers.take().ok_or_else(|| Error::bug("a task that is read already"))
    }

    /// Content of `start` to `end` has been read: whoever waits to change it may.
    pub fn lift(&self, start: u64, end: u64) -> Result<()> {
        lift(self.uffd()?, start, end)
    }

    fn end(&mut self) {
        let Some(uffd) = self.uffd.take() else { return };
        for range in self.chunks.ranges() {
            let mut at = range.start;
            while at < range.end {
                let next = (at + STEP).min(range.end);
                // What is gone needs it no more; closing the last descriptor ends the rest.
                let _ = userfaultfd::unregister(&uffd, at, next - at);
                at = next;
            }
        }
    }
}

impl Drop for Protected {
    fn drop(&mut self) {
        self.end();
    }
}

/// Pages with content of their own; guard pages among them are told where the kernel knows them.
fn content(guards: bool) -> Query {
    let plain = Category::PFNZERO | Category::FILE;
    let content = Category::PRESENT | Category::SWAPPED;
    let guard = if guards { Category::GUARD } else { Category::empty() };
    Query { inverted: plain, all_of: plain, any_of: content, returned: content | guard, ..Query::default() }
}

/// Protects a run that may have holes by now: what is not there is no concern.
fn protect_what_is_there(uffd: &OwnedFd, start: u64, end: u64) -> Result<()> {
    match protect(uffd, start, end, true) {
        Err(e) if e.errno() == Some(libc::ENOENT) && end - start > PAGE_SIZE => {
            let half = start + (end - start) / 2 / PAGE_SIZE * PAGE_SIZE;
            protect_what_is_there(uffd, start, half)?;
            protect_what_is_there(uffd, half, end)
        }
        Err(e) if e.errno() == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}

/// Where old content goes: a file without a name beside the images, so that it need not stay in memory.
fn aside(opts: &DumpOptions) -> Result<File> {
    tempfile::tempfile_in(format!("/proc/self/fd/{}", opts.common.images_dir.raw_fd()))
        .call("open(O_TMPFILE)")
}
