//! Older layouts seen as today's.
//!
//! CRIU up to 3.2, and LXD 2.0 with it, spread over many files what is one entry today:
//!
//! | older files | today |
//! |---|---|
//! | `reg-files pipes fifo unixsk inetsk packetsk netlinksk eventfd eventpoll signalfd timerfd inotify fanotify tty tunfile ns-files ext-files` | entries of `files` |
//! | `eventpoll-tfd inotify-wd fanotify-mark` | lists inside their file's entry |
//! | `sigacts-N itimers-N posix-timers-N rlimit-N signal-s-N` | fields of the leader's `core-N` |
//! | `creds-N signal-p-N` | fields of each thread's `core-N` |
//! | `vmas-N` | list in `mm-N` |
//! | `pages-N pages-shmem-N` with an address before each page | `pagemap-N` and raw `pages-N` |
//!
//! What today's form has is taken from there; only what it lacks is looked for in the older files. So
//! these functions serve for every set. The older pages are served by
//! [`PageReader`](crate::pagemap::PageReader).

mod files;

use crate::{
    catalog::ImageKind,
    dir::ImageDir,
    error::{Error, Result},
    magic,
    pagemap::later,
    pb,
};

pub use self::files::{each_file, each_older_file, files};

/// The core of the task `pid`, complete with what older sets keep elsewhere.
pub fn core(dir: &ImageDir, pid: u32) -> Result<pb::CoreEntry> {
    let mut core: pb::CoreEntry = dir.read_one(ImageKind::Core, pid.into())?;
    let id = pid.into();
    if let Some(tc) = &mut core.tc {
        if tc.sigactions.is_empty() {
            tc.sigactions = dir.read_all(ImageKind::Sigact, id)?;
        }
        if tc.timers.is_none() {
            tc.timers = timers(dir, pid)?;
        }
        if tc.rlimits.is_none() {
            let rlimits = optional_list(dir, ImageKind::Rlimit, id)?;
            tc.rlimits = rlimits.map(|rlimits| pb::TaskRlimitsEntry { rlimits });
        }
        if tc.signals_s.is_none() {
            let signals = optional_list(dir, ImageKind::Signal, id)?;
            tc.signals_s = signals.map(|signals| pb::SignalQueueEntry { signals });
        }
    }
    complete_thread(dir, &mut core, pid, pid)?;
    Ok(core)
}

/// The core of the thread `tid` of the task `pid`. In older sets all threads have the credentials of the
/// task.
pub fn thread_core(dir: &ImageDir, pid: u32, tid: u32) -> Result<pb::CoreEntry> {
    if pid == tid {
        return core(dir, pid);
    }
    let mut core: pb::CoreEntry = dir.read_one(ImageKind::Core, tid.into())?;
    complete_thread(dir, &mut core, pid, tid)?;
    Ok(core)
}

fn complete_thread(dir: &ImageDir, core: &mut pb::CoreEntry, pid: u32, tid: u32) -> Result<()> {
    let Some(thread) = &mut core.thread_core else { return Ok(()) };
    if thread.creds.is_none() {
        thread.creds = dir.read_opt(ImageKind::Creds, pid.into())?;
    }
    if thread.signals_p.is_none() {
        let signals = optional_list(dir, ImageKind::Psignal, tid.into())?;
        thread.signals_p = signals.map(|signals| pb::SignalQueueEntry { signals });
    }
    Ok(())
}

fn timers(dir: &ImageDir, pid: u32) -> Result<Option<pb::TaskTimersEntry>> {
    let Some(mut itimers) = dir.reader(ImageKind::Itimers, pid.into())? else { return Ok(None) };
    Ok(Some(pb::TaskTimersEntry {
        real: itimers.one()?,
        virt: itimers.one()?,
        prof: itimers.one()?,
        posix: dir.read_all(ImageKind::PosixTimers, pid.into())?,
    }))
}

fn optional_list<M: crate::Entry>(dir: &ImageDir, kind: ImageKind, id: u64) -> Result<Option<Vec<M>>> {
    dir.reader(kind, id)?.map(|mut reader| reader.all()).transpose()
}

/// The address space of the task `pid` with its VMAs; `None` for a task without one (a zombie).
pub fn mm(dir: &ImageDir, pid: u32) -> Result<Option<pb::MmEntry>> {
    let Some(mut mm) = dir.read_opt::<pb::MmEntry>(ImageKind::Mm, pid.into())? else { return Ok(None) };
    if mm.vmas.is_empty() {
        mm.vmas = dir.read_all(ImageKind::Vmas, pid.into())?;
    }
    Ok(Some(mm))
}

/// Which kernel objects the task `pid` shares with others: from `ids-N`, or from its core.
pub fn ids(dir: &ImageDir, pid: u32) -> Result<Option<pb::TaskKobjIdsEntry>> {
    if let Some(ids) = dir.read_opt(ImageKind::Ids, pid.into())? {
        return Ok(Some(ids));
    }
    Ok(dir.read_opt::<pb::CoreEntry>(ImageKind::Core, pid.into())?.and_then(|core| core.ids))
}

/// Files that are elsewhere than their name says. Older sets tell ghost files by a bit of their number.
pub fn remaps(dir: &ImageDir) -> Result<Vec<pb::RemapFilePathEntry>> {
    const GHOST: u32 = 1 << 31;
    let mut remaps: Vec<pb::RemapFilePathEntry> = dir.read_all(ImageKind::RemapFpath, 0)?;
    for remap in remaps.iter_mut().filter(|r| r.remap_type.is_none()) {
        let ghost = remap.remap_id & GHOST != 0;
        remap.set_remap_type(if ghost { pb::RemapType::Ghost } else { pb::RemapType::Linked });
        remap.remap_id &= !GHOST;
    }
    Ok(remaps)
}

/// The inventory, whose layout must be one that can be read.
///
/// # Errors
/// A version from the future, a way of compression from there, or descriptor tables in files per task (before CRIU 1.0).
pub fn inventory(dir: &ImageDir) -> Result<pb::InventoryEntry> {
    let inventory: pb::InventoryEntry = dir.read_one(ImageKind::Inventory, 0)?;
    let refuse = |why: String| Err(Error::invalid(ImageKind::Inventory.file_name(0), why));
    match inventory.img_version {
        magic::IMAGES_V1 | magic::IMAGES_V1_1 | magic::IMAGES_V1_2 | magic::IMAGES_PACKED => {}
        other => return refuse(format!("image version {other} is not known; 1 to 3 are")),
    }
    if let Err(why) = later::check_mode(&inventory) {
        return refuse(why);
    }
    if !inventory.fdinfo_per_id() {
        return refuse("descriptor tables are stored per task: images this old cannot be read".into());
    }
    Ok(inventory)
}

#[cfg(test)]
mod tests;
