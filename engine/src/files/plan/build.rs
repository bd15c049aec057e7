//! From nodes to steps: who uses what, which files are opened together, by whom, and in which total order.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, BinaryHeap, HashMap, VecDeque},
    ops::Range,
    os::fd::RawFd,
};

use super::{FilesPlan, Node, Packets, Place, Places, Slot, Step, Table, TableIx, TablePlan};
use crate::{
    error::{Error, Result},
    files::{
        ById, GroupKey, Needs, RestoredFile,
        lock::{Flying, Locks},
        memfd::Memfds,
        pidfd::DeadPidfds,
        tty::Ttys,
    },
    pstree::{FileId, VirtPid},
};

/// A group under construction.
#[derive(Debug, Default)]
struct Group {
    /// Where the places of its files stand, in the list of all groups.
    members: Range<usize>,
    /// Lowest user.
    first: Option<(VirtPid, i32, TableIx)>,
    owner: Option<TableIx>,
    /// Groups that must be opened before.
    after: BTreeSet<usize>,
}

/// Of a file that is in no group.
const NONE: usize = usize::MAX;

/// All files in the order of their ids. There may be very many: whatever is worked out is kept in vectors, by the
/// place of the file here.
struct Files {
    files: ById<Box<dyn RestoredFile>>,
    /// Most have none.
    needs: Vec<Option<Box<Needs>>>,
}

/// Of a file that needs nothing.
static NO_NEEDS: Needs = Needs { group: None, opened: Vec::new(), at_hand: Vec::new() };

impl Files {
    fn needs(&self, file: usize) -> &Needs {
        self.needs[file].as_deref().unwrap_or(&NO_NEEDS)
    }

    fn id(&self, file: usize) -> FileId {
        self.files.ids()[file]
    }
}

