//! The dump: a running tree becomes images.
//!
//! ```text
//! seize -> collect -> for each task: signals -> infect -> ask, files -> cure -> memory -> core
//!       -> pstree -> inventory -> kill | leave running | leave stopped
//! ```
//!
//! The memory of tasks that have little is written by a second thread, while the next ones are asked.
//!
//! Until the last line everything is undone by guards: tasks are cured and let go as they were found, files
//! created so far are removed.

mod again;
mod anonymous;
mod background;
pub mod collect;
mod core;
mod finish;
pub(crate) mod freezer;
mod guardian;
mod home;
pub(crate) mod identity;
mod later;
mod lazy;
mod listed;
mod mapped;
mod namespaces;
pub mod predump;
pub(crate) mod refuse;
mod rings;
pub mod seize;
mod sums;
mod task;
mod told;

use std::sync::atomic::Ordering;

use background::{Background, Out, Protected};
use finish::Ready;
use guardian::Guardian;
use nix::sched::CloneFlags;
use rcriu_images::ImageDir;

use crate::{
    arch::Layout,
    error::{Context, Result, SysContext},
    files::{self, FilesOut},
    infect::Hints,
    interrupt,
    kernel::Kernel,
    mm::{
        dedup,
        pages::PageStore,
        shmem::SharedOut,
        sysv::{SegmentsOut, Undo},
        track::Tracker,
        vma::{SeenFiles, VmaRules},
        xfer::{Frozen, Link},
    },
    netlock::Locks,
    ns::{net::Networks, user::Ids},
    options::{Afterwards, CpuCap, DumpOptions},
    pstree::{Numbering, RealPid},
    scripts::Stage,
    spread,
    stats::DumpStats,
    task::{
        cgroup::Sets, keys::Keys, landlock::Landlock, lsm::LabelsOut, more::MoreOut, refused::Refusals,
        seccomp::Filters,
    },
};

/// What a dump carries from task to task.
pub struct DumpCx<'a> {
    pub opts: &'a DumpOptions,
    pub kernel: &'a Kernel,
    pub images: &'a ImageDir,
    /// How numbers of tasks read inside of the tree.
    pub numbering: Numbering,
    /// The same of users and groups.
    pub ids: Ids,
    pub files: FilesOut<'a>,
    pub pages: PageStore,
    pub seccomp: Filters,
    pub cgroups: Sets,
    /// What the format has no place for.
    pub more: MoreOut,
    /// State that would be lost: looked for, to be refused.
    pub keys: Keys,
    pub landlock: Landlock,
    /// What security modules say.
    pub labels: LabelsOut,
    pub refusals: Refusals,
    pub stats: DumpStats,
    /// Where this processor keeps its state.
    pub layout: &'static Layout,
    /// What was found out about processes that helps with the next.
    pub hints: Hints,
    pub mapped: SeenFiles,
    /// What decides about mappings.
    pub rules: VmaRules,
    pub shmem: SharedOut,
    pub segments: SegmentsOut,
    pub undo: Undo,
    /// Memory that is served once the images are complete, if any is.
    pub late: Option<Frozen>,
    /// A mapping of uprobes was left out.
    pub uprobes: bool,
    /// What changed since the parent images, and following it from here on.
    pub track: Tracker,
    pub background: Background,
}

