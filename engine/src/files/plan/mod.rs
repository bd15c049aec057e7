//! Who opens which file, and when: decided before the first fork, from images alone.
//!
//! ```text
//! entries of files.img --collect--> nodes --group--> groups --owner--> tables --order--> steps
//! ```
//! * A *table* is a descriptor table of the images; one task restores it for all that share it.
//! * A *group* is what must be opened together (both ends of a pipe); most groups are a single file.
//! * The *owner* of a group is the table of the lowest (virtual pid, descriptor) that uses a member; a group
//!   that no descriptor uses belongs to the owner of a file that needs it.
//! * Groups have one total order: what a file needs opened comes before it, ties go by the lowest file id.
//!   Every table walks its steps in that order and waits only for smaller ranks, so no two can wait for each
//!   other. All opening comes before all finishing, and finishing needs nothing but open files.

mod build;
mod sources;

use std::{
    collections::{BTreeSet, HashMap},
    fmt::Write,
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
};

use rcriu_images::{ImageKind, pb};

use crate::task::lsm::sockets::Making;

pub use self::sources::PlanFiles;
use super::{
    ById, FdType, GroupKey, KINDS, Preflight, RestoredFile,
    by_id::place,
    lock::{self, Flying, Locks},
    memfd::Memfds,
    pidfd::DeadPidfds,
    tty::Ttys,
};
use crate::{
    error::{Context, Error, Result},
    netlock::Connection,
    pstree::{FileId, VirtPid},
    sys::fd,
};

/// A descriptor table of the images and who restores it.
#[derive(Clone, Debug)]
pub struct Table<'a> {
    /// The task that restores it: of those sharing it, the one all others were forked from.
    pub task: VirtPid,
    /// The other tasks that share it.
    pub sharers: Vec<VirtPid>,
    /// Its descriptors.
    pub fds: &'a [pb::FdinfoEntry],
}

/// Lengths of the packets in a pipe or fifo, by its number.
pub(super) type Packets = HashMap<(ImageKind, u32), Vec<u32>>;

/// Index of a table in the order given to [`FilesPlan::build`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct TableIx(pub usize);

/// A descriptor to be put in place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Place {
    pub(super) fd: i32,
    pub(super) cloexec: bool,
}

/// One thing a table's task does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// Open the file, put it in place, hand it out.
    Open(FileId),
    /// Get it from its owner, put it in place.
    Receive(FileId),
    /// Complete it.
    Finish(FileId),
}

/// An open file of the plan.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) file: Box<dyn RestoredFile>,
    /// What it is opened together with.
    pub(super) group: Option<GroupKey>,
    /// Who opens it.
    pub(super) owner: TableIx,
    /// Number under which it is handed out, if it is.
    pub(super) slot: Option<Slot>,
    /// Tables it is handed to.
    pub(super) receivers: Vec<TableIx>,
}

/// Where a file that several tables use is handed out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Slot {
    pub(super) number: usize,
    pub(super) receivers: u32,
}

/// What one table's task does.
#[derive(Debug)]
pub(super) struct TablePlan {
    pub(super) task: VirtPid,
    /// How many other tasks share it.
    pub(super) sharers: u32,
    pub(super) steps: Vec<Step>,
    pub(super) places: Places,
    /// Files kept open beside the table's own descriptors.
    pub(super) keep: BTreeSet<FileId>,
}

/// Where the open files of a table go, in the order of their ids.
#[derive(Debug)]
pub(super) struct Places {
    ids: Vec<FileId>,
    /// Where the places of each begin, and where all end.
    begin: Vec<usize>,
    places: Vec<Place>,
}

impl Places {
    fn new(mut all: Vec<(FileId, Place)>) -> Places {
        all.sort_by_key(|(id, _)| *id);
        let mut ids = Vec::with_capacity(all.len());
        let mut begin = Vec::with_capacity(all.len() + 1);
        for (at, (id, _)) in all.iter().enumerate() {
            if ids.last() != Some(id) {
                ids.push(*id);
                begin.push(at);
            }
        }
        begin.push(all.len());
        Places { ids, begin, places: all.into_iter().map(|(_, place)| place).collect() }
    }

    /// Those of one file; none if the table does not have it.
    pub(super) fn of(&self, id: FileId) -> &[Place] {
        match place(&self.ids, id) {
            Some(at) => &self.places[self.begin[at]..self.begin[at + 1]],
            None => &[],
        }
    }

