//! The pre-dump: memory is written ahead while the tree goes on, so that the dump that follows has little to do.
//!
//! ```text
//! seize -> for each task: mappings, pages that changed -> mark -> let go -> read and write pages -> inventory
//! ```
//!
//! The tree is frozen only while it is looked at. Pages are read while it runs again: one that changes meanwhile
//! is written since it was marked, so the next dump takes it anew, and what is read here of it does not matter.
//! Nor do pages that go away, or tasks that end. With `--pre-dump-mode read`, memory that its task may not read
//! is left to the dump, as CRIU does.

use std::os::fd::OwnedFd;

use rcriu_images::ImageKind;

use super::{Created, collect, finish, home, refuse, seize, sums};
use crate::{
    error::{Context, Error, Kind, Result},
    infect::{Infected, StoppedTask},
    interrupt,
    kernel::Kernel,
    mm::{
        dedup,
        pagemap::Scanner,
        pages::{Copier, PageStore, Written},
        track::Tracker,
        vma::{self, MappedFiles, Vma, VmaRules},
        xfer::Link,
    },
    options::{DumpOptions, PreDumpMode},
    procfs::{ProcDir, maps, stat::Stat},
    pstree::{FileId, RealPid, VirtPid},
    stats::DumpStats,
    task::lsm,
};

/// A task whose memory is to be written, as it was when it was frozen.
struct Ahead {
    pid: RealPid,
    virt: VirtPid,
    dir: ProcDir,
    vmas: Vec<Vma>,
    /// Pages its stack pointers point to.
    stacks: Vec<u64>,
    /// Pages with content, each run in one mapping: start, end, whether the parent images have them.
    runs: Vec<(u64, u64, bool)>,
}

/// Writes the memory of the tree of `opts.pid`, which goes on.
pub fn pre_dump(opts: &DumpOptions, kernel: &Kernel) -> Result<()> {
    if !opts.track_mem {
        log::info!("Enforcing memory tracking for pre-dump.");
    }
    let images = opts.common.images_dir.images()?;
    let created = Created::new(&images);
    sums::check(opts)?;
    let store = PageStore::of_dump(images.clone(), Link::connect(&opts.common)?, opts.compress);
    let mut track = Tracker::new(opts, kernel, &images, true)?;
    sums::check_parent(&images, opts)?;
    let rules = VmaRules { allow_uprobes: opts.common.allow_uprobes, shmem_dev: super::shmem_dev()? };

    let mut stats = DumpStats::default();
    stats.freezing.start();
    let frozen = seize::tree(opts, kernel)?;
    stats.freezing.stop();
    stats.frozen.start();
    let root = RealPid(opts.pid);
    home::check_first(&ProcDir::open(root)?, collect::virt(root)?, opts)?;
    let mut tasks = Vec::new();
    for (at, _) in frozen.preorder() {
        interrupt::check()?;
        let task = &frozen.tasks()[at];
        let Some(stopped) = task.stopped.as_ref() else { continue };
        let pid = task.pid;
        match look(pid, stopped, rules, (opts, kernel), &mut track, &mut stats) {
            // Killed meanwhile: whoever it was needs no images.
            Err(e) if *e.kind() == Kind::TaskDied(pid.0) => log::info!("Task {pid} has ended"),
            ahead => tasks.push(ahead.during(|| refuse::name(pid))?),
        }
    }
    // Needs: all tasks known to be fit for it, and none has run since its pages were looked at.
    track.mark();
    let mut inventory = finish::inventory(opts, collect::own(kernel)?, lsm::Host::look().module);
    inventory.pre_dump_mode = Some(match opts.pre_dump_mode {
        PreDumpMode::Splice => 0,
        PreDumpMode::Read => 1,
    });
    track.sign(&mut inventory)?;
    drop(frozen);
    stats.frozen.stop();

    log::info!("Pre-dumping tasks' memory");
    stats.memwrite.start();
    for task in &tasks {
        log::info!("\tPre-dumping {}", task.virt);
        let written = write(task, &store).during(|| refuse::name(task.pid))?;
        stats.pages_written += written.written;
        stats.pages_skipped_parent += written.in_parent;
    }
    store.finish()?;
    stats.memwrite.stop();
    track.write(&images)?;
    finish::seal(&store, inventory, opts)?;
    created.keep();
    track.commit();
    if opts.common.auto_dedup && opts.prev_images_dir.is_some() {
        dedup::parents(&images)?;
    }
    stats.write(&opts.common.work_dir)?;
    log::info!("Pre-dumping finished successfully");
    Ok(())
}

