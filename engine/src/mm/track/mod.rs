//! Which pages changed since the dump before: what makes incremental dumps small.
//!
//! Two ways, the first that the kernel has:
//!
//! * Soft-dirty bits (`CONFIG_MEM_SOFT_DIRTY`): `/proc/PID/clear_refs` clears them, the kernel sets them on a write.
//! * Asynchronous write protection (Linux 6.7): private mappings are registered with a userfaultfd of the task, and
//!   PAGEMAP_SCAN protects the pages that are there. A write lifts the protection inside the kernel; nobody is
//!   asked, nothing waits. What is new, moved or made by fork has no protection and so counts as changed.
//!
//! ```text
//! dump 1   scan -> write pages -> [frozen] protect -> keeper 1 holds the userfaultfds, knows "dump 1"
//! dump 2   parent says "dump 1, keeper 1" -> take over -> scan: protected = in parent -> protect -> keeper 2
//! ```
//!
//! The protection tells of changes since *one* dump. The keeper knows its name; a dump on top of another parent,
//! or one whose keeper has gone, writes all pages and says why. Nothing here ever makes a dump fail, but memory
//! that is registered with somebody else's userfaultfd.
//!
//! A page that did not change is left to the parent only if the parent has it: pages full of zeros are in no
//! images.

mod keeper;
mod kept;
mod task;

use nix::time::{ClockId, clock_gettime};
use rcriu_images::{ImageDir, ImageKind, pb};

pub use self::task::TaskTrack;
use self::{keeper::Keeper, kept::Kept};
use super::pagemap::Marks;
use crate::{
    error::{Context, Error, Result, SysContext},
    kernel::Kernel,
    options::DumpOptions,
    pstree::RealPid,
};

/// Follows the memory of a tree from dump to dump.
///
/// The order in a dump: [`Tracker::new`] before anything is frozen; [`Tracker::task`] for each task, frozen;
/// [`Tracker::mark`] when nothing can fail any more, still frozen; [`Tracker::commit`] when the images are complete.
#[derive(Debug)]
pub struct Tracker {
    /// Name of this dump.
    run: String,
    /// How this kernel tells of changes.
    marks: Option<Marks>,
    parent: Option<Parent>,
    /// Changes are to be followed from here on.
    follow: bool,
    /// Takes the tasks over, with [`Marks::WriteProtect`].
    keeper: Option<Keeper>,
    /// Keepers met; the first may be the parent's.
    kept: Vec<Kept>,
    /// All keepers are in `kept`.
    all_known: bool,
    followed: Vec<TaskTrack>,
}

/// The images this dump builds upon.
#[derive(Debug)]
struct Parent {
    dir: ImageDir,
    /// When they were complete, in microseconds after boot.
    uptime: Option<u64>,
    /// What the kernel remembers is relative to them.
    current: bool,
}

impl Tracker {
    /// Whether there are parent images, or changes are to be followed.
    pub fn is_on(&self) -> bool {
        self.follow || self.parent.is_some()
    }

    /// Looks at the parent images and starts what has to run. `follow` asks to follow changes from this dump on.
    ///
    /// # Errors
    /// Parent images that cannot be reached; following was asked for and the kernel cannot.
    pub fn new(opts: &DumpOptions, kernel: &Kernel, images: &ImageDir, follow: bool) -> Result<Tracker> {
        let marks = if kernel.soft_dirty {
            Some(Marks::SoftDirty)
        } else if kernel.uffd_wp_async && kernel.pagemap_scan && kernel.pidfd_getfd && kernel.pidfd_open {
            Some(Marks::WriteProtect)
        } else {
            None
        };
        if follow && marks.is_none() {
            return Err(Error::host("Tracking memory is not available").remedy(
                "the kernel has neither soft-dirty bits nor asynchronous write protection; omit --track-mem",
            ));
        }
        let mut tracker = Tracker {
            run: crate::process::run_id(),
            marks,
            parent: None,
            follow,
            keeper: None,
            kept: Vec::new(),
            all_known: false,
            followed: Vec::new(),
        };
        tracker.find_parent(opts, images)?;
        if follow && marks == Some(Marks::WriteProtect) {
            match Keeper::start() {
                Ok(keeper) => tracker.keeper = Some(keeper),
                Err(e) => log::warn!("Changes of memory will not be followed from here on: {e}"),
            }
        }
        Ok(tracker)
    }

    fn find_parent(&mut self, opts: &DumpOptions, images: &ImageDir) -> Result<()> {
        let Some(path) = &opts.prev_images_dir else { return Ok(()) };
        images.link_parent(path).during(|| "--prev-images-dir".into())?;
        if path.is_absolute() {
            log::warn!("Absolute paths for parent links may not work on restore!");
        }
        let Some(dir) = images.parent()? else { return Ok(()) };
        let name = path.display();
        let mut parent = Parent { dir, uptime: None, current: false };
        match self.judge(&mut parent) {
            Ok(()) => parent.current = true,
            Err(e) => log::warn!("All pages are written, nothing is left to the parent images {name}: {e}"),
        }
        self.parent = Some(parent);
        Ok(())
    }

