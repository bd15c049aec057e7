//! From nodes to steps: who uses what, which files are opened together, by whom, and in which total order.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap, VecDeque},
    os::fd::RawFd,
};

use super::{FilesPlan, Node, Packets, Place, Places, Slot, Step, Table, TableIx, TablePlan};
use crate::{
    error::{Error, Result},
    files::{GroupKey, Needs, RestoredFile, lock::Locks, memfd::Memfds, pidfd::DeadPidfds, tty::Ttys},
    pstree::{FileId, VirtPid},
};

/// A group under construction.
#[derive(Debug, Default)]
struct Group {
    /// Places of its files.
    members: Vec<usize>,
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
    ids: Vec<FileId>,
    files: Vec<Box<dyn RestoredFile>>,
    needs: Vec<Needs>,
}

impl Files {
    fn at(&self, id: FileId) -> Option<usize> {
        // Most sets number them one after the other.
        let guess = id.0.checked_sub(self.ids.first()?.0)? as usize;
        if self.ids.get(guess) == Some(&id) { Some(guess) } else { self.ids.binary_search(&id).ok() }
    }
}

pub(super) fn plan(
    files: BTreeMap<FileId, Box<dyn RestoredFile>>,
    tables: &[Table<'_>],
    unknown: impl Fn(FileId) -> Error,
) -> Result<FilesPlan> {
    let needs = files.values().map(|file| file.needs()).collect();
    let (ids, files) = files.into_iter().unzip();
    let all = Files { ids, files, needs };
    let at = |id: FileId| all.at(id).ok_or_else(|| unknown(id));
    let Users { mut plans, by_task, numbers, mut wanted } = users(tables, &all, &unknown)?;

    // Everything reachable; members of a group come along with the first of them.
    let mut of_key: HashMap<GroupKey, Vec<usize>> = HashMap::new();
    for (file, needs) in all.needs.iter().enumerate() {
        if let Some(key) = needs.group {
            of_key.entry(key).or_default().push(file);
        }
    }
    let mut used = vec![false; all.ids.len()];
    while let Some(file) = wanted.pop_front() {
        if std::mem::replace(&mut used[file], true) {
            continue;
        }
        let its = &all.needs[file];
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
    let mut group_of = vec![NONE; all.ids.len()];
    for &file in &used {
        if group_of[file] != NONE {
            continue;
        }
        let members = match all.needs[file].group {
            Some(key) => of_key.remove(&key).unwrap_or_default(),
            None => vec![file],
        };
        for &member in &members {
            group_of[member] = groups.len();
        }
        groups.push(Group { members, ..Group::default() });
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
        let (its, group) = (&all.needs[file], group_of[file]);
        for (nr, other) in its.opened.iter().chain(&its.at_hand).enumerate() {
            let other = group_of[at(*other)?];
            needed_by[group].push(other);
            if other != group && nr < its.opened.len() {
                groups[group].after.insert(other);
            }
        }
    }
    assign_owners(&mut groups, &needed_by, &all)?;
    let order = order(&groups, &all)?;

    // Who needs files of other tables.
    let owner = |file: usize| {
        groups[group_of[file]].owner.ok_or_else(|| Error::bug(format!("file {} has no owner", all.ids[file])))
    };
    for &file in &used {
        let (its, table) = (&all.needs[file], owner(file)?);
        // To have it is the way to know that it is open.
        for other in its.at_hand.iter().chain(&its.opened) {
            if !plans[table.0].places.has(*other) {
                plans[table.0].keep.insert(*other);
            }
        }
    }
    let mut receivers: Vec<Vec<TableIx>> = vec![Vec::new(); all.ids.len()];
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
    let mut slots: Vec<Option<Slot>> = vec![None; all.ids.len()];
    let mut given = 0;
    for &file in order.iter().flat_map(|&group| &groups[group].members) {
        let id = all.ids[file];
        plans[owner(file)?.0].steps.push(Step::Open(id));
        for other in &receivers[file] {
            plans[other.0].steps.push(Step::Receive(id));
        }
        if !receivers[file].is_empty() {
            slots[file] = Some(Slot { number: given, receivers: receivers[file].len() as u32 });
            given += 1;
        }
    }
    for &file in order.iter().flat_map(|&group| &groups[group].members) {
        if all.files[file].has_finish() {
            plans[owner(file)?.0].steps.push(Step::Finish(all.ids[file]));
        }
    }
    let owners: Vec<TableIx> = group_of
        .iter()
        .map(|&group| groups.get(group).and_then(|group| group.owner).unwrap_or(TableIx(0)))
        .collect();
    let Files { ids, files, needs } = all;
    let nodes = files.into_iter().zip(needs).zip(owners).zip(slots).zip(receivers);
    let nodes =
        nodes.map(|((((file, needs), owner), slot), receivers)| Node { file, needs, owner, slot, receivers });
    Ok(FilesPlan {
        nodes: ids.into_iter().zip(nodes).collect(),
        tables: plans,
        by_task,
        slots: given,
        numbers,
        dead_pids: BTreeSet::new(),
        ttys: Ttys::default(),
        memfds: Memfds::default(),
        dead_pidfds: DeadPidfds::new(),
        packets: Packets::new(),
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
                .at(id)
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
fn assign_owners(groups: &mut [Group], needed_by: &[Vec<usize>], files: &Files) -> Result<()> {
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
        Some(group) => Err(Error::bug(format!("nobody can open file {}", files.ids[group.members[0]]))),
    }
}

/// Total order of groups: topological, ties by lowest id (which is the order of `groups`).
fn order(groups: &[Group], files: &Files) -> Result<Vec<usize>> {
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
    let names: Vec<String> = chain[start..]
        .iter()
        .map(|&g| {
            let file = groups[g].members[0];
            format!("{} {}", files.ids[file], files.files[file].name())
        })
        .collect();
    Err(Error::image(format!("files wait for each other: {}", names.join(" <- "))))
}
