//! Memory of a task, rebuilt inside the process that will become it.
//!
//! A mapping is made at its final address at once, unless something of the engine is there; then it waits
//! in a prepared place and the restorer moves it when the engine's memory has gone. Either way its pages are
//! read in place, and children forked afterwards inherit them, so that memory which parent and child
//! shared copy-on-write is shared again:
//!
//! ```text
//! engine       |exe|        |heap|                        |libs|        |stack|
//! dumped          |a|    |b|    |c|                 |d|
//!                  |      |      `--- collides            |
//! task         |exe|a|   |b|heap|    ...    |c'|  ... |d| |libs|        |stack|
//!               in place                   prepared: congruent modulo 2 MiB, so that moving it moves
//!                                          page tables, not entries
//! ```
//!
//! What the child had not in common with its parent is compared page by page and written only where it
//! differs. Protections, advice and locks come last, at the hand-over, when no child is forked any more; only many
//! small neighbours get their protections before their pages.

mod chosen;
mod entry;
mod fill;
mod finish;
mod join;
mod ranges;
mod room;
mod shared;
mod vdso;

use std::{
    collections::{HashMap, hash_map::Entry},
    os::fd::{AsFd, OwnedFd},
    rc::Rc,
};

use rcriu_images::{ImageKind, pagemap::PageReader, pb};

use crate::error::{Context, Error, Result};
use crate::mm::{
    dedup, hugetlb,
    lazy::{Giver, OfVma},
    more, status as st, sysv,
};
use crate::pstree::FileId;
use crate::restore::{Snapshot, TaskImage};
use crate::sys::map::{Mapping, Region};
use crate::task::numa;

pub use entry::Class;
pub use ranges::{Range, Ranges};

use fill::{Bulk, Comparer, Huge, Memory};
use room::Room;
use shared::SharedAnon;

/// Page tables cover this much each; mappings are moved by distances that are multiples of it.
const TABLE: u64 = 2 << 20;
const READ_WRITE: u32 = (libc::PROT_READ | libc::PROT_WRITE) as u32;

/// A range that is only kept free for something else.
const HIDDEN: Mapping<'static> = Mapping {
    prot: 0,
    flags: (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE) as u32,
    file: None,
};

/// Opens files that are mapped, by number: a new open file of the same inode, with these flags of open(2).
pub type OpenFile<'a> = dyn FnMut(FileId, i32) -> Result<OwnedFd> + 'a;

/// Pages handled, for the statistics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pages {
    /// Read into memory.
    pub restored: u64,
    /// Compared with what the parent had.
    pub compared: u64,
    /// Of these, equal and thus left shared.
    pub shared: u64,
}

/// A mapping of the task in this process.
#[derive(Debug)]
struct Placed {
    /// As in the images of the task that made it.
    vma: pb::VmaEntry,
    region: Region,
    /// Protection it has now.
    prot: u32,
    /// It has a memory policy of its own.
    policy: bool,
}

/// The memory of a task so far; children inherit it by fork.
#[derive(Debug)]
pub struct Prepared {
    placed: Vec<Placed>,
    room: Room,
    shared: Rc<SharedAnon>,
    /// Our own vdso, the same in all that we fork.
    vdso: Rc<vdso::Own>,
    /// Whether the system allows huge pages.
    huge: bool,
    /// What this task has done.
    pub pages: Pages,
    /// Mappings with pages that come late, by their final addresses.
    late: Vec<Range>,
    /// Number of the ipc namespace in which segments were attached.
    ipc: Option<u32>,
}

impl Prepared {
    /// What the engine has before it forks the root task: nothing but the shared anonymous memory of all.
    ///
    /// # Errors
    /// Mappings that cannot be restored or make no sense.
    pub fn new(snapshot: &Snapshot) -> Result<Prepared> {
        let mut all: Vec<Range> = Vec::new();
        for (_, task) in snapshot.alive() {
            let vmas = vmas(task);
            (|| {
                entry::check(vmas)?;
                vmas.iter().try_for_each(|v| entry::classify(v).during(|| entry::name(v)).map(drop))
            })()
            .during(|| task.name())?;
            all.extend(entry::ranges(vmas));
        }
        let mut room = Room::new(all.into_iter().collect())?;
        let shared = SharedAnon::prepare(snapshot, &mut room)?;
        let vdso = Rc::new(vdso::Own::find()?);
        Ok(Prepared {
            placed: Vec::new(),
            room,
            shared: Rc::new(shared),
            vdso,
            huge: Huge::are_allowed(),
            pages: Pages::default(),
            late: Vec::new(),
            ipc: None,
        })
    }
}

fn vmas(task: &TaskImage) -> &[pb::VmaEntry] {
    task.mm.as_ref().map_or(&[], |mm| &mm.vmas)
}

