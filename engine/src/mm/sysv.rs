//! System V shared memory of the host's ipc namespace: segments that tasks have attached.
//!
//! Such a segment outlives its users, and others may attach it by key. So a dump takes it when all who have it
//! attached are in the tree, and a restore finds one of three things: nothing, then it is made with its number
//! and key; the very segment, attached by nobody, as the end of the tree has left it, then it gets the content
//! it had; or a segment in use, which is refused before anything is made.
//!
//! Which processes attached it last, and when, is not kept. Adjustments of semaphores at exit (SEM_UNDO)
//! belong to the process and no kernel tells them; a task that has any is warned of.

use std::{
    cmp::Ordering,
    collections::BTreeMap,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::sched::CloneFlags;
use rcriu_images::{
    ImageDir, ImageKind,
    pagemap::{PAGE_SIZE, PageReader},
    pb,
};

use super::{pages::PageStore, shmem, status as st, vma::Vma};
use crate::{
    error::{Context, Error, Result, SysContext},
    mm::stored::stored,
    ns::enter::here,
    pstree::RealPid,
    restore::Snapshot,
    sys::{
        kcmp,
        map::{Mapping, Region},
        sysv,
    },
};

/// Numbers of segments and of inodes would meet in the names of images.
const CONTENT: u64 = 1 << 40;
/// `MADV_REMOVE`.
const REMOVE: i32 = libc::MADV_REMOVE;

/// What messages call it.
fn name(id: i32) -> String {
    format!("System V shared memory {id}")
}

/// Segments met by a dump, by the number of their ipc namespace in images and their own, with how often the tree has
/// them attached.
#[derive(Debug, Default)]
pub struct SegmentsOut(BTreeMap<(u32, i32), (OwnedFd, u64)>);

impl SegmentsOut {
    /// Takes note of segment `id` of ipc namespace `space`; `file` was opened with O_PATH.
    pub fn add(&mut self, file: OwnedFd, space: u32, id: i32) {
        self.0.entry((space, id)).or_insert((file, 0));
    }

    /// Takes note of what a task of that namespace has attached.
    pub fn mapped(&mut self, space: u32, vmas: &[Vma]) {
        for vma in vmas.iter().filter(|v| v.is(st::SYSVIPC)) {
            if let Some((_, count)) = self.0.get_mut(&(space, vma.entry.shmid as i32)) {
                *count += 1;
            }
        }
    }

    /// How often the tree has each segment of a namespace attached.
    pub fn attachments(&self, space: u32) -> BTreeMap<i32, u64> {
        self.0
            .range((space, i32::MIN)..=(space, i32::MAX))
            .map(|((_, id), (_, count))| (*id, *count))
            .collect()
    }

    /// Writes all of them.
    ///
    /// Precondition: all tasks have been looked at, and are in the ipc namespace of this process.
    pub fn dump(&self, images: &ImageDir, store: &PageStore) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        let mut out = images.writer(ImageKind::RcriuSegments, 0);
        for ((_, id), (file, count)) in &self.0 {
            let entry = entry(*id, *count).during(|| name(*id))?;
            let whole = entry.size - entry.size % PAGE_SIZE;
            let tail = tail(*id, entry.size).during(|| name(*id))?;
            shmem::dump_with_tail(store, file, entry.content, whole, &tail)?;
            out.write(&entry)?;
        }
        Ok(out.finish()?)
    }
}

/// The last page of a segment that ends inside of it: programs may use all of that page, a read ends earlier.
fn tail(id: i32, size: u64) -> Result<Vec<u8>> {
    let whole = size - size % PAGE_SIZE;
    if whole == size {
        return Ok(Vec::new());
    }
    let region = attach(id, size, true)?;
    let mut page = vec![0; PAGE_SIZE as usize];
    region.read(region.start() + whole, &mut page)?;
    region.unmap()?;
    Ok(page)
}

fn entry(id: i32, count: u64) -> Result<pb::RcriuSegmentEntry> {
    let found = sysv::stat(id)?.ok_or_else(|| Error::host("it is gone"))?;
    if found.attached > count {
        let outside = found.attached - count;
        return Err(Error::unsupported(format!("it is also attached {outside} times outside of the tree"))
            .remedy("dump the tree that holds all who use it"));
    }
    Ok(pb::RcriuSegmentEntry {
        id: id.cast_unsigned(),
        key: found.key,
        mode: found.mode,
        uid: found.uid,
        gid: found.gid,
        cuid: found.cuid,
        cgid: found.cgid,
        size: found.size,
        content: CONTENT | u64::from(id.cast_unsigned()),
    })
}

/// Looks for tasks that have told the kernel to adjust semaphores when they end.
#[derive(Debug)]
pub struct Undo {
    /// A task without a list for that: one without compares equal.
    without: RealPid,
    /// Whether there are semaphores here.
    any: Option<bool>,
}

