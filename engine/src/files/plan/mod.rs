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

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap, VecDeque, hash_map::Entry},
    fmt::Write,
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
    sync::Arc,
};

use rcriu_images::{ImageDir, ImageKind, pb};

use super::{
    FdType, GroupKey, KINDS, Needs, Preflight, RestoredFile,
    ghost::Remaps,
    lock::{self, Locks},
    memfd::Memfds,
    pidfd::DeadPidfds,
    pipe::PipeData,
    sk::UnixWorld,
    tty::Ttys,
};
use crate::{
    error::{Context, Error, Result},
    kernel::Kernel,
    options::RestoreOptions,
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

/// What collecting may read.
pub struct PlanFiles<'a> {
    /// The image folder.
    pub images: &'a ImageDir,
    /// What was asked for.
    pub opts: &'a RestoreOptions,
    /// What this kernel offers.
    pub kernel: &'a Kernel,
    /// All entries of files.img (and of the images older sets had instead).
    pub entries: &'a BTreeMap<FileId, pb::FileEntry>,
    pub(super) remaps: Remaps,
    pipe_data: HashMap<ImageKind, HashMap<u32, PipeData>>,
    ttys: Option<Ttys>,
    memfds: Option<Memfds>,
    pub(super) dead_pidfds: DeadPidfds,
    /// Lengths of packets in pipes and fifos.
    pub(super) packets: Packets,
    more: HashMap<FileId, pb::RcriuFileEntry>,
    unix: Option<Arc<UnixWorld>>,
}

impl<'a> PlanFiles<'a> {
    /// Reads what several kinds need.
    pub fn new(
        images: &'a ImageDir,
        opts: &'a RestoreOptions,
        kernel: &'a Kernel,
        entries: &'a BTreeMap<FileId, pb::FileEntry>,
    ) -> Result<Self> {
        let remaps = Remaps::read(images)?;
        let more = images.read_all::<pb::RcriuFileEntry>(ImageKind::RcriuFiles, 0)?;
        let more = more.into_iter().map(|entry| (FileId(entry.id), entry)).collect();
        Ok(PlanFiles {
            images,
            opts,
            kernel,
            entries,
            remaps,
            pipe_data: HashMap::new(),
            ttys: None,
            memfds: None,
            dead_pidfds: DeadPidfds::new(),
            packets: Packets::new(),
            more,
            unix: None,
        })
    }

    /// What the entry of a file has no field for.
    pub(super) fn more(&self, id: FileId) -> Option<&pb::RcriuFileEntry> {
        self.more.get(&id)
    }

    /// A file entry whose inode, a ghost by now, had this device (in the kernel's numbering) and number.
    pub(super) fn ghost_file(&self, dev: u32, ino: u64) -> Option<FileId> {
        self.remaps.of_inode(dev, ino)
    }

    /// All memfd inodes.
    pub(super) fn memfds(&mut self) -> Result<&mut Memfds> {
        Ok(match &mut self.memfds {
            Some(memfds) => memfds,
            none => none.insert(Memfds::read(self.images)?),
        })
    }

    /// All terminals.
    pub(super) fn ttys(&mut self) -> Result<&mut Ttys> {
        Ok(match &mut self.ttys {
            Some(ttys) => ttys,
            none => none.insert(Ttys::read(self.images, self.entries)?),
        })
    }

    /// All unix sockets.
    pub(super) fn unix(&mut self) -> Result<Arc<UnixWorld>> {
        if self.unix.is_none() {
            self.unix = Some(Arc::new(UnixWorld::new(self)?));
        }
        self.unix.clone().ok_or_else(|| Error::bug("no unix sockets"))
    }

    /// Data of pipes or fifos, by pipe number.
    pub(super) fn pipe_data(&mut self, kind: ImageKind) -> Result<&HashMap<u32, PipeData>> {
        Ok(match self.pipe_data.entry(kind) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(free) => free.insert(PipeData::read(self.images, kind)?),
        })
    }
}

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
    pub(super) needs: Needs,
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
    pub(super) places: HashMap<FileId, Vec<Place>>,
    /// Files kept open beside the table's own descriptors.
    pub(super) keep: BTreeSet<FileId>,
}