impl<'a> DumpCx<'a> {
    /// Nothing is written yet.
    pub(crate) fn new(
        opts: &'a DumpOptions,
        kernel: &'a Kernel,
        images: &'a ImageDir,
        (pages, track): (PageStore, Tracker),
        protected: Vec<Protected>,
        without_undo: RealPid,
        (tree, networks, lock): (&collect::Pstree, Networks, Option<Locks>),
    ) -> Result<Self> {
        let shmem_dev = shmem_dev()?;
        let numbering = tree.numbering();
        let ids = home::ids(tree, images)?;
        Ok(DumpCx {
            opts,
            kernel,
            images,
            files: FilesOut::new(
                opts,
                kernel,
                images,
                (pages.clone(), shmem_dev),
                files::Where {
                    numbering: numbering.clone(),
                    ids: ids.clone(),
                    roots: home::roots(tree)?,
                    own: tree.namespaces,
                    networks,
                    spaces: home::spaces(tree)?,
                    lock,
                },
            ),
            numbering,
            landlock: Landlock::ask(tree, ids.clone())?,
            ids,
            pages,
            labels: LabelsOut::ask(),
            seccomp: Filters::default(),
            cgroups: Sets::new(&opts.common.cgroup)?,
            more: MoreOut::new(images),
            keys: Keys::new(),
            refusals: Refusals::ask(),
            stats: DumpStats::default(),
            layout: Layout::host(),
            hints: Hints::default(),
            mapped: SeenFiles::default(),
            rules: VmaRules { allow_uprobes: opts.common.allow_uprobes, shmem_dev },
            shmem: SharedOut::default(),
            segments: SegmentsOut::default(),
            undo: Undo::new(without_undo, tree.spaces(CloneFlags::CLONE_NEWIPC).len() > 1),
            late: opts.common.lazy.enabled.then(Frozen::default),
            uprobes: false,
            track,
            background: Background::new(opts, protected),
        })
    }
}