impl Undo {
    /// `without` is a process that never had a second thread, with which a list would come, and asked for nothing
    /// of the kind itself. Semaphores of `several` ipc namespaces are not looked for.
    pub fn new(without: RealPid, several: bool) -> Undo {
        Undo { without, any: several.then_some(true) }
    }

    fn has_list(&self, task: RealPid) -> bool {
        kcmp::compare(self.without, task, kcmp::What::SysvSem).is_ok_and(|order| order != Ordering::Equal)
    }

    /// Warns of such a task. One with threads has a list in any case, and the kernel does not tell whether it is empty.
    pub fn warn(&mut self, task: RealPid, threads: usize) {
        if !self.has_list(task) {
            return;
        }
        // The first line names the columns.
        let look =
            || !std::fs::read_to_string("/proc/sysvipc/sem").is_ok_and(|list| list.lines().count() < 2);
        if *self.any.get_or_insert_with(look) {
            let does = if threads > 1 { "may use" } else { "uses" };
            log::warn!("Task {task} {does} SEM_UNDO: what is to be undone at its end is not kept");
        }
    }
}

/// Segments a restore has made or taken over; those made are removed on drop.
#[derive(Debug, Default)]
pub struct Segments {
    entries: Vec<pb::RcriuSegmentEntry>,
    made: Vec<i32>,
    /// The ipc namespace they are in, where it is not ours.
    namespace: Option<OwnedFd>,
}

/// Entries of the images, those of segments that tasks have attached.
fn read(snapshot: &Snapshot) -> Result<Vec<pb::RcriuSegmentEntry>> {
    let vmas = snapshot.alive().filter_map(|(_, task)| task.mm.as_ref()).flat_map(|mm| &mm.vmas);
    let mut wanted: Vec<u64> = vmas.filter(|v| v.status & st::SYSVIPC != 0).map(|v| v.shmid).collect();
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    wanted.sort_unstable();
    wanted.dedup();
    let entries = snapshot.dir.read_all::<pb::RcriuSegmentEntry>(ImageKind::RcriuSegments, 0)?;
    let mut by_id: BTreeMap<u64, _> = entries.into_iter().map(|e| (u64::from(e.id), e)).collect();
    let missing = |id| Error::image(format!("System V shared memory {id} is not in the images"));
    wanted.into_iter().map(|id| by_id.remove(&id).ok_or_else(|| missing(id))).collect()
}

/// Whether the segment is there already: the one that the tree has left.
fn is_there(entry: &pb::RcriuSegmentEntry) -> Result<bool> {
    let id = entry.id.cast_signed();
    match sysv::stat(id)? {
        Some(found) if (found.key, found.size, found.attached) == (entry.key, entry.size, 0) => Ok(true),
        Some(found) => {
            let why = match found.attached {
                0 => "another segment has its number".to_owned(),
                n => format!("it is in use, attached {n} times"),
            };
            Err(Error::host(why).remedy(format!("end its users, or remove it with ipcrm -m {id}")))
        }
        None => match (entry.key != 0).then(|| sysv::by_key(entry.key)).flatten() {
            Some(other) => Err(Error::host(format!("segment {other} has its key {:#x}", entry.key))
                .remedy(format!("remove that with ipcrm -m {other}"))),
            None if !std::path::Path::new(sysv::NEXT_ID).exists() => {
                Err(Error::host(format!("this kernel lets nobody choose its number ({})", sysv::NEXT_ID)))
            }
            None => Ok(false),
        },
    }
}

/// Whether all segments can be made or taken over. Creates nothing.
pub fn check(snapshot: &Snapshot) -> Result<()> {
    let checked = |e: &pb::RcriuSegmentEntry| is_there(e).during(|| name(e.id.cast_signed())).map(drop);
    read(snapshot)?.iter().try_for_each(checked)
}

impl Segments {
    /// Makes or takes over all segments and gives them their content, in the engine; in the ipc namespace that the tree
    /// enters, if it enters one.
    pub fn make(snapshot: &Snapshot, entered: Option<BorrowedFd<'_>>) -> Result<Segments> {
        let namespace = entered.map(|fd| fd.try_clone_to_owned().call("dup")).transpose()?;
        let mut segments = Segments { entries: read(snapshot)?, made: Vec::new(), namespace };
        // What was made is removed when it is dropped, also if another one fails.
        let done = Segments::there(entered, || segments.make_all(snapshot));
        done.map(|()| segments)
    }

    fn there<T>(namespace: Option<BorrowedFd<'_>>, act: impl FnOnce() -> Result<T>) -> Result<T> {
        match namespace {
            Some(namespace) => {
                here(namespace, CloneFlags::CLONE_NEWIPC, act).during(|| "ipc namespace".into())
            }
            None => act(),
        }
    }