/// Everything about open files that is known before the first fork. Immutable; tasks inherit it.
#[derive(Debug)]
pub struct FilesPlan {
    pub(super) nodes: BTreeMap<FileId, Node>,
    pub(super) tables: Vec<TablePlan>,
    pub(super) by_task: HashMap<VirtPid, TableIx>,
    pub(super) slots: usize,
    /// Descriptor numbers that are used in any table.
    numbers: BTreeSet<RawFd>,
    dead_pids: BTreeSet<VirtPid>,
    pub(super) ttys: Ttys,
    pub(super) memfds: Memfds,
    pub(super) dead_pidfds: DeadPidfds,
    pub(super) packets: Packets,
    pub(super) locks: Locks,
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
    /// Collects every file and plans.
    ///
    /// # Errors
    /// A descriptor of a kind that cannot be restored, one that refers to no file, files that wait for each
    /// other in a circle; whatever kinds find wrong with their images.
    pub fn build(mut cx: PlanFiles<'_>, tables: &[Table<'_>]) -> Result<FilesPlan> {
        let mut files = BTreeMap::new();
        let entries = cx.entries;
        for (&id, entry) in entries {
            let kind = KINDS.iter().find(|k| k.fd_type() as i32 == entry.r#type);
            if let Some(kind) = kind {
                let file = kind.collect(entry, &mut cx).during(|| format!("file {id}"))?;
                files.insert(id, file);
            }
        }
        let known = |id: FileId| match entries.get(&id) {
            None => Error::image(format!("files.img has no file {id}")),
            Some(e) => Error::unsupported(format!("file {id} cannot be restored: {}", kind_name(e.r#type)))
                .remedy("restore with CRIU"),
        };
        let mut plan = plan(files, tables, known)?;
        plan.ttys = cx.ttys.take().unwrap_or_default();
        plan.memfds = cx.memfds.take().unwrap_or_default();
        plan.dead_pidfds = cx.dead_pidfds;
        plan.packets = cx.packets;
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
        let used = self.tables.iter().flat_map(|t| t.places.keys().copied());
        let used: BTreeSet<FileId> = used.chain(others).collect();
        let check = |id| match self.nodes.get(&id) {
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
                let node = &self.nodes[&id];
                let _ = write!(out, "  {verb} {id} {}", node.file.name());
                if !matches!(step, Step::Finish(_)) {
                    for place in table.places.get(&id).into_iter().flatten() {
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

/// A group under construction.
#[derive(Debug, Default)]
struct Group {
    members: Vec<FileId>,
    /// Lowest user.
    first: Option<(VirtPid, i32, TableIx)>,
    owner: Option<TableIx>,
    /// Groups that must be opened before.
    after: BTreeSet<usize>,
}

fn plan(
    mut files: BTreeMap<FileId, Box<dyn RestoredFile>>,
    tables: &[Table<'_>],
    unknown: impl Fn(FileId) -> Error,
) -> Result<FilesPlan> {
    let mut plans: Vec<TablePlan> = Vec::with_capacity(tables.len());
    let mut by_task = HashMap::new();
    let mut all_numbers = BTreeSet::new();
    // Who uses what.
    let mut wanted: VecDeque<FileId> = VecDeque::new();
    for (at, table) in tables.iter().enumerate() {
        let mut made = TablePlan {
            task: table.task,
            sharers: table.sharers.len() as u32,
            steps: Vec::new(),
            places: HashMap::new(),
            keep: BTreeSet::new(),
        };
        let mut numbers = BTreeSet::new();
        for fd in table.fds {
            let id = FileId(fd.id);
            let number = i32::try_from(fd.fd).map_err(|_| {
                Error::image(format!("task {}: descriptor {} is too large", table.task, fd.fd))
            })?;
            if !numbers.insert(number) {
                return Err(Error::image(format!("task {}: descriptor {number} is there twice", table.task)));
            }
            if !files.contains_key(&id) {
                return Err(unknown(id).during(format!("fd {number} of task {}", table.task)));
            }
            let place = Place { fd: number, cloexec: fd.flags & libc::FD_CLOEXEC.cast_unsigned() != 0 };
            made.places.entry(id).or_default().push(place);
            wanted.push_back(id);
        }
        all_numbers.append(&mut numbers);
        for &task in std::iter::once(&table.task).chain(&table.sharers) {
            if by_task.insert(task, TableIx(at)).is_some() {
                return Err(Error::bug(format!("two descriptor tables for task {task}")));
            }
        }
        plans.push(made);
    }

    // Everything reachable, with its needs; members of a group come along with the first of them.
    let mut of_key: HashMap<GroupKey, Vec<FileId>> = HashMap::new();
    for (&id, file) in &files {
        if let Some(key) = file.needs().group {
            of_key.entry(key).or_default().push(id);
        }
    }
    let mut needs: BTreeMap<FileId, Needs> = BTreeMap::new();
    while let Some(id) = wanted.pop_front() {
        if needs.contains_key(&id) {
            continue;
        }
        let file = files.get(&id).ok_or_else(|| unknown(id))?;
        let its = file.needs();
        wanted.extend(its.opened.iter().chain(&its.at_hand));
        if let Some(key) = its.group {
            wanted.extend(&of_key[&key]);
        }
        needs.insert(id, its);
    }

    // Groups, in the order of their lowest id.
    let mut groups: Vec<Group> = Vec::new();
    let mut group_of: HashMap<FileId, usize> = HashMap::new();
    for (&id, its) in &needs {
        let members = match its.group {
            Some(key) => of_key[&key].clone(),
            None => vec![id],
        };
        if members[0] == id {
            for &member in &members {
                group_of.insert(member, groups.len());
            }
            groups.push(Group { members, ..Group::default() });
        }
    }
    for (at, table) in plans.iter().enumerate() {
        let mut user = |id: FileId, fd: i32| {
            let group = &mut groups[group_of[&id]];
            let this = (table.task, fd, TableIx(at));
            group.first = Some(group.first.map_or(this, |first| first.min(this)));
        };
        for (&id, places) in &table.places {
            places.iter().for_each(|p| user(id, p.fd));
        }
    }
    for (id, its) in &needs {
        let group = group_of[id];
        for other in &its.opened {
            if group_of[other] != group {
                groups[group].after.insert(group_of[other]);
            }
        }
    }
    assign_owners(&mut groups, &group_of, &needs)?;
    let order = order(&groups, &files)?;

    // Who needs files of other tables.
    let owner = |groups: &[Group], id: &FileId| {
        groups[group_of[id]].owner.ok_or_else(|| Error::bug(format!("file {id} has no owner")))
    };
    for (id, its) in &needs {
        let table = owner(&groups, id)?;
        // To have it is the way to know that it is open.
        for other in its.at_hand.iter().chain(&its.opened) {
            if !plans[table.0].places.contains_key(other) {
                plans[table.0].keep.insert(*other);
            }
        }
    }
    let mut receivers: HashMap<FileId, Vec<TableIx>> = HashMap::new();
    for (at, table) in plans.iter().enumerate() {
        let users: BTreeSet<_> = table.places.keys().chain(&table.keep).copied().collect();
        for id in users {
            if owner(&groups, &id)? != TableIx(at) {
                receivers.entry(id).or_default().push(TableIx(at));
            }
        }
    }

    // Steps in rank order.
    let mut nodes = BTreeMap::new();
    let mut slots = 0;
    for &at in &order {
        let group = &groups[at];
        for id in &group.members {
            let table = owner(&groups, id)?;
            plans[table.0].steps.push(Step::Open(*id));
            let others = receivers.remove(id).unwrap_or_default();
            for other in &others {
                plans[other.0].steps.push(Step::Receive(*id));
            }
            let slot = (!others.is_empty()).then(|| {
                slots += 1;
                Slot { number: slots - 1, receivers: others.len() as u32 }
            });
            let file = files.remove(id).ok_or_else(|| unknown(*id))?;
            let needs = needs.remove(id).unwrap_or_default();
            nodes.insert(*id, Node { file, needs, owner: table, slot, receivers: others });
        }
    }
    for &at in &order {
        for id in &groups[at].members {
            plans[nodes[id].owner.0].steps.push(Step::Finish(*id));
        }
    }
    // Files that only a path leads to (a cwd, a mapping) are opened where they are needed: no steps.
    let nobody = TableIx(0);
    for (id, file) in files {
        let needs = file.needs();
        nodes.insert(id, Node { file, needs, owner: nobody, slot: None, receivers: Vec::new() });
    }
    Ok(FilesPlan {
        nodes,
        tables: plans,
        by_task,
        slots,
        numbers: all_numbers,
        dead_pids: BTreeSet::new(),
        ttys: Ttys::default(),
        memfds: Memfds::default(),
        dead_pidfds: DeadPidfds::new(),
        packets: Packets::new(),
        locks: Locks::new(),
    })
}

/// Gives each group the table of its lowest user, or, lacking one, that of a file that needs it.
fn assign_owners(
    groups: &mut [Group],
    group_of: &HashMap<FileId, usize>,
    needs: &BTreeMap<FileId, Needs>,
) -> Result<()> {
    let mut needed_by: Vec<Vec<usize>> = vec![Vec::new(); groups.len()];
    for (id, its) in needs {
        for other in its.opened.iter().chain(&its.at_hand) {
            needed_by[group_of[id]].push(group_of[other]);
        }
    }
    let mut ready = VecDeque::new();
    for (at, group) in groups.iter_mut().enumerate() {
        group.owner = group.first.map(|(_, _, table)| table);
        if group.owner.is_some() {
            ready.push_back(at);
        }
    }
    while let Some(at) = ready.pop_front() {
        for &other in &needed_by[at] {
            if groups[other].owner.is_none() {
                groups[other].owner = groups[at].owner;
                ready.push_back(other);
            }
        }
    }
    match groups.iter().find(|g| g.owner.is_none()) {
        None => Ok(()),
        Some(group) => Err(Error::bug(format!("nobody can open file {}", group.members[0]))),
    }
}

/// Total order of groups: topological, ties by lowest id (which is the order of `groups`).
fn order(groups: &[Group], files: &BTreeMap<FileId, Box<dyn RestoredFile>>) -> Result<Vec<usize>> {
    let mut left: Vec<usize> = groups.iter().map(|g| g.after.len()).collect();
    let mut before: Vec<Vec<usize>> = vec![Vec::new(); groups.len()];
    for (at, group) in groups.iter().enumerate() {
        group.after.iter().for_each(|&other| before[other].push(at));
    }
    let mut ready: BinaryHeap<Reverse<usize>> =
        (0..groups.len()).filter(|&at| left[at] == 0).map(Reverse).collect();
    let mut order = Vec::with_capacity(groups.len());
    while let Some(Reverse(at)) = ready.pop() {
        order.push(at);
        for &other in &before[at] {
            left[other] -= 1;
            if left[other] == 0 {
                ready.push(Reverse(other));
            }
        }
    }
    if order.len() == groups.len() {
        return Ok(order);
    }
    // Whoever is left waits for somebody who is left: following that leads round the circle.
    let mut chain: Vec<usize> = Vec::new();
    let mut at = left.iter().position(|&n| n > 0).unwrap_or(0);
    while !chain.contains(&at) {
        chain.push(at);
        at = groups[at].after.iter().copied().find(|&other| left[other] > 0).unwrap_or(at);
    }
    chain.push(at);
    let start = chain.iter().position(|&x| x == at).unwrap_or(0);
    let names: Vec<String> = chain[start..]
        .iter()
        .map(|&g| {
            let id = groups[g].members[0];
            files.get(&id).map_or_else(|| id.to_string(), |f| format!("{id} {}", f.name()))
        })
        .collect();
    Err(Error::image(format!("files wait for each other: {}", names.join(" <- "))))
}

#[cfg(test)]
mod tests;