/// Dumps the tree of `opts.pid`.
pub fn dump(opts: &DumpOptions, kernel: &Kernel) -> Result<()> {
    let root = RealPid(opts.pid);
    log::info!("Dumping processes (pid: {root})");
    let notify = |stage| opts.common.notifier.notify(stage, Some(root));
    background::check(opts)?;
    sums::check(opts)?;
    notify(Stage::PreDump)?;
    let images = opts.common.images_dir.images()?;
    let created = Created::new(&images);
    if opts.common.cpu_cap.contains(CpuCap::IMAGE) {
        crate::cpuinfo::dump(&images)?;
    }
    // A page server that is not there is noticed before anything is frozen.
    let pages = PageStore::of_dump(images.clone(), Link::connect(&opts.common)?, opts.compress);
    let pages = pages.with_sums(opts.checksum);

    // The same for a port that is taken.
    let listener = lazy::listen(opts)?;

    // Following ends with the tree.
    let follow = opts.track_mem && opts.afterwards != Afterwards::Kill;
    let track = Tracker::new(opts, kernel, &images, follow)?;
    sums::check_parent(&images, opts)?;

    let mut stats = DumpStats::default();
    let guardian = Guardian::start(opts.freeze_cgroup.clone(), kernel)?;
    // What a snapshot of a running tree needs to be ready before.
    let protected = background::prepare(opts, kernel, guardian.ledger(), &mut stats)?;
    stats.freezing.start();
    // From here on nothing in the tree runs; dropped, everything goes on as it was found.
    let mut frozen = seize::watched_tree(opts, kernel, guardian)?;
    stats.freezing.stop();
    stats.frozen.start();
    // Needs: the guardian forked, for which this process must have a single thread.
    images.write_behind();
    // Needs: nobody can fork any more.
    let tree = collect::pstree(&frozen, opts.common.shell_job, kernel)?;
    // Some mappings may be known from before.
    let with_maps = protected.is_empty();
    let plain = frozen.guardian().unwrap_or(RealPid(std::process::id().cast_signed()));
    home::check(&tree)?;
    // Needs: nobody runs who could send. Dropped before the tree is let go.
    let networks = home::networks(&tree)?;
    let (network, lock) = home::Network::lock((&tree, &networks), opts, track.run(), frozen.ledger())?;
    // Only now that nothing changes any more can the client tell what is to stay outside.
    let opts = &opts.with_external(opts.common.notifier.query_external()?);
    home::check_first(&tree.tasks[0].dir, tree.tasks[0].virt, opts)?;
    let inside = home::Inside::enter(&tree)?;
    let mut cx =
        DumpCx::new(opts, kernel, &images, (pages, track), protected, plain, (&tree, networks, lock))?;
    cx.stats = stats;
    if let Some((folder, frozen)) = frozen.group() {
        cx.cgroups.set_freezer(folder, frozen)?;
    }
    if tree.namespaces.contains(CloneFlags::CLONE_NEWCGROUP) {
        cx.cgroups.set_namespace(&tree.tasks[0].dir).during(|| "cgroup namespace".into())?;
    }
    let whom = told::whom(&tree, &mut frozen)?;
    // Where somebody reads ahead.
    let whole = spread::is_ahead(whom.len());
    let store = cx.pages.clone();
    // One thread reads ahead, another writes pages behind.
    let ((), written) = spread::behind(
        tree.tasks.len() > later::FEW,
        |pages| later::Pages::write(pages, &store, kernel),
        |later| {
            let each = |about: &told::About<'_>| about.read(with_maps, whole);
            spread::ahead(&whom, each, |next| {
                (0..tree.tasks.len()).try_for_each(|at| {
                    interrupt::check()?;
                    task::dump(&tree, at, next(at), &mut frozen, &mut cx, later)
                })
            })
        },
    )?;
    written.iter().for_each(|counts| counts.add_to(&mut cx.stats));
    // Needs: every mapping and descriptor of every task known.
    anonymous::as_files(&tree, &mut cx)?;
    cx.shmem.dump(&cx.pages)?;
    // In an ipc namespace of the tree's own all segments are dumped with it.
    if !tree.namespaces.contains(CloneFlags::CLONE_NEWIPC) {
        cx.segments.dump(cx.images, &cx.pages)?;
    }
    // Needs: what had to be made for files is on mounts.
    home::dump(&tree, &cx)?;
    let mut stats = std::mem::take(&mut cx.stats);
    stats.shpages_scanned = cx.pages.counts().shmem_scanned.load(Ordering::Relaxed);
    stats.shpages_written = cx.pages.counts().shmem_written.load(Ordering::Relaxed);
    let late = cx.late.take();
    let (pages, mut background) = (cx.pages.clone(), std::mem::take(&mut cx.background));
    let ready = finish::whole_tree(cx, &tree, opts.afterwards != Afterwards::Kill)?;
    drop(inside);
    let Ready { mut track, mut connections, mut more, inventory } = ready;
    if !background.is_empty() {
        // Needs: all but memory read. From here on the tree runs, whatever becomes of the dump.
        notify(Stage::PostDump)?;
        drop(network);
        drop(connections);
        background.take_over(&mut frozen)?;
        background.finish(
            Out { images: &images, pages: &pages, more: &mut more, stats: &mut stats },
            kernel,
            move || frozen.finish(opts.afterwards),
        )?;
        more.finish()?;
        pages.finish()?;
        finish::seal(&pages, inventory, opts)?;
        created.keep();
    } else {
        more.finish()?;
        pages.finish()?;
        finish::seal(&pages, inventory, opts)?;
        // Needs: all pages read, and nothing that can still fail and leave the parent as the newest images.
        track.mark();
        // A complete set stays, also if somebody objects to ending the tree.
        created.keep();
        track.commit();
        if opts.common.auto_dedup && opts.prev_images_dir.is_some() {
            dedup::parents(&images)?;
        }
        notify(Stage::PostDump)?;
        if let (Some(listener), Some(late)) = (listener, late) {
            lazy::serve(listener, late, opts, &images)?;
        }
        if opts.afterwards == Afterwards::Kill {
            connections.settle()?;
            frozen.finish(opts.afterwards)?;
            connections.gone();
            network.stays();
        } else {
            drop(network);
            drop(connections);
            frozen.finish(opts.afterwards)?;
        }
        stats.frozen.stop();
    }
    stats.write(&opts.common.work_dir)?;
    log::info!("Dumping finished successfully");
    Ok(())
}

/// Removes the images created so far, unless they are kept.
struct Created<'a> {
    images: &'a ImageDir,
    keep: bool,
}

impl<'a> Created<'a> {
    fn new(images: &'a ImageDir) -> Self {
        Created { images, keep: false }
    }

    fn keep(mut self) {
        self.keep = true;
    }
}

impl Drop for Created<'_> {
    fn drop(&mut self) {
        if !self.keep
            && let Err(e) = self.images.remove_created()
        {
            log::error!("Can't remove the images of the failed dump: {e}");
        }
    }
}

/// `st_dev` of the kernel's own tmpfs, on which anonymous shared memory lives.
pub(crate) fn shmem_dev() -> Result<u64> {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let file = memfd_create("rcriu", MFdFlags::MFD_CLOEXEC).call("memfd_create")?;
    Ok(nix::sys::stat::fstat(&file).call("fstat")?.st_dev)
}
