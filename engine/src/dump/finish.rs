//! The images of the dump as a whole. The inventory is the last: without it there is no snapshot.

use nix::time::{ClockId, clock_gettime};
use rcriu_images::{ImageDir, ImageKind, magic, pb};

use super::{
    DumpCx,
    collect::{Pstree, Task},
    sums,
};
use crate::{
    error::{Result, SysContext},
    files::Connections,
    mm::{pages::PageStore, track::Tracker},
    options::{DumpOptions, NetworkLock},
    procfs::{ProcDir, timens},
    pstree::{RealPid, TaskState},
    task::{
        cgroup,
        lsm::{Module, policy},
        more::MoreOut,
    },
};

/// `inventory_entry.img_version` of sets with ids and namespaces by number.
const IMG_VERSION: u32 = 2;

/// Core images of tasks that have ended and were not waited for: a name and an exit code are all they have.
pub fn zombies(pstree: &Pstree, images: &ImageDir) -> Result<()> {
    for task in pstree.tasks.iter().filter(|t| !t.state.is_alive()) {
        log::info!("Dumping zombie {} with exit code {:#x}", task.pid, task.stat.exit_code);
        let core = pb::CoreEntry {
            mtype: pb::core_entry::March::X8664 as i32,
            tc: Some(pb::TaskCoreEntry {
                task_state: TaskState::Dead.to_image(),
                exit_code: task.stat.exit_code.cast_unsigned(),
                comm: task.stat.comm.clone(),
                ..pb::TaskCoreEntry::default()
            }),
            ..pb::CoreEntry::default()
        };
        one(images, ImageKind::Core, task.virt.0.cast_unsigned().into(), &core)?;
    }
    Ok(())
}

/// `pstree.img`: parents before children.
pub fn pstree(pstree: &Pstree, images: &ImageDir) -> Result<()> {
    let mut out = images.writer(ImageKind::Pstree, 0);
    for task in &pstree.tasks {
        let parent = task.parent.and_then(|at| pstree.tasks.get(at)).map_or(0, |p| p.virt.0);
        out.write(&entry(task, parent))?;
    }
    Ok(out.finish()?)
}

fn entry(task: &Task, parent: i32) -> pb::PstreeEntry {
    pb::PstreeEntry {
        pid: task.virt.0.cast_unsigned(),
        ppid: parent.cast_unsigned(),
        pgid: task.pgid.0.cast_unsigned(),
        sid: task.sid.0.cast_unsigned(),
        threads: task.threads.iter().map(|(virt, _)| virt.0.cast_unsigned()).collect(),
    }
}

/// What is left to do when all images but the inventory are written: follow changes, let connections go. Dropped,
/// connections go on.
pub struct Ready {
    pub track: Tracker,
    pub connections: Connections,
    /// Complete but for what may still be told of mappings.
    pub more: MoreOut,
    pub inventory: pb::InventoryEntry,
}

/// Everything that is written once all tasks are, but the inventory.
///
/// `stays` says that the tree goes on: names made only for the images are then removed.
pub fn whole_tree(mut cx: DumpCx<'_>, tree: &Pstree, stays: bool) -> Result<Ready> {
    zombies(tree, cx.images)?;
    pstree(tree, cx.images)?;
    if let Some(top) = cx.cgroups.beginning("") {
        cx.files.programs_left(top)?;
    }
    let mut connections = cx.files.finish(stays)?;
    one(cx.images, ImageKind::Seccomp, 0, cx.seccomp.entry())?;
    cx.cgroups.write(cx.images, &cx.opts.common.cgroup)?;
    policy::dump(&cx.labels, cx.images)?;
    clocks(tree, cx.images)?;
    cx.track.write(cx.images)?;
    let mut inventory = inventory(cx.opts, tree.own, cx.labels.host().module);
    cx.track.sign(&mut inventory)?;
    connections.sign(&mut inventory);
    Ok(Ready { track: cx.track, connections, more: cx.more, inventory })
}