    /// Whether the table has the file.
    pub(super) fn has(&self, id: FileId) -> bool {
        place(&self.ids, id).is_some()
    }

    /// All files, each once.
    fn files(&self) -> impl Iterator<Item = FileId> {
        self.ids.iter().copied()
    }

    fn iter(&self) -> impl Iterator<Item = (FileId, Place)> {
        let places = self.begin.windows(2).map(|ends| &self.places[ends[0]..ends[1]]);
        self.ids.iter().zip(places).flat_map(|(id, places)| places.iter().map(|place| (*id, *place)))
    }
}

/// Everything about open files that is known before the first fork. Immutable; tasks inherit it.
#[derive(Debug)]
pub struct FilesPlan {
    pub(super) nodes: ById<Node>,
    pub(super) tables: Vec<TablePlan>,
    pub(super) by_task: HashMap<VirtPid, TableIx>,
    pub(super) slots: usize,
    /// Descriptor numbers that are used in any table, in order.
    numbers: Vec<RawFd>,
    dead_pids: BTreeSet<VirtPid>,
    pub(super) ttys: Ttys,
    pub(super) memfds: Memfds,
    pub(super) dead_pidfds: DeadPidfds,
    pub(super) packets: Packets,
    pub(super) locks: Locks,
    /// Security labels of sockets.
    labels: HashMap<FileId, String>,
    /// Locks of files that no task has open.
    pub(super) flying: Flying,
}

/// Descriptor numbers that no table uses: what must survive while tables are restored lives there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Zone {
    /// First number.
    pub base: RawFd,
    /// Number after the last one.
    pub end: RawFd,
}

impl Zone {
    /// Whether `fd` lies in it.
    pub fn contains(&self, fd: RawFd) -> bool {
        (self.base..self.end).contains(&fd)
    }

    /// Moves `fd` into it; close-on-exec.
    ///
    /// # Errors
    /// No free number.
    pub fn keep(&self, fd: OwnedFd) -> Result<OwnedFd> {
        if self.contains(fd.as_raw_fd()) {
            return Ok(fd);
        }
        let kept = fd::duplicate_above(fd.as_fd(), self.base)?;
        let kept = fd::take(kept)?;
        if self.contains(kept.as_raw_fd()) {
            return Ok(kept);
        }
        Err(Error::host("no free descriptor beside those to be restored").remedy("raise ulimit -n"))
    }
}

impl FilesPlan {
    /// Gives sockets security labels.
    pub fn label(&mut self, labels: HashMap<FileId, String>) {
        self.labels = labels;
    }

    /// To be held while file `id` is made.
    pub(super) fn making(&self, id: FileId) -> Result<Option<Making>> {
        self.labels.get(&id).map(|label| Making::with(label)).transpose()
    }

