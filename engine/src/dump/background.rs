//! `--background`: the tree runs again before its memory is copied.
//!
//! While the tree is frozen each task forks a copy that only holds its memory (copy-on-write, as fork makes it);
//! pages are read from the copies once the tree runs, and are those of the moment at which it was frozen. A
//! userfaultfd would have to walk the same page tables to protect them, and is not told in time of memory that
//! the task unmaps or drops.
//!
//! A task that cannot be copied, or not without being noticed, has its pages read while it is frozen, and the log
//! says why.

use rcriu_images::ImageKind;

use crate::{
    error::{Context, Error, Kind, Result},
    infect::Infected,
    kernel::Kernel,
    mm::{
        pagemap::Scanner,
        pages::{Copier, PageStore, Written},
        vma::Vma,
    },
    options::{Afterwards, DumpOptions},
    procfs::{
        ProcDir,
        maps::{Map, VmFlags},
        status::Status,
    },
    pstree::{RealPid, VirtPid},
    stats::DumpStats,
    sys::{ptrace, wait},
};

/// Fails for options that cannot be combined.
pub fn check(opts: &DumpOptions) -> Result<()> {
    if !opts.background {
        return Ok(());
    }
    if opts.afterwards != Afterwards::Run {
        return Err(Error::usage("--background needs --leave-running: otherwise nothing runs meanwhile"));
    }
    if opts.track_mem || opts.prev_images_dir.is_some() {
        return Err(Error::usage("--background cannot be combined with --track-mem or --prev-images-dir")
            .remedy("leave one of them out"));
    }
    Ok(())
}

/// Memory that is still to be copied.
#[derive(Debug, Default)]
pub struct Background {
    wanted: bool,
    /// A task of the tree adopts orphans: it would see the copies of its descendants.
    adopts: bool,
    later: Vec<Later>,
}

#[derive(Debug)]
struct Later {
    copy: MemoryCopy,
    task: VirtPid,
    vmas: Vec<Vma>,
    stacks: Vec<u64>,
}

impl Background {
    /// As the options say.
    pub fn new(opts: &DumpOptions) -> Self {
        Background { wanted: opts.background, ..Background::default() }
    }

    /// Whether nothing was left for later.
    pub fn is_empty(&self) -> bool {
        self.later.is_empty()
    }

    /// Has the task make its copy; `None` if its pages must be read while it is frozen.
    pub fn copy(
        &mut self,
        infected: &Infected<'_>,
        maps: &[Map],
        statuses: &[Status],
        adopts: bool,
        kernel: &Kernel,
    ) -> Result<Option<MemoryCopy>> {
        if !self.wanted {
            return Ok(None);
        }
        self.adopts |= adopts;
        let why = if let Some(map) = maps.iter().find(|m| m.flags.any(NOT_INHERITED)) {
            format!("mapping {:x}-{:x} is not inherited by children as it is", map.start, map.end)
        } else if statuses.iter().any(|s| s.seccomp != 0) {
            "seccomp may forbid it to fork".into()
        } else if self.adopts {
            "it or an ancestor adopts orphans".into()
        } else if !kernel.close_range {
            "this kernel has no close_range(2)".into()
        } else {
            match infected.copy_memory() {
                Ok(pid) => return MemoryCopy::take(pid).map(Some),
                Err(e) if matches!(e.errno(), Some(libc::EAGAIN | libc::ENOMEM)) => e.to_string(),
                Err(e) => return Err(e),
            }
        };
        log::warn!("Pages of task {} are copied while it is frozen: {why}", infected.task().pid());
        Ok(None)
    }

    /// Leaves the pages of `task` for later.
    pub fn push(&mut self, copy: MemoryCopy, task: VirtPid, vmas: &[Vma], stacks: Vec<u64>) {
        self.later.push(Later { copy, task, vmas: vmas.to_vec(), stacks });
    }

    /// Writes all pagemaps and pages that were left for later.
    pub fn finish(self, pages: &PageStore, kernel: &Kernel, stats: &mut DumpStats) -> Result<()> {
        for later in self.later {
            log::info!("Dumping pages (pid: {}) from copy {}", later.task, later.copy.0);
            later.write(pages, kernel, stats).during(|| format!("memory of task {}", later.task))?;
        }
        Ok(())
    }
}

/// What a child does not get, or gets at a price that only running tasks should pay.
const NOT_INHERITED: u64 = VmFlags::DONT_COPY
    | VmFlags::WIPE_ON_FORK
    | VmFlags::HUGETLB
    | VmFlags::SHADOW_STACK
    | VmFlags::UFFD_MISSING
    | VmFlags::UFFD_WP
    | VmFlags::UFFD_MINOR;

impl Later {
    fn write(&self, pages: &PageStore, kernel: &Kernel, stats: &mut DumpStats) -> Result<()> {
        let dir = ProcDir::open(self.copy.0)?;
        stats.memwrite.start();
        let mut out = pages.create(ImageKind::Pagemap, self.task.0.cast_unsigned().into())?;
        let mut copier = Copier::new(&dir, &mut out, &self.stacks)?;
        let scanned = Scanner::new(&dir, kernel)?
            .pages(&self.vmas, None, |vma, start, end, _| copier.add(vma, start, end))?;
        copier.flush()?;
        drop(copier);
        // Its end while it was read would have looked like memory that is gone.
        self.copy.check()?;
        let Written { written, .. } = out.finish()?;
        stats.memwrite.stop();
        stats.pages_scanned += scanned;
        stats.pages_written += written;
        Ok(())
    }
}

/// A process that holds a task's memory. Dropped, it ends; so it does if we are killed.
#[derive(Debug)]
pub struct MemoryCopy(RealPid);

impl MemoryCopy {
    /// Takes over the copy that was just made.
    fn take(pid: u64) -> Result<MemoryCopy> {
        let pid = i32::try_from(pid).map(RealPid).map_err(|_| Error::bug("a copy without a pid"))?;
        ptrace::seize(pid, ptrace::O_EXITKILL).during(|| format!("copy {pid}"))?;
        let copy = MemoryCopy(pid);
        // Until it has closed its descriptors, others may wait in vain for the last one to be closed.
        let fds = format!("/proc/{pid}/fd");
        while std::fs::read_dir(&fds).is_ok_and(|mut list| list.next().is_some()) {
            crate::interrupt::check()?;
            std::thread::yield_now();
        }
        copy.check()?;
        Ok(copy)
    }

    fn check(&self) -> Result<()> {
        match wait::poll(self.0)? {
            Some(status) if status.is_end() => {
                Err(Error::host(format!("the copy of its memory has ended: {status:?}"))
                    .remedy("dump without --background"))
            }
            _ => Ok(()),
        }
    }
}

impl Drop for MemoryCopy {
    fn drop(&mut self) {
        let _ =
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.0.0), nix::sys::signal::Signal::SIGKILL);
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        loop {
            match wait::until(self.0, deadline) {
                Ok(Some(status)) if !status.is_end() => {}
                Err(e) if !matches!(e.kind(), Kind::TaskDied(_)) => {
                    log::error!("The copy {} of a task's memory may be left: {e}", self.0);
                    return;
                }
                _ => return,
            }
        }
    }
}