/// Makes the memory of `task` out of what its parent had (`before`). `open` gives the files; what `giver` says
/// comes late is left out. With `free`, pages go from the images as soon as they are in memory. `alone` says that
/// nobody else of the tree forks meanwhile.
///
/// Precondition: runs in the task, before it forks its children.
///
/// # Errors
/// Images that contradict themselves, files that are gone, no room.
pub fn prepare(
    snapshot: &Snapshot,
    task: &TaskImage,
    before: Prepared,
    giver: Option<&Giver>,
    open: &mut OpenFile<'_>,
    free: bool,
    alone: bool,
) -> Result<Prepared> {
    let pages = PageReader::open(&snapshot.dir, ImageKind::Pagemap, u64::from(task.pid.0 as u32))?;
    if let Some(reader) = &pages {
        fill::check_covered(reader, vmas(task))?;
    }
    let freed = match &pages {
        Some(pages) if free => Some(dedup::Restored::open(&snapshot.dir, pages)?),
        _ => None,
    };
    let Prepared { placed: old, mut room, shared, vdso, huge, ipc, .. } = before;
    let mut kept = keep(old, vmas(task), ipc == task.ids.ipc_ns_id)?;
    let mut maker =
        Maker { room: &mut room, shared: &shared, files: HashMap::new(), segments: HashMap::new(), open };
    let mut placed = Vec::with_capacity(vmas(task).len());
    let mut counts = Pages::default();
    let mut late = Vec::new();
    let told = more::Told::new(task.more.as_deref());
    let small = giver.is_some() || task.mm.as_ref().is_some_and(|mm| mm.thp_disabled());
    let bulk = Bulk::new(if small { Huge::never() } else { Huge::if_allowed(huge) }, alone);
    let mut comparer = Comparer::default();
    let mut rest = vmas(task);
    // How many of them are to be made one by one.
    let mut singly = 0;
    while let Some(first) = rest.first() {
        crate::interrupt::check()?;
        let class = entry::classify(first)?;
        if !matches!(class, Class::Private | Class::SharedFile | Class::SharedAnon | Class::Segment) {
            rest = &rest[1..];
            continue;
        }
        let run = if singly > 0 || giver.is_some() {
            singly -= usize::from(singly > 0);
            1
        } else {
            join::together(rest, pages.as_ref(), told, &kept)
        };
        let (these, others) = rest.split_at(run);
        let vma = &join::joined(these, first);
        let during = || entry::name(vma);
        let content =
            pages.as_ref().filter(|p| class == Class::Private && fill::has_content(p, vma.start, vma.end));
        let inherited = kept.remove(&vma.start);
        let fresh = inherited.is_none();
        let mut at = match inherited {
            Some(old) => Placed { vma: *vma, ..old },
            None => maker.make(vma, class, content.is_some()).during(during)?,
        };
        if run > 1 && at.region.start() != vma.start {
            // Whatever is moved later is moved mapping by mapping.
            at.region.unmap().during(during)?;
            singly = run;
            continue;
        }
        rest = others;
        let of = told.of(vma.start, vma.end);
        // Before there are pages in it, which would have to be looked at by each call.
        let protected = run > 1 && content.is_some() && join::protect(&at.region, these)?;
        at.policy = more::set_policy(&at.region, of, at.policy, numa::Nodes::own).during(during)?;
        if class == Class::Private && (content.is_some() || !fresh) {
            let rule = giver.map_or(OfVma::Nothing, |giver| giver.of(task.pid, vma));
            let memory = match (fresh, protected) {
                (false, _) => Memory::Inherited,
                (true, false) => Memory::Fresh,
                (true, true) => Memory::Protected,
            };
            if fill::fill(&mut at, pages.as_ref(), memory, rule, &bulk, &mut comparer, &mut counts)
                .during(during)?
            {
                late.push((vma.start, vma.end));
            } else if let (Some(freed), Some(pages)) = (&freed, content) {
                freed.free(&pages.runs(vma.start, vma.end)).during(during)?;
            }
        }
        join::apart(at, these, protected, &mut placed)?;
    }
    for whole in std::mem::take(&mut maker.segments).into_values() {
        whole.unmap()?;
    }
    log::debug!(
        "Restored {} pages, {} huge ones; compared {}, of which {} stay shared",
        counts.restored,
        bulk.huge.taken(),
        counts.compared,
        counts.shared
    );
    Ok(Prepared { placed, room, shared, vdso, huge, pages: counts, late, ipc: task.ids.ipc_ns_id })
}