    /// Collects every file and plans.
    ///
    /// # Errors
    /// A descriptor of a kind that cannot be restored, one that refers to no file, files that wait for each
    /// other in a circle; whatever kinds find wrong with their images.
    pub fn build(mut cx: PlanFiles<'_>, tables: &[Table<'_>]) -> Result<FilesPlan> {
        let entries = cx.entries;
        let (mut ids, mut files) = (Vec::with_capacity(entries.len()), Vec::with_capacity(entries.len()));
        for (id, entry) in entries.iter() {
            let kind = KINDS.iter().find(|k| k.fd_type() as i32 == entry.r#type);
            if let Some(kind) = kind {
                let file = kind.collect(entry, &mut cx).during(|| format!("file {id}"))?;
                cx.check_network(file.network()).during(|| format!("file {id} {}", file.name()))?;
                ids.push(id);
                files.push(file);
            }
        }
        let files =
            ById::of_sorted(ids, files).map_err(|id| Error::bug(format!("file {id} was read twice")))?;
        let known = |id: FileId| match entries.get(id) {
            None => Error::image(format!("files.img has no file {id}")),
            Some(e) => Error::unsupported(format!("file {id} cannot be restored: {}", kind_name(e.r#type)))
                .remedy("restore with CRIU"),
        };
        let mut plan = build::plan(files, tables, known)?;
        plan.ttys = cx.ttys.take().unwrap_or_default();
        plan.memfds = cx.memfds.take().unwrap_or_default();
        plan.dead_pidfds = cx.dead_pidfds;
        plan.packets = cx.packets;
        plan.flying = cx.flying;
        plan.locks = lock::read(cx.images, cx.opts.common.file_locks)?;
        plan.dead_pids = cx.remaps.dead_processes().collect();
        Ok(plan)
    }

    /// Tasks that must exist, if only as helpers, because files below their /proc folder are open.
    pub fn dead_pids(&self) -> &BTreeSet<VirtPid> {
        &self.dead_pids
    }

    /// Everything that is known to go wrong: with files of tables, and with those in `others`, which tasks use
    /// by path (executables, folders, mappings).
    pub fn preflight(&self, cx: &Preflight<'_>, others: impl IntoIterator<Item = FileId>) -> Vec<Error> {
        let used = self.tables.iter().flat_map(|t| t.places.files());
        let mut used: Vec<FileId> = used.chain(others).collect();
        used.sort();
        used.dedup();
        let check = |id| match self.nodes.get(id) {
            Some(node) => {
                node.file.preflight(cx).err().map(|e| e.during(format!("file {id} {}", node.file.name())))
            }
            None => Some(Error::image(format!(
                "files.img has no file {id}, or one of a kind that cannot be restored"
            ))),
        };
        used.into_iter().filter_map(check).collect()
    }

    /// Room for at least `room` descriptors beside those of any table, below `limit` (RLIMIT_NOFILE): right
    /// above the highest one, so that tables do not grow, or else in a gap.
    ///
    /// # Errors
    /// A descriptor at or above `limit`, or no room.
    pub fn zone(&self, limit: RawFd, room: RawFd) -> Result<Zone> {
        let highest = self.numbers.last().copied().unwrap_or(-1);
        if highest >= limit {
            return Err(Error::host(format!(
                "descriptor {highest} cannot be restored: this process may have {limit} descriptors at most"
            ))
            .remedy(format!("raise the limit: ulimit -n {}", highest + 1)));
        }
        if limit - highest > room {
            return Ok(Zone { base: highest + 1, end: limit });
        }
        let mut base = 0;
        for &number in &self.numbers {
            if number - base >= room {
                return Ok(Zone { base, end: number });
            }
            base = number + 1;
        }
        Err(Error::host(format!("no {room} free descriptors beside those to be restored"))
            .remedy(format!("raise the limit: ulimit -n {}", highest + 1 + room)))
    }

    /// How many descriptors a task may hold beside its own, besides what the engine itself needs.
    pub(super) fn most_kept(&self) -> usize {
        let mut kept: Vec<usize> = self.tables.iter().map(|t| t.keep.len()).collect();
        for node in self.nodes.values() {
            if let Some(kept) = kept.get_mut(node.owner.0) {
                *kept += node.file.spare();
            }
        }
        kept.into_iter().max().unwrap_or(0)
    }

    /// TCP connections of which there is an end.
    pub(crate) fn connections(&self) -> Vec<Connection> {
        let mut all: Vec<_> = self.nodes.values().iter().filter_map(|node| node.file.connection()).collect();
        // Both ends may be there.
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Tables that receive something.
    pub(super) fn receivers(&self) -> impl Iterator<Item = TableIx> {
        let receives = |t: &TablePlan| t.steps.iter().any(|s| matches!(s, Step::Receive(_)));
        self.tables.iter().enumerate().filter(move |(_, t)| receives(t)).map(|(at, _)| TableIx(at))
    }

    /// The plan as text, one step a line: the log of `-v4`, and what tests compare.
    pub fn text(&self) -> String {
        let mut out = String::new();
        for table in &self.tables {
            let _ = writeln!(out, "task {}:", table.task);
            for step in &table.steps {
                let (verb, id) = match *step {
                    Step::Open(id) => ("open", id),
                    Step::Receive(id) => ("receive", id),
                    Step::Finish(id) => ("finish", id),
                };
                let node = &self.nodes[id];
                let _ = write!(out, "  {verb} {id} {}", node.file.name());
                if !matches!(step, Step::Finish(_)) {
                    for place in table.places.of(id) {
                        let _ = write!(out, " -> {}", place.fd);
                    }
                }
                if matches!(step, Step::Receive(_)) {
                    let _ = write!(out, " from {}", self.tables[node.owner.0].task);
                }
                out.push('\n');
            }
        }
        out
    }
}

/// The image's word for a type of file.
pub(super) fn kind_name(number: i32) -> String {
    FdType::try_from(number)
        .map_or_else(|_| format!("unknown type {number}"), |t| t.as_str_name().to_lowercase())
}

#[cfg(test)]
mod tests;
