//! The restore: from images to running tasks.
//!
//! ```text
//! read -> plan -> preflight -> fork tree -> [each task: memory -> files -> folders] -> restorer
//!      -> sigchld -> creds -> complete -> detach
//! ```

mod apart;
pub mod builder;
mod entered;
pub mod finish;
pub mod fork;
pub mod guard;
pub mod handoff;
pub mod home;
mod kinds;
mod limits;
mod mapped;
mod network;
mod networks;
pub(crate) mod passing;
mod pidfile;
pub mod plan;
pub mod preflight;
mod prepare;
pub mod read;
mod root;
mod rounds;
pub mod stages;
mod sums;
pub mod task;
pub mod tree;

use std::mem::ManuallyDrop;
use std::os::fd::AsRawFd;

use nix::sched::CloneFlags;
use restorer::Stage;

use crate::error::{Context, Error, Result};
use crate::faults;
use crate::files::{FilesShared, OpenMasters, Roots, restore_programs};
use crate::interrupt;
use crate::kernel::Kernel;
use crate::mm::{
    lazy::{
        Giver,
        background::{Filler, Kept},
    },
    restore::Prepared,
    sysv::Segments,
};
use crate::options::RestoreOptions;
use crate::pstree::RealPid;
use crate::scripts::Stage as Moment;
use crate::stats::RestoreStats;
use crate::sys::heap;
use crate::task::autogroup;
use crate::task::cgroup::Groups;

use finish::Attached;
use guard::Forked;
use network::Network;
use pidfile::Pidfile;
use plan::Plan;
use preflight::Preflight;
use prepare::{give_away, late_memory, prepare_files, whole_proc};
use stages::Area;
use tree::Role;

pub use read::{Snapshot, TaskImage, TaskIx};
pub use task::TaskCx;

/// Processes of a tree for which forks are made cheap.
const MANY: u32 = 64;
/// Bytes of the heap from which on that is worth while.
const HEAP: u64 = 2 << 20;

/// A tree that runs again.
#[derive(Debug)]
pub struct Restored {
    /// The root task.
    pub root: RealPid,
    /// Our child that still fills its memory, if one does.
    pub filler: Option<Kept>,
}

/// What `--dry-run` asks: everything that can be known before anything is created.
///
/// # Errors
/// Images that cannot be read, a tree that cannot be made; all else stands in the answer.
pub fn dry_run(opts: &RestoreOptions, kernel: &Kernel) -> Result<Preflight> {
    let images = opts.common.images_dir.images()?;
    sums::verify(&images)?;
    let snapshot = Snapshot::read(&images)?;
    let plan = Plan::build(&snapshot, opts, kernel)?;
    Preflight::check(&snapshot, &plan, opts, kernel)
}