    /// Whether what the kernel remembers is relative to the parent; if not, why.
    fn judge(&mut self, parent: &mut Parent) -> Result<()> {
        let inventory: pb::InventoryEntry = parent
            .dir
            .read_opt(ImageKind::Inventory, 0)?
            .ok_or_else(|| Error::image("they have no inventory: that dump was not completed"))?;
        parent.uptime = inventory.dump_uptime;
        match self.marks {
            None => Err(Error::host("this kernel cannot tell which pages changed")),
            Some(Marks::SoftDirty) if parent.uptime.is_none() => {
                Err(Error::image("their inventory has no uptime: changes were not followed from there on"))
            }
            Some(Marks::SoftDirty) => Ok(()),
            Some(Marks::WriteProtect) => self.find_keeper(parent, &inventory),
        }
    }

    fn find_keeper(&mut self, parent: &Parent, inventory: &pb::InventoryEntry) -> Result<()> {
        let tracking: Option<pb::RcriuTrackingEntry> = parent.dir.read_opt(ImageKind::RcriuTracking, 0)?;
        let tracking = tracking.ok_or_else(|| {
            Error::image("changes were not followed from that dump on").remedy("dump with --track-mem")
        })?;
        if tracking.boot_id != boot_id()? {
            return Err(Error::host("they are of another boot of the system, or of another system"));
        }
        let pid = RealPid(tracking.keeper.cast_signed());
        let Some(kept) = Kept::open(pid, Some(tracking.keeper_start))? else {
            return Err(Error::host(format!(
                "the keeper of the tracking (pid {pid}) has gone: its tasks ended, its time was over or it was killed"
            )));
        };
        let since = kept.name().to_owned();
        self.kept.push(kept);
        if since.is_empty() || inventory.dump_criu_run_id.as_ref() != Some(&since) {
            return Err(Error::host("changes were last followed from another dump on"));
        }
        Ok(())
    }

    /// Name of the dump.
    pub fn run(&self) -> &str {
        &self.run
    }

    /// Completes the inventory of this dump.
    pub fn sign(&self, inventory: &mut pb::InventoryEntry) -> Result<()> {
        inventory.dump_criu_run_id = Some(self.run.clone());
        if self.follow {
            let uptime = clock_gettime(ClockId::CLOCK_BOOTTIME).call("clock_gettime")?;
            // In hundredths of a second, as /proc tells start times.
            let hundredths = uptime.tv_sec() * 100 + uptime.tv_nsec() / 10_000_000;
            inventory.dump_uptime = Some(hundredths.cast_unsigned() * 10_000);
        }
        Ok(())
    }

    /// Writes what the next dump needs to find the keeper. Before the inventory.
    pub fn write(&self, images: &ImageDir) -> Result<()> {
        let Some(keeper) = &self.keeper else { return Ok(()) };
        let start = crate::procfs::stat::Stat::read(&crate::procfs::ProcDir::open(keeper.pid())?)?.start_time;
        let mut out = images.writer(ImageKind::RcriuTracking, 0);
        out.write(&pb::RcriuTrackingEntry {
            boot_id: boot_id()?,
            keeper: keeper.pid().0.cast_unsigned(),
            keeper_start: start,
        })?;
        Ok(out.finish()?)
    }

    /// Remembers a task to be followed.
    pub fn keep(&mut self, mut task: TaskTrack) {
        if self.follow {
            task.done_reading();
            self.followed.push(task);
        }
    }

    /// From here on changes count, for all tasks that were kept. What earlier keepers say is void.
    ///
    /// Precondition: the tasks are still frozen.
    pub fn mark(&mut self) {
        if self.marks == Some(Marks::WriteProtect) && self.keeper.is_none() {
            // Whatever is followed already stays as it is.
            return;
        }
        for at in 0..self.kept.len() {
            let rows = self.followed.iter().filter_map(|t| t.row()).filter(|(kept, _)| *kept == at);
            if let Err(e) = self.kept[at].release(rows.map(|(_, row)| row)) {
                log::warn!("Changes of memory are not followed: {e}");
                self.followed.clear();
                return;
            }
        }
        let marks = self.marks;
        self.followed.retain_mut(|task| match task.mark(marks) {
            Ok(()) => true,
            Err(e) => {
                log::warn!("Changes in the memory of task {} are not followed: {e}", task.pid());
                false
            }
        });
    }

    /// The images are complete: the next dump may build upon them.
    pub fn commit(mut self) {
        let Some(keeper) = self.keeper.take() else { return };
        let pid = keeper.pid();
        let held = self.followed.iter().try_for_each(|task| match task.held() {
            Some((uffd, pidfd)) => keeper.hold(task.pid(), task.start(), uffd, pidfd),
            None => Ok(()),
        });
        match held.and_then(|()| keeper.commit(&self.run)) {
            Ok(()) => log::info!("Changes of memory are followed by process {pid}, until its tasks end"),
            Err(e) => log::warn!("Changes of memory are not followed: {e}"),
        }
    }
}

fn boot_id() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    Ok(std::fs::read_to_string(path).call("read(boot_id)")?.trim().to_owned())
}