    fn make_all(&mut self, snapshot: &Snapshot) -> Result<()> {
        let segments = self;
        for at in 0..segments.entries.len() {
            let entry = segments.entries[at];
            let id = entry.id.cast_signed();
            (|| {
                if !is_there(&entry)? {
                    sysv::create(id, entry.key, entry.size, entry.mode)?;
                    segments.made.push(id);
                }
                sysv::set_owner(id, entry.uid, entry.gid, entry.mode)?;
                fill(&entry, &snapshot.dir)
            })()
            .during(|| name(id))?;
        }
        Ok(())
    }

    /// All tasks have attached theirs: what was to go with its last user may be told so now.
    pub fn attached(&self) -> Result<()> {
        if self.entries.is_empty() {
            return Ok(());
        }
        Segments::there(self.namespace.as_ref().map(AsFd::as_fd), || self.all_attached())
    }

    fn all_attached(&self) -> Result<()> {
        for entry in &self.entries {
            let id = entry.id.cast_signed();
            if entry.mode & sysv::LOCKED != 0 {
                sysv::lock(id).during(|| name(id))?;
            }
            if entry.mode & sysv::DEST != 0 {
                sysv::remove(id).during(|| name(id))?;
            }
        }
        Ok(())
    }

    /// The restore is done.
    pub fn keep(mut self) {
        self.made.clear();
    }
}

impl Drop for Segments {
    fn drop(&mut self) {
        let made = std::mem::take(&mut self.made);
        if made.is_empty() {
            return;
        }
        let namespace = self.namespace.as_ref().map(AsFd::as_fd);
        if let Err(e) = Segments::there(namespace, || {
            remove_all(made);
            Ok(())
        }) {
            log::error!("System V shared memory stays: {e}");
        }
    }
}

fn remove_all(made: Vec<i32>) {
    for id in made {
        match sysv::stat(id) {
            // It goes with its last user.
            Ok(Some(found)) if found.mode & sysv::DEST != 0 => {}
            Ok(Some(_)) => {
                if let Err(e) = sysv::remove(id) {
                    log::error!("{} stays: {e}", name(id));
                }
            }
            _ => {}
        }
    }
}

/// Attaches a segment of `size` bytes somewhere.
fn attach(id: i32, size: u64, read_only: bool) -> Result<Region> {
    let len = size.checked_next_multiple_of(PAGE_SIZE).ok_or_else(|| Error::image("its size"))?;
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE) as u32;
    let region = Region::anywhere(len, Mapping { prot: 0, flags, file: None })?;
    sysv::attach(id, &region, read_only)?;
    Ok(region)
}

/// Attaches segment `id` somewhere in a task being restored, to be mapped again from there.
pub fn attach_for(id: u64, read_only: bool) -> Result<Region> {
    let id = u32::try_from(id).map_err(|_| Error::image("a number of System V shared memory"))?.cast_signed();
    let found = sysv::stat(id)?.ok_or_else(|| Error::host("it is gone"));
    found.and_then(|found| attach(id, found.size, read_only)).during(|| name(id))
}

fn fill(entry: &pb::RcriuSegmentEntry, images: &ImageDir) -> Result<()> {
    let region = attach(entry.id.cast_signed(), entry.size, false)?;
    let pages = PageReader::open(images, ImageKind::ShmemPagemap, entry.content)?
        .ok_or_else(|| Error::image("its content is missing"))?;
    if pages.pagemap(0).and_then(|m| m.regions.last()).is_some_and(|last| last.end() > region.len()) {
        return Err(Error::image("there are pages behind its end"));
    }
    for run in pages.runs(0, region.len()) {
        crate::interrupt::check()?;
        let at = region.start() + run.vaddr;
        match stored(&pages, &run)? {
            // Others may have written to it meanwhile.
            None => region.advise(at, run.len, REMOVE)?,
            Some(content) => content.read_into(&region, 0, at, run.len)?,
        }
    }
    region.unmap()
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    #[test]
    fn only_processes_with_threads_or_undo_have_a_list() {
        let sleep = || Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = |child: &Child| RealPid(child.id().cast_signed());
        let (mut one, mut other) = (sleep(), sleep());
        std::thread::spawn(|| ()).join().unwrap();
        let undo = Undo::new(pid(&one), false);
        let has = [undo.has_list(pid(&other)), undo.has_list(RealPid(std::process::id().cast_signed()))];
        for child in [&mut one, &mut other] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        if kcmp::compare(RealPid(1), RealPid(1), kcmp::What::SysvSem).is_ok() {
            assert_eq!(has, [false, true]);
        }
    }
}