pub(super) fn plan(
    files: ById<Box<dyn RestoredFile>>,
    tables: &[Table<'_>],
    unknown: impl Fn(FileId) -> Error,
) -> Result<FilesPlan> {
    let needs =
        files.values().iter().map(|file| Some(file.needs()).filter(|its| *its != NO_NEEDS).map(Box::new));
    let needs = needs.collect();
    let all = Files { files, needs };
    let at = |id: FileId| all.files.place(id).ok_or_else(|| unknown(id));
    let Users { mut plans, by_task, numbers, mut wanted } = users(tables, &all, &unknown)?;

    // Everything reachable; members of a group come along with the first of them.
    let mut of_key: HashMap<GroupKey, Vec<usize>> = HashMap::new();
    for (file, needs) in all.needs.iter().enumerate() {
        if let Some(key) = needs.as_ref().and_then(|needs| needs.group) {
            of_key.entry(key).or_default().push(file);
        }
    }
    let mut used = vec![false; all.files.len()];
    while let Some(file) = wanted.pop_front() {
        if std::mem::replace(&mut used[file], true) {
            continue;
        }
        let its = all.needs(file);
        for other in its.opened.iter().chain(&its.at_hand) {
            wanted.push_back(at(*other)?);
        }
        if let Some(key) = its.group {
            wanted.extend(&of_key[&key]);
        }
    }
    let used: Vec<usize> = (0..used.len()).filter(|&file| used[file]).collect();

    // Groups, in the order of their lowest id.
    let mut groups: Vec<Group> = Vec::with_capacity(used.len());
    let mut members: Vec<usize> = Vec::with_capacity(used.len());
    let mut group_of = vec![NONE; all.files.len()];
    for &file in &used {
        if group_of[file] != NONE {
            continue;
        }
        let from = members.len();
        match all.needs(file).group {
            Some(key) => members.append(&mut of_key.remove(&key).unwrap_or_default()),
            None => members.push(file),
        }
        for &member in &members[from..] {
            group_of[member] = groups.len();
        }
        groups.push(Group { members: from..members.len(), ..Group::default() });
    }
    for (table, plan) in plans.iter().enumerate() {
        for (id, place) in plan.places.iter() {
            let group = &mut groups[group_of[at(id)?]];
            let this = (plan.task, place.fd, TableIx(table));
            group.first = Some(group.first.map_or(this, |first| first.min(this)));
        }
    }
    let mut needed_by: Vec<Vec<usize>> = vec![Vec::new(); groups.len()];
    for &file in &used {
        let (its, group) = (all.needs(file), group_of[file]);
        for (nr, other) in its.opened.iter().chain(&its.at_hand).enumerate() {
            let other = group_of[at(*other)?];
            needed_by[group].push(other);
            if other != group && nr < its.opened.len() {
                groups[group].after.insert(other);
            }
        }
    }
    let first = |group: &Group| members[group.members.start];
    assign_owners(&mut groups, &needed_by, |group| all.id(first(group)))?;
    let name = |group: &Group| {
        let file = first(group);
        format!("{} {}", all.id(file), all.files.values()[file].name())
    };
    let order = order(&groups, name)?;
    let ordered = || order.iter().flat_map(|&group| &members[groups[group].members.clone()]).copied();

    // Who needs files of other tables.
    let owner = |file: usize| {
        groups[group_of[file]].owner.ok_or_else(|| Error::bug(format!("file {} has no owner", all.id(file))))
    };
    for &file in &used {
        let (its, table) = (all.needs(file), owner(file)?);
        // To have it is the way to know that it is open.
        for other in its.at_hand.iter().chain(&its.opened) {
            if !plans[table.0].places.has(*other) {
                plans[table.0].keep.insert(*other);
            }
        }
    }
    let mut receivers: Vec<Vec<TableIx>> = vec![Vec::new(); all.files.len()];
    for (table, plan) in plans.iter().enumerate() {
        // What is kept has no place.
        for id in plan.places.files().chain(plan.keep.iter().copied()) {
            let file = at(id)?;
            if owner(file)? != TableIx(table) {
                receivers[file].push(TableIx(table));
            }
        }
    }

    // Steps in rank order. Files that only a path leads to (a cwd, a mapping) are opened where they are needed: they
    // have none, and nobody owns them.
    let mut slots: Vec<Option<Slot>> = vec![None; all.files.len()];
    let mut given = 0;
    for file in ordered() {
        let id = all.id(file);
        plans[owner(file)?.0].steps.push(Step::Open(id));
        for other in &receivers[file] {
            plans[other.0].steps.push(Step::Receive(id));
        }
        if !receivers[file].is_empty() {
            slots[file] = Some(Slot { number: given, receivers: receivers[file].len() as u32 });
            given += 1;
        }
    }
    for file in ordered() {
        if all.files.values()[file].has_finish() {
            plans[owner(file)?.0].steps.push(Step::Finish(all.id(file)));
        }
    }
    let owners: Vec<TableIx> = group_of
        .iter()
        .map(|&group| groups.get(group).and_then(|group| group.owner).unwrap_or(TableIx(0)))
        .collect();
    let Files { files, needs } = all;
    // What they are opened together with is all that is still needed of their needs.
    let key = |its: Option<Box<Needs>>| its.and_then(|its| its.group);
    let nodes = files.map(|files| {
        let nodes = files.into_iter().zip(needs.into_iter().map(key)).zip(owners).zip(slots).zip(receivers);
        let node = |((((file, group), owner), slot), receivers)| Node { file, group, owner, slot, receivers };
        nodes.map(node).collect()
    });
    Ok(FilesPlan {
        labels: HashMap::new(),
        nodes,
        tables: plans,
        by_task,
        slots: given,
        numbers,
        dead_pids: BTreeSet::new(),
        ttys: Ttys::default(),
        memfds: Memfds::default(),
        dead_pidfds: DeadPidfds::new(),
        packets: Packets::new(),
        flying: Flying::new(),
        locks: Locks::new(),
    })
}

/// What the tables say.
struct Users {
    plans: Vec<TablePlan>,
    by_task: HashMap<VirtPid, TableIx>,
    /// All numbers of descriptors, in order.
    numbers: Vec<RawFd>,
    /// Files with a descriptor.
    wanted: VecDeque<usize>,
}

fn users(tables: &[Table<'_>], files: &Files, unknown: &impl Fn(FileId) -> Error) -> Result<Users> {
    let mut plans: Vec<TablePlan> = Vec::with_capacity(tables.len());
    let mut by_task = HashMap::new();
    let mut all_numbers = Vec::new();
    let mut wanted = VecDeque::new();
    for (at, table) in tables.iter().enumerate() {
        let mut places = Vec::with_capacity(table.fds.len());
        let mut numbers = Vec::with_capacity(table.fds.len());
        for fd in table.fds {
            let id = FileId(fd.id);
            let number = i32::try_from(fd.fd).map_err(|_| {
                Error::image(format!("task {}: descriptor {} is too large", table.task, fd.fd))
            })?;
            let file = files
                .files
                .place(id)
                .ok_or_else(|| unknown(id).during(format!("fd {number} of task {}", table.task)))?;
            numbers.push(number);
            let cloexec = fd.flags & libc::FD_CLOEXEC.cast_unsigned() != 0;
            places.push((id, Place { fd: number, cloexec }));
            wanted.push_back(file);
        }
        numbers.sort_unstable();
        if let Some(twice) = numbers.windows(2).find(|pair| pair[0] == pair[1]) {
            let text = format!("task {}: descriptor {} is there twice", table.task, twice[0]);
            return Err(Error::image(text));
        }
        all_numbers.append(&mut numbers);
        for &task in std::iter::once(&table.task).chain(&table.sharers) {
            if by_task.insert(task, TableIx(at)).is_some() {
                return Err(Error::bug(format!("two descriptor tables for task {task}")));
            }
        }
        plans.push(TablePlan {
            task: table.task,
            sharers: table.sharers.len() as u32,
            steps: Vec::new(),
            places: Places::new(places),
            keep: BTreeSet::new(),
        });
    }
    all_numbers.sort_unstable();
    all_numbers.dedup();
    Ok(Users { plans, by_task, numbers: all_numbers, wanted })
}

/// Gives each group the table of its lowest user, or, lacking one, that of a file that needs it. `needed_by` tells which
/// groups each of them needs.
fn assign_owners(
    groups: &mut [Group],
    needed_by: &[Vec<usize>],
    first: impl Fn(&Group) -> FileId,
) -> Result<()> {
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
        Some(group) => Err(Error::bug(format!("nobody can open file {}", first(group)))),
    }
}

/// Total order of groups: topological, ties by lowest id (which is the order of `groups`).
fn order(groups: &[Group], name: impl Fn(&Group) -> String) -> Result<Vec<usize>> {
    if groups.iter().all(|group| group.after.is_empty()) {
        return Ok((0..groups.len()).collect());
    }
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
    let names: Vec<String> = chain[start..].iter().map(|&g| name(&groups[g])).collect();
    Err(Error::image(format!("files wait for each other: {}", names.join(" <- "))))
}