/// Picks from what the parent had the mappings that the task has too, by final address; unmaps the rest, and segments
/// of System V memory unless the ipc namespace is the `same_ipc`: others there have the same numbers.
fn keep(old: Vec<Placed>, vmas: &[pb::VmaEntry], same_ipc: bool) -> Result<HashMap<u64, Placed>> {
    let mut wanted = vmas.iter().filter(|v| v.status & st::GUARD == 0).peekable();
    let mut kept = HashMap::new();
    for old in old {
        while wanted.next_if(|v| v.start < old.vma.start).is_some() {}
        let elsewhere = old.vma.status & st::SYSVIPC != 0 && !same_ipc;
        if !elsewhere && wanted.peek().is_some_and(|new| same(&old.vma, new)) {
            kept.insert(old.vma.start, old);
        } else {
            let Placed { vma, region, .. } = old;
            region.unmap().during(|| entry::name(&vma))?;
        }
    }
    Ok(kept)
}

/// Whether two mappings, of parent and child, can be one that was inherited by fork: the same range over the
/// same object. Protection and advice may have changed since.
fn same(a: &pb::VmaEntry, b: &pb::VmaEntry) -> bool {
    key(a) == key(b)
}

/// What must be equal for that.
pub fn key(v: &pb::VmaEntry) -> impl Eq + std::hash::Hash + use<> {
    let anonymous = v.flags & libc::MAP_ANONYMOUS as u32 != 0;
    // Anonymous memory has no meaningful offset; how a file was opened counts for shared views only.
    let pgoff = if anonymous { 0 } else { v.pgoff };
    let mode = if v.status & st::FILE_SHARED != 0 { v.fdflags } else { None };
    (v.start, v.end, pgoff, v.shmid, v.flags & !(libc::MAP_LOCKED as u32), v.status, mode)
}

/// Makes mappings of one task.
struct Maker<'a, 'b> {
    room: &'a mut Room,
    shared: &'a SharedAnon,
    /// Files are often mapped in a row of pieces; kept open meanwhile.
    files: HashMap<(FileId, i32), OwnedFd>,
    /// Whole segments of System V memory that parts are mapped from, by number and whether only to be read.
    segments: HashMap<(u64, bool), Region>,
    open: &'a mut OpenFile<'b>,
}

/// Files kept open at a time.
const OPEN_FILES: usize = 16;

impl Maker<'_, '_> {
    fn make(&mut self, vma: &pb::VmaEntry, class: Class, content: bool) -> Result<Placed> {
        let len = vma.end - vma.start;
        let prot = if content && !fill::is_code(vma) { READ_WRITE } else { vma.prot };
        let flags = entry::map_flags(vma);
        let align = hugetlb::alignment(vma).max(TABLE);
        let region = match class {
            Class::Segment => {
                let read_only = vma.fdflags.is_some_and(|f| f as i32 & libc::O_ACCMODE == libc::O_RDONLY);
                let whole = match self.segments.entry((vma.shmid, read_only)) {
                    Entry::Occupied(known) => known.into_mut(),
                    Entry::Vacant(free) => free.insert(sysv::attach_for(vma.shmid, read_only)?),
                };
                if vma.pgoff.checked_add(len).is_none_or(|end| end > whole.len()) {
                    return Err(Error::image("it ends behind its System V shared memory"));
                }
                let region = self.room.map(vma.start, len, HIDDEN)?;
                region.mirror(region.start(), len, whole.start() + vma.pgoff)?;
                let prot = if read_only { libc::PROT_READ as u32 } else { READ_WRITE };
                return Ok(Placed { vma: *vma, region, prot, policy: false });
            }
            Class::SharedAnon => {
                let region = self.room.map(vma.start, len, HIDDEN)?;
                region.mirror(region.start(), len, self.shared.address(vma)?)?;
                return Ok(Placed { vma: *vma, region, prot: READ_WRITE, policy: false });
            }
            _ if vma.status & st::ANON_PRIVATE != 0 => {
                self.room.map_aligned(vma.start, len, align, Mapping { prot, flags, file: None })?
            }
            _ => {
                let key = (FileId(u32::try_from(vma.shmid).unwrap_or(0)), open_mode(vma));
                if !self.files.contains_key(&key) {
                    if self.files.len() >= OPEN_FILES {
                        self.files.clear();
                    }
                    let fd = (self.open)(key.0, key.1)?;
                    self.files.insert(key, fd);
                }
                let file = self.files.get(&key).map(|fd| (fd.as_fd(), vma.pgoff));
                self.room.map_aligned(vma.start, len, align, Mapping { prot, flags, file })?
            }
        };
        Ok(Placed { vma: *vma, region, prot, policy: false })
    }
}

/// How a file must be open to be mapped like this; images of older versions do not say it.
fn open_mode(vma: &pb::VmaEntry) -> i32 {
    let shared = vma.status & st::FILE_SHARED != 0;
    match vma.fdflags {
        Some(flags) if shared => flags as i32 & libc::O_ACCMODE,
        None if shared && vma.prot & libc::PROT_WRITE as u32 != 0 => libc::O_RDWR,
        _ => libc::O_RDONLY,
    }
}

#[cfg(test)]
mod tests;
