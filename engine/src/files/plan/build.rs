//! From nodes to steps: who uses what, which files are opened together, by whom, and in which total order.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap, VecDeque},
};

use super::{FilesPlan, Node, Packets, Place, Slot, Step, Table, TableIx, TablePlan};
use crate::{
    error::{Error, Result},
    files::{GroupKey, Needs, RestoredFile, lock::Locks, memfd::Memfds, pidfd::DeadPidfds, tty::Ttys},
    pstree::{FileId, VirtPid},
};

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

pub(super) fn plan(
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
            let node = &nodes[id];
            if node.file.has_finish() {
                plans[node.owner.0].steps.push(Step::Finish(*id));
            }
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