/// Finds out what is to be written of a frozen task.
fn look(
    pid: RealPid,
    stopped: &StoppedTask,
    rules: VmaRules,
    (opts, kernel): (&DumpOptions, &Kernel),
    track: &mut Tracker,
    stats: &mut DumpStats,
) -> Result<Ahead> {
    let dir = ProcDir::open(stopped.live())?;
    let virt = collect::virt(pid)?;
    log::info!("========================================");
    // Of the leader, which keeps its time of start even when it has ended.
    let stat = Stat::read(&ProcDir::open(pid)?)?;
    log::info!("Pre-dumping task (pid: {pid} comm: {})", stat.comm.escape_ascii());
    log::info!("========================================");
    stats.memdump.start();
    let maps = maps::smaps(&dir)?;
    let mut task = track.task((pid, virt), stat.start_time, &dir, &maps)?;
    if track.must_enter(&task) {
        let infected = Infected::new(stopped, kernel)?;
        track.enter(&mut task, &infected);
        infected.cure()?;
    }
    let mut vmas = vma::collect(&dir, &maps, rules, &mut Unnumbered, &mut vma::SeenFiles::default())?;
    task.look(&vmas);
    vmas.retain(|vma| vma.can_be_tracked() && (vma.readable() || opts.pre_dump_mode != PreDumpMode::Read));
    let mut runs = Vec::new();
    stats.pages_scanned +=
        Scanner::new(&dir, kernel)?.pages(&vmas, task.marks(), |_, start, end, unchanged| {
            if !unchanged {
                runs.push((start, end, false));
                return Ok(());
            }
            task.split(start, end, |from, to, stored| {
                runs.push((from, to, stored));
                Ok(())
            })
        })?;
    track.keep(task);
    stats.memdump.stop();
    Ok(Ahead { pid, virt, dir, vmas, stacks: super::task::stacks(stopped), runs })
}

/// `pagemap-PID.img` and its pages, of a task that runs.
fn write(task: &Ahead, store: &PageStore) -> Result<Written> {
    let mut out = store.create(ImageKind::Pagemap, task.virt.0.cast_unsigned().into())?;
    // A task that has ended has no pages any more; those it had need not be in a parent.
    match Copier::new(&task.dir, &mut out, &task.stacks) {
        Ok(copier) => {
            let mut copier = copier.running();
            let mut vmas = task.vmas.iter().peekable();
            for (start, end, in_parent) in &task.runs {
                while vmas.next_if(|vma| vma.entry.end <= *start).is_some() {}
                match vmas.peek() {
                    _ if *in_parent => copier.parent(*start, *end)?,
                    Some(vma) => copier.add(vma, *start, *end)?,
                    None => return Err(Error::bug("pages without a mapping")),
                }
            }
            copier.flush()?;
        }
        Err(e) if matches!(e.kind(), Kind::TaskDied(_)) => log::info!("Task {} has ended", task.pid),
        Err(e) => return Err(e),
    }
    out.finish()
}

/// Files are not dumped ahead, so they need no numbers.
struct Unnumbered;

impl MappedFiles for Unnumbered {
    fn mapped(&mut self, _: OwnedFd) -> Result<FileId> {
        Ok(FileId(1))
    }

    fn shared(&mut self, _: OwnedFd, _: u64) {}

    fn segment(&mut self, _: OwnedFd, _: i32) {}
}