/// The inventory, the last image: no inventory, no snapshot. With `--checksum`, sums of all images come before it.
///
/// Precondition: all pages are where `pages` has put them.
pub fn seal(pages: &PageStore, mut inventory: pb::InventoryEntry, opts: &DumpOptions) -> Result<()> {
    let images = &pages.images;
    images.check_written()?;
    // Who knows nothing of compressed pages must not take the set for one without content.
    if opts.compress.is_some() {
        inventory.img_version = magic::IMAGES_PACKED;
    } else if let Some(version) = on_packed(images)? {
        inventory.img_version = version;
    }
    if opts.checksum {
        sums::write(images, &mut inventory, &pages.known())?;
    }
    one(images, ImageKind::Inventory, 0, &inventory)?;
    Ok(images.check_written()?)
}

/// If the parent images, or theirs, have compressed pages, the version of a set on them.
fn on_packed(images: &ImageDir) -> Result<Option<u32>> {
    let Some(parent) = images.parent()? else { return Ok(None) };
    let inventory: Option<pb::InventoryEntry> = parent.read_opt(ImageKind::Inventory, 0)?;
    let version = inventory.map(|inventory| inventory.img_version);
    Ok(version.filter(|version| matches!(*version, magic::IMAGES_PACKED | magic::IMAGES_V1_2)))
}

/// Clocks of the tree at the time of the dump: a restore makes them go on from here. `timens-0.img` for a tree
/// in this process's own time namespace, else the image of the tree's.
fn clocks(tree: &Pstree, images: &ImageDir) -> Result<()> {
    let root = &tree.tasks[0];
    let id = root.ids.time_ns_id.filter(|id| Some(*id) != tree.own.time_ns_id).unwrap_or(0);
    let shift = if id == 0 {
        [0; 2]
    } else {
        let me = ProcDir::open(RealPid(std::process::id().cast_signed()))?;
        let (theirs, ours) = (timens::offsets(&root.dir)?, timens::offsets(&me)?);
        [theirs[0] - ours[0], theirs[1] - ours[1]]
    };
    let now = |clock, shift: i64| -> Result<pb::Timespec> {
        let t = clock_gettime(clock).call("clock_gettime")?;
        let nanos = t.tv_sec() * NANOS + t.tv_nsec() + shift;
        let (sec, nsec) = (nanos.div_euclid(NANOS), nanos.rem_euclid(NANOS));
        Ok(pb::Timespec { tv_sec: sec.cast_unsigned(), tv_nsec: nsec.cast_unsigned() })
    };
    let entry = pb::TimensEntry {
        monotonic: now(ClockId::CLOCK_MONOTONIC, shift[0])?,
        boottime: now(ClockId::CLOCK_BOOTTIME, shift[1])?,
    };
    one(images, ImageKind::Timens, id.into(), &entry)
}

/// Nanoseconds of a second.
const NANOS: i64 = 1_000_000_000;

pub(super) fn inventory(
    opts: &DumpOptions,
    own: pb::TaskKobjIdsEntry,
    module: Option<Module>,
) -> pb::InventoryEntry {
    let network_lock = match opts.network_lock {
        NetworkLock::Iptables => 0,
        NetworkLock::Nftables => 1,
        NetworkLock::Skip => 2,
    };
    pb::InventoryEntry {
        img_version: IMG_VERSION,
        fdinfo_per_id: Some(true),
        root_ids: Some(own),
        ns_per_id: Some(true),
        root_cg_set: Some(cgroup::OWN),
        lsmtype: Some(Module::to_image(module)),
        tcp_close: opts.common.tcp.close.then_some(true),
        network_lock_method: Some(network_lock),
        plugins_entry: Some(pb::PluginsEntry::default()),
        allow_uprobes: opts.common.allow_uprobes.then_some(true),
        ..pb::InventoryEntry::default()
    }
}

/// Writes an image of a single entry.
pub(super) fn one(images: &ImageDir, kind: ImageKind, id: u64, entry: &impl prost::Message) -> Result<()> {
    let mut out = images.writer(kind, id);
    out.write(entry)?;
    Ok(out.finish()?)
}