/// Restores the tree. The calling process must have one thread; its descriptors may be moved.
///
/// On success the tasks run (or are stopped, as asked). Without `detached` the root task is our child, to be
/// waited for with [`wait_for_all`].
///
/// # Errors
/// Nothing is left behind, except after the network was unlocked: the message says so then.
pub fn restore(opts: &RestoreOptions, kernel: &Kernel) -> Result<Restored> {
    faults::point("restore-read")?;
    heap::take_large_too();
    let images = opts.common.images_dir.images()?;
    // Nothing is made of images that are not as they were written.
    sums::verify(&images)?;
    if opts.common.auto_dedup {
        crate::mm::dedup::check(&images)?;
    }
    // Freeing what there may be very much of takes as long as making it.
    let mut snapshot = ManuallyDrop::new(Snapshot::read(&images)?);
    faults::point("restore-plan")?;
    let plan = ManuallyDrop::new(Plan::build(&snapshot, opts, kernel)?);
    faults::point("restore-preflight")?;
    preflight::raise_pid_max(&snapshot, &plan)?;
    Preflight::check(&snapshot, &plan, opts, kernel)?.into_result()?;
    let notifier = &opts.common.notifier;
    notifier.notify(Moment::PreRestore, None)?;

    let mut stats = RestoreStats::default();
    stats.forking.start();
    let away = |kind| plan.home.is_away(kind);
    let area = Area::new(plan.tree.len())?;
    let files = prepare_files(&mut snapshot, &plan, opts, kernel)?;
    let home = if plan.home.is_ours() { None } else { Some(plan.home.prepare(opts, &files)?) };
    // Needs: the namespace; from here on connections are made, and no packet may meet one that is not whole.
    let mut network = Network::lock(&snapshot, &plan, home.as_ref())?;
    // What it has made is removed on failure.
    let segments = match plan.home.kinds().has(CloneFlags::CLONE_NEWIPC) {
        true => Segments::default(),
        false => {
            let entered = home.as_ref().and_then(|home| home.entered().get(CloneFlags::CLONE_NEWIPC));
            Segments::make(&snapshot, entered)?
        }
    };
    let memory = Prepared::new(&snapshot)?;
    if home.is_none() {
        files.make(&plan.files, &snapshot.dir, opts, Roots::default(), OpenMasters::new())?;
        give_away(files.take_orphans()?, opts)?;
    }
    let (mut giver, mut filler) = late_memory(opts, &snapshot, &files)?;
    let sponsor = giver.as_mut().filter(|_| away(CloneFlags::CLONE_NEWUSER));
    let _sponsor = sponsor.map(|giver| giver.sponsor(|fd| files.keep(fd))).transpose()?;
    if opts.common.auto_dedup {
        // Shared memory has been read by now, that of memfds too.
        crate::mm::dedup::begin(&snapshot.dir)?;
        crate::mm::dedup::shared(&snapshot.dir)?;
    }
    // Needs: nothing of the tree in them. What was made is removed on failure, once nobody is left there.
    let policies = plan.policies.load(plan.labels.host())?;
    let proc = plan.labels.any(&snapshot).then(|| files.keep(whole_proc()?)).transpose()?;
    fork::check_single_threaded()?;
    // Lives longer than the tasks: groups can only be taken back when nobody is in them.
    let mut groups = Groups::prepare(&snapshot.dir, root::groups(&snapshot), &opts.common.cgroup)?;
    // From here on a failure kills what was forked.
    let forked = Forked::new(&area, &plan, &snapshot)?;
    area.open(Stage::Forking, plan.tree.len())?;
    let cx = TaskCx {
        opts,
        kernel,
        snapshot: &snapshot,
        plan: &plan,
        area: &area,
        files: &files,
        giver: giver.as_ref(),
        groups: &groups,
        home: home.as_ref(),
        proc: proc.as_ref().map(AsRawFd::as_raw_fd),
        task: TaskIx::ROOT,
    };
    if plan.tree.len() >= MANY
        && let Err(e) = heap::view_of_file(HEAP)
    {
        log::debug!("The heap stays as it is, which makes forks slower: {e}");
    }
    let (root, placeholders) = root::fork(&cx, memory)?;
    network.made(&plan, root).map_err(|e| area.why(e))?;
    let watch = || forked.watch();
    // What it made outside of the tree's namespaces is removed on failure.
    let outside = match &home {
        Some(home) => {
            let own_groups = plan.home.kinds().has(CloneFlags::CLONE_NEWCGROUP);
            if away(CloneFlags::CLONE_NEWUSER) {
                match own_groups {
                    true => groups.put_at_top(root, set_of_root(&snapshot))?,
                    false => enter_groups(&snapshot, &groups, TaskIx::ROOT, root)?,
                }
            }
            let tell = |moment| match plan.home.is_told() {
                true => notifier.notify(moment, Some(root)),
                false => Ok(()),
            };
            let empty = || tell(Moment::SetupNamespaces);
            let shared: (_, _, &dyn Fn() -> Result<()>) = (&files, &area, &watch);
            let outside = home
                .let_go(&plan.home, (root, &snapshot.dir), empty, shared, |namespace, external| {
                    network.one_more(namespace, external)
                })
                .map_err(|e| area.why(e))?;
            home.await_root(&plan.home, (&files, &plan.files), &area, watch)?;
            if away(CloneFlags::CLONE_NEWUSER) && own_groups {
                groups.put_from_top(root, set_of_root(&snapshot))?;
            }
            tell(Moment::PostSetupNamespaces)?;
            give_away(files.take_orphans()?, opts)?;
            outside
        }
        None => None,
    };
    area.await_all(Stage::Forking, watch)?;
    // Sessions and groups are made; what was only needed for them goes.
    area.let_end()?;
    wait_for_ends(&plan, &area, &forked)?;
    files.forked()?;
    if away(CloneFlags::CLONE_NEWUSER) {
        for (ix, _) in snapshot.alive().skip(1) {
            if let Some(pid) = forked.real(ix)? {
                enter_groups(&snapshot, &groups, ix, pid)?;
            }
        }
    }
    faults::point("restore-forked")?;
    stats.forking.stop();

    stats.restore.start();
    let threads: u32 = snapshot.alive().map(|(_, t)| t.threads.len() as u32).sum();
    // From here on our own end would be the end of all.
    if away(CloneFlags::CLONE_NEWPID) {
        forked.learn_leaders()?;
    }
    let mut attached = Attached::leaders(&snapshot, &area)?;
    area.open(Stage::Restore, threads)?;
    area.await_all(Stage::Restore, watch)?;
    files.mapped()?;
    segments.attached()?;
    plan.home.attached(root, &files)?;
    drop(placeholders);
    area.open(Stage::RestoreSigchld, threads)?;
    area.await_all(Stage::RestoreSigchld, watch)?;
    faults::point("restore-rebuilt")?;
    notifier.notify(Moment::PostRestore, Some(root))?;
    let pidfile = Pidfile::write(opts, root)?;
    interrupt::check()?;
    // Before filters are installed: they sleep while we are attached, or they might kill the last steps.
    if away(CloneFlags::CLONE_NEWPID) {
        forked.learn_threads()?;
    }
    attached.others()?;
    attached.enter_groups(&groups)?;
    groups.settle()?;
    files.attach(&plan.files, &mut groups, &opts.common.cgroup)?;
    restore_programs(&snapshot.dir, &mut groups, &opts.common.cgroup)?;
    autogroup::restore(&snapshot, &plan, &area)?;
    faults::point("restore-seized")?;
    if let (Some(giver), Some(filler)) = (&giver, &mut filler) {
        let leaders = snapshot.alive().map(|(ix, _)| forked.real(ix)).collect::<Result<Vec<_>>>()?;
        filler.arm(giver, leaders.into_iter().flatten())?;
    }

    let go_on = || {
        network.unlock(opts, root);
        files.connect();
    };
    resume(attached, &forked, threads, go_on, opts, root, &mut stats)?;
    groups.freeze();
    if let Some(giver) = &giver {
        giver.finished()?;
    }
    forked.keep();
    if let Some(outside) = outside {
        outside.keep();
    }
    segments.keep();
    policies.keep();
    pidfile.keep();
    files.finished();
    log::info!("Restore finished successfully. Tasks resumed.");
    if !opts.detached {
        // This process stays for as long as the tree does.
        drop((ManuallyDrop::into_inner(plan), ManuallyDrop::into_inner(snapshot)));
    }
    if let Err(e) = notifier.notify(Moment::PostResume, Some(root)) {
        log::error!("{e}");
    }
    Ok(Restored { root, filler: filler.and_then(Filler::keep) })
}

