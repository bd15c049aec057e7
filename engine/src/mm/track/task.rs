//! One task: what of its memory is in the parent images, and following it from here on.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::{errno::Errno, fcntl::OFlag};
use rcriu_images::{
    ImageKind,
    pagemap::{PageReader, Source},
};

use super::{Tracker, kept::Kept};
use crate::{
    error::{Context, Result, SysContext},
    infect::Infected,
    mm::{
        pagemap::Marks,
        vma::{self, TASK_SIZE, Vma},
    },
    procfs::{
        ProcDir,
        maps::{Map, VmFlags},
    },
    pstree::{RealPid, VirtPid},
    sys::{
        pagemap_scan::{self, Category, Flags, Query, Region},
        pidfd,
        userfaultfd::{self, Features, Mode},
    },
};

/// Regions that are told at once; what they are is of no interest.
const REGIONS: usize = 1024;

/// A frozen task, between looking at it and marking it.
#[derive(Debug)]
pub struct TaskTrack {
    pid: RealPid,
    start: u64,
    dir: ProcDir,
    /// Of the task, opened while it was frozen and so could not be another one's.
    pidfd: Option<OwnedFd>,
    /// Of the task's memory; none before it is entered, or with soft-dirty bits.
    uffd: Option<OwnedFd>,
    /// Where that was: keeper and row.
    row: Option<(usize, usize)>,
    /// The parent's pages, if the kernel knows what changed since.
    parent: Option<PageReader>,
    marks: Option<Marks>,
    /// What can be followed: ranges with nothing else between.
    ranges: Vec<(u64, u64)>,
}

impl Tracker {
    /// Looks at the frozen task `pid`, in images `virt`, that was started at `start` (as `stat` tells it); `dir` is of a
    /// live thread, `maps` are its mappings with flags.
    ///
    /// # Errors
    /// Memory that is registered with a userfaultfd of somebody else.
    pub fn task(
        &mut self,
        (pid, virt): (RealPid, VirtPid),
        start: u64,
        dir: &ProcDir,
        maps: &[Map],
    ) -> Result<TaskTrack> {
        let mut task = TaskTrack {
            pid,
            start,
            dir: dir.try_clone()?,
            pidfd: None,
            uffd: None,
            row: None,
            parent: None,
            marks: None,
            ranges: Vec::new(),
        };
        let protected = runs(maps.iter().filter(|m| m.flags.any(VmFlags::UFFD_WP)).map(|m| (m.start, m.end)));
        if !protected.is_empty() {
            self.find(&mut task)?;
            for (from, to) in &protected {
                let ours = match &task.uffd {
                    Some(uffd) => userfaultfd::register(uffd, *from, to - from, Mode::WP).is_ok(),
                    None => false,
                };
                if !ours {
                    return Err(vma::foreign_userfaultfd().during(format!("mapping {from:x}-{to:x}")));
                }
            }
        }
        self.consult(&mut task, virt)?;
        Ok(task)
    }

    /// Looks for the userfaultfd of a task whose memory is registered with one.
    fn find(&mut self, task: &mut TaskTrack) -> Result<()> {
        if self.take(task)? || self.all_known {
            return Ok(());
        }
        self.all_known = true;
        self.kept.extend(Kept::all()?);
        self.take(task).map(drop)
    }

