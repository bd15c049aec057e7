//! `--background`: the tree runs again before its memory is copied.
//!
//! ```text
//! protected   large memory in small pages: write-protected before the freeze, read behind the running task
//! copied      everything else: the frozen task forks a copy that only holds its memory
//! frozen      what cannot be had in either way, or not without being noticed; the log says why
//! ```
//!
//! Either way the pages are those of the moment at which the tree was frozen.

mod calls;
mod choose;
mod chunks;
mod copied;
mod follow;
mod protected;
mod server;
mod write;

use rcriu_images::{ImageDir, ImageKind, pb};

pub use self::protected::{Protected, prepare};
use self::{
    chunks::Reader,
    copied::{Later, MemoryCopy},
    follow::{Followed, Follower, Progress},
};
use super::{finish::one, seize::Frozen};
use crate::{
    error::{Context, Error, Result},
    infect::{Infected, StoppedTask},
    kernel::Kernel,
    mm::{more, pages::PageStore, vma::Vma},
    options::{Afterwards, DumpOptions},
    procfs::{
        maps::{Map, VmFlags},
        status::Status,
    },
    pstree::{RealPid, VirtPid},
    stats::DumpStats,
    task::more::MoreOut,
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
    protected: Vec<Protected>,
    later: Vec<Later>,
    held: Vec<Held>,
}

/// A task that runs under protection.
#[derive(Debug)]
struct Held {
    protected: Protected,
    kept: Kept,
    /// Its threads, from the end of the freeze until they run.
    stopped: Option<StoppedTask>,
}

/// What is kept of a protected task until flags of its mappings are known.
#[derive(Debug)]
pub struct Kept {
    pub task: VirtPid,
    /// Its mappings at the freeze. Until [`write::mappings`] their flags are those of before.
    pub maps: Vec<Map>,
    pub vmas: Vec<Vma>,
    /// Pages its stack pointers point to, in order.
    pub stacks: Vec<u64>,
    /// Memory policies of mappings, by their start.
    pub policies: Vec<(u64, pb::RcriuPolicyEntry)>,
    /// Complete but for the mappings.
    pub mm: pb::MmEntry,
}

/// Where images go.
pub struct Out<'a> {
    pub images: &'a ImageDir,
    pub pages: &'a PageStore,
    pub more: &'a mut MoreOut,
    pub stats: &'a mut DumpStats,
}

impl Background {
    /// As the options say.
    pub fn new(opts: &DumpOptions, protected: Vec<Protected>) -> Self {
        Background { wanted: opts.background, protected, ..Background::default() }
    }

    /// The protection of a task, if it has any.
    pub fn protected(&mut self, pid: RealPid) -> Option<Protected> {
        let at = self.protected.iter().position(|p| p.pid == pid)?;
        Some(self.protected.swap_remove(at))
    }

    /// Whether all memory is read while the tree stands still.
    pub fn is_off(&self) -> bool {
        !self.wanted && self.protected.is_empty()
    }

    /// Whether nothing was left for later.
    pub fn is_empty(&self) -> bool {
        self.later.is_empty() && self.held.is_empty()
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

    /// The same for a protected task; the rest of its images is left too, as far as it depends on its mappings.
    pub fn hold(&mut self, protected: Protected, kept: Kept) {
        self.held.push(Held { protected, kept, stopped: None });
    }

    /// Takes the tasks over that are to be followed. What was protected in vain is let go.
    pub fn take_over(&mut self, frozen: &mut Frozen) -> Result<()> {
        self.protected.clear();
        for held in &mut self.held {
            held.stopped = frozen.task_mut(held.protected.pid)?.stopped.take();
        }
        Ok(())
    }

    /// Writes all pagemaps and pages that were left for later, and the images that depend on mappings, while the
    /// tasks run. `thaw` lets those go that are not followed.
    pub fn finish(mut self, out: Out<'_>, kernel: &Kernel, thaw: impl FnOnce() -> Result<()>) -> Result<()> {
        let later = std::mem::take(&mut self.later);
        let progress = Progress::new(self.held.len());
        let mut followed = Vec::new();
        let mut work = Vec::new();
        for Held { protected, kept, stopped } in &mut self.held {
            let stopped = stopped.take().ok_or_else(|| Error::bug("a task that is not stopped"))?;
            let (first, second) = protected.readers()?;
            let protected = &*protected;
            followed.push(Followed::new(protected, stopped, first, kept));
            work.push((protected, kept, second));
        }
        if work.is_empty() {
            thaw()?;
            out.stats.frozen.stop();
            return copies(&later, out, kernel);
        }
        let mut follower = Follower::start(followed, &progress)?;
        thaw()?;
        out.stats.frozen.stop();
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let _over = progress.until_dropped();
                write_all(work, &later, out, &progress, kernel)
            });
            let result = follower.run();
            progress.stop();
            drop(follower);
            let written = writer.join().unwrap_or_else(|_| Err(Error::bug("writing memory panicked")));
            result.and(written)
        })
    }
}

fn write_all(
    mut work: Vec<(&Protected, &mut Kept, Reader)>,
    later: &[Later],
    out: Out<'_>,
    progress: &Progress,
    kernel: &Kernel,
) -> Result<()> {
    for (at, (protected, kept, _)) in work.iter_mut().enumerate() {
        write::mappings(protected, kept, kernel).during(|| format!("mappings of task {}", kept.task))?;
        progress.known(at);
    }
    for (protected, kept, reader) in work {
        let mut mapping = more::collect(&kept.maps);
        more::add_policies(&mut mapping, &kept.vmas, std::mem::take(&mut kept.policies));
        out.more.set_mapping(kept.task, mapping);
        kept.mm.vmas = kept.vmas.iter().map(|v| v.entry).collect();
        one(out.images, ImageKind::Mm, kept.task.0.cast_unsigned().into(), &kept.mm)?;
        write::pages(protected, kept, reader, out.pages, progress, out.stats)
            .during(|| format!("memory of task {}", kept.task))?;
    }
    copies(later, out, kernel)
}

fn copies(later: &[Later], out: Out<'_>, kernel: &Kernel) -> Result<()> {
    for later in later {
        later.write(out.pages, kernel, out.stats).during(|| format!("memory of task {}", later.task))?;
    }
    Ok(())
}

/// What a child does not get, or gets at a price that only running tasks should pay.
const NOT_INHERITED: u64 = VmFlags::DONT_COPY
    | VmFlags::WIPE_ON_FORK
    | VmFlags::HUGETLB
    | VmFlags::SHADOW_STACK
    | VmFlags::UFFD_MISSING
    | VmFlags::UFFD_WP
    | VmFlags::UFFD_MINOR;