/// From waiting threads to running tasks. `go_on` lets connections go on.
fn resume(
    mut attached: Attached<'_>,
    forked: &Forked<'_>,
    threads: u32,
    go_on: impl FnOnce(),
    opts: &RestoreOptions,
    root: RealPid,
    stats: &mut RestoreStats,
) -> Result<()> {
    let area = forked.area();
    area.open(Stage::RestoreCreds, threads)?;
    area.await_all(Stage::RestoreCreds, || forked.watch())?;
    attached.schedule()?;
    stats.restore.stop();
    // Every thread waits for the last stage: stop it there, so that its way out can be followed.
    attached.step_by_calls()?;
    area.open(Stage::Complete, 0)?;
    attached.catch()?;
    faults::point("restore-caught")?;
    // Before anything runs: once the first task does, our end undoes nothing any more.
    [stats.pages_compared, stats.pages_skipped_cow, stats.pages_restored] = area.pages();
    if let Err(e) = stats.write(&opts.common.work_dir) {
        log::warn!("stats-restore was not written: {e}");
    }
    let guardian = attached.guard()?;
    attached.clean(opts.leave_stopped)?;
    attached.keep(guardian)?;
    // The network is open: what fails from here on may lose data.
    go_on();
    if let Err(e) = opts.common.notifier.notify(Moment::PreResume, Some(root)) {
        log::error!("{e}");
    }
    attached
        .detach()
        .map_err(|e| e.remedy("the network was unlocked already: data or connections may be lost"))
}

/// Number of the set of control groups of the root task.
fn set_of_root(snapshot: &Snapshot) -> u32 {
    crate::task::cgroup::set_of(&snapshot.root().core).unwrap_or_else(|| root::groups(snapshot))
}

/// Puts a task into its control groups, from outside: the root comes from ours, all others from those of the root.
fn enter_groups(snapshot: &Snapshot, groups: &Groups, ix: TaskIx, pid: RealPid) -> Result<()> {
    let set = |ix| snapshot.get(ix).and_then(|task| crate::task::cgroup::set_of(&task.core));
    let born = match ix {
        TaskIx::ROOT => root::groups(snapshot),
        _ => set(TaskIx::ROOT).unwrap_or_else(|| root::groups(snapshot)),
    };
    groups.put(pid, born, set(ix).unwrap_or(born)).during(|| format!("task {pid}"))
}

/// Waits until zombies are dead and helpers reaped, so that no SIGCHLD of theirs comes later.
fn wait_for_ends(plan: &Plan, area: &Area, forked: &Forked<'_>) -> Result<()> {
    for (i, node) in plan.tree.nodes.iter().enumerate() {
        let Some(pid) = forked.real(TaskIx(i as u32))? else { continue };
        let ended = || -> Result<bool> {
            Ok(match node.role {
                Role::Alive => true,
                Role::Zombie => preflight::death(pid)?.is_some(),
                Role::Helper => preflight::death(pid)? == Some(None),
            })
        };
        let mut nap = std::time::Duration::from_micros(50);
        while !ended()? {
            interrupt::check()?;
            if area.failed() {
                return Err(area.failure());
            }
            forked.watch().during(|| "while helpers and zombies end".into())?;
            std::thread::sleep(nap);
            nap = (nap * 2).min(std::time::Duration::from_millis(10));
        }
    }
    Ok(())
}

/// Waits until the root task and whatever else became our child has ended.
pub fn wait_for_all() -> Result<()> {
    loop {
        match nix::sys::wait::wait() {
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => interrupt::check()?,
            Err(nix::errno::Errno::ECHILD) => return Ok(()),
            // A real-time signal as the cause of an end has no name.
            Err(nix::errno::Errno::EINVAL) => {}
            Err(e) => return Err(Error::sys("wait", e as i32)),
        }
    }
}