    fn take(&self, task: &mut TaskTrack) -> Result<bool> {
        for (at, kept) in self.kept.iter().enumerate() {
            if let Some((row, uffd)) = kept.take(task.pid, task.start)? {
                task.uffd = Some(uffd);
                task.row = Some((at, row));
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Finds out what of the task the parent images have, and whether it is the same task.
    fn consult(&self, task: &mut TaskTrack, virt: VirtPid) -> Result<()> {
        let Some(parent) = &self.parent else { return Ok(()) };
        let id = virt.0.cast_unsigned().into();
        let Some(pages) = PageReader::open(&parent.dir, ImageKind::Pagemap, id)? else { return Ok(()) };
        if let Some(uptime) = parent.uptime {
            // A tick is a hundredth of a second for user space, on every architecture of Linux.
            let dumped = uptime / (1_000_000 / 100);
            if task.start >= dumped {
                let unsure = if task.start == dumped { "*" } else { "" };
                log::warn!("Pid reuse{unsure} detected for pid {}", task.pid);
                return Ok(());
            }
        }
        if !parent.current {
            return Ok(());
        }
        match self.marks {
            Some(Marks::WriteProtect) if !matches!(task.row, Some((0, _))) => {
                log::info!(
                    "Task {} has none of the memory that was followed: it has executed another program, or \
                     following it failed",
                    task.pid
                );
            }
            marks => {
                task.marks = marks;
                task.parent = Some(pages);
            }
        }
        Ok(())
    }

    /// Whether `task` must be entered before [`Tracker::mark`] for [`Tracker::enter`].
    pub fn must_enter(&self, task: &TaskTrack) -> bool {
        self.keeper.is_some() && task.uffd.is_none()
    }

    /// Makes what follows the memory of `task`, from inside of it. A refusal only ends the following.
    pub fn enter(&self, task: &mut TaskTrack, infected: &Infected<'_>) {
        if !self.must_enter(task) {
            return;
        }
        let made = infected.userfaultfd(true).and_then(|uffd| {
            userfaultfd::api(&uffd, Features::WP_ASYNC)?;
            Ok(uffd)
        });
        match made {
            Ok(uffd) => task.uffd = Some(uffd),
            Err(e) => log::warn!("Changes in the memory of task {} cannot be followed: {e}", task.pid),
        }
    }
}

impl TaskTrack {
    pub(super) fn pid(&self) -> RealPid {
        self.pid
    }

    pub(super) fn start(&self) -> u64 {
        self.start
    }

    pub(super) fn row(&self) -> Option<(usize, usize)> {
        self.row
    }

    /// What follows its memory, and the task itself.
    pub(super) fn held(&self) -> Option<(BorrowedFd<'_>, BorrowedFd<'_>)> {
        Some((self.uffd.as_ref()?.as_fd(), self.pidfd.as_ref()?.as_fd()))
    }

    /// How to tell which pages changed since the parent images; `None` if nobody can.
    pub fn marks(&self) -> Option<Marks> {
        self.marks
    }

    /// Calls `found(from, to, stored)` for the parts of `[start, end)`, which has not changed, in order: `stored`
    /// says whether the parent images have it.
    pub fn split(
        &self,
        start: u64,
        end: u64,
        mut found: impl FnMut(u64, u64, bool) -> Result<()>,
    ) -> Result<()> {
        let Some(parent) = &self.parent else { return found(start, end, false) };
        let runs = parent.runs(start, end);
        let stored = |source| matches!(source, Source::Stored { .. });
        for same in runs.chunk_by(|a, b| stored(a.source) == stored(b.source)) {
            let (first, last) = (&same[0], &same[same.len() - 1]);
            found(first.vaddr, last.vaddr + last.len, stored(first.source))?;
        }
        Ok(())
    }

    /// The parent's pages are needed no more.
    pub(super) fn done_reading(&mut self) {
        self.parent = None;
    }

    /// Takes note of what can be followed.
    pub fn look(&mut self, vmas: &[Vma]) {
        // Not over other mappings, which may be of kinds that cannot be registered.
        let mut before = 0;
        self.ranges.clear();
        let real = vmas.iter().filter(|v| !v.is(crate::mm::status::GUARD));
        for vma in real {
            if vma.can_be_tracked() {
                match self.ranges.last_mut() {
                    Some((_, end)) if *end == before && *end == vma.entry.start => *end = vma.entry.end,
                    _ => self.ranges.push((vma.entry.start, vma.entry.end)),
                }
            }
            before = vma.entry.end;
        }
    }

    /// Changes count from here on.
    pub(super) fn mark(&mut self, marks: Option<Marks>) -> Result<()> {
        match marks {
            None => Ok(()),
            Some(Marks::SoftDirty) => {
                log::info!("Reset {}'s dirty tracking", self.pid);
                let file = self.dir.file("clear_refs", OFlag::O_WRONLY)?;
                nix::unistd::write(&file, b"4").call("write(clear_refs)").map(drop)
            }
            Some(Marks::WriteProtect) => {
                self.pidfd = Some(pidfd::open(self.pid, 0)?);
                self.protect()
            }
        }
    }

    fn protect(&self) -> Result<()> {
        let Some(uffd) = &self.uffd else { return Ok(()) };
        for (start, end) in &self.ranges {
            match userfaultfd::register(uffd, *start, end - start, Mode::WP) {
                Ok(_) => {}
                Err(e) if e.errno() == Some(Errno::EBUSY as i32) => {
                    return Err(vma::foreign_userfaultfd().during(format!("mapping {start:x}-{end:x}")));
                }
                Err(e) => return Err(e).during(|| format!("mapping {start:x}-{end:x}")),
            }
        }
        // All that has content, wherever the registration allows it: the scan passes over the rest.
        let plain = Category::PFNZERO | Category::FILE;
        let query = Query {
            flags: Flags::WP_MATCHING,
            inverted: plain,
            all_of: plain,
            any_of: Category::PRESENT | Category::SWAPPED,
            ..Query::default()
        };
        let pagemap = self.dir.file("pagemap", OFlag::O_RDONLY)?;
        let mut regions = vec![Region::default(); REGIONS];
        let mut at = 0;
        while at < TASK_SIZE {
            let (count, walked) = pagemap_scan::scan(&pagemap, at, TASK_SIZE, &query, &mut regions)?;
            at = pagemap_scan::next(at, walked, &regions[..count])?;
        }
        Ok(())
    }
}

/// Ranges in order, those that touch joined.
fn runs(ranges: impl Iterator<Item = (u64, u64)>) -> Vec<(u64, u64)> {
    let mut all: Vec<(u64, u64)> = Vec::new();
    for (start, end) in ranges {
        match all.last_mut() {
            Some((_, last)) if *last == start => *last = end,
            _ => all.push((start, end)),
        }
    }
    all
}
