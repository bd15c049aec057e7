//! One session begins: who is born in it, in which order, and what must go on below the leaders among them.

use std::collections::{BTreeMap, BTreeSet};

use super::Wanted;
use super::needs::{Need, Why};

/// A session that begins.
#[derive(Debug)]
pub(super) struct Line {
    /// Members and early leaders in the order of their births, each below the one before.
    pub order: Vec<usize>,
    /// Sessions that early leaders begin, with those that must begin below them.
    pub branches: Vec<(usize, Vec<usize>)>,
    /// All others.
    pub rest: Vec<usize>,
}

/// Lets `session` begin while those in `todo` have not; what it needs else has. None: that leads nowhere.
pub(super) fn begin(wanted: &Wanted, needs: &[Vec<Need>], session: usize, todo: &[usize]) -> Option<Line> {
    let open: BTreeSet<usize> = todo.iter().copied().collect();
    let mut early: BTreeMap<usize, usize> = BTreeMap::new();
    for need in needs[session].iter().filter(|n| open.contains(&n.of)) {
        match need.why {
            Why::Early => _ = early.insert(need.of, need.who),
            Why::Member | Why::Head => return None,
        }
    }
    let mut split = Split::new(todo);
    for at in todo.iter().copied() {
        for need in &needs[at] {
            if need.of == session {
                if need.why == Why::Member {
                    split.below.push((at, need.who));
                }
            } else if early.contains_key(&need.of) {
                match need.why {
                    Why::Member if early.contains_key(&at) => return None,
                    Why::Member => split.join(at, need.of),
                    Why::Head | Why::Early => split.below.push((at, need.who)),
                }
            } else if open.contains(&need.of) {
                if early.contains_key(&at) && need.why != Why::Early {
                    return None;
                }
                split.join(at, need.of);
            }
        }
    }
    // Which early leader each group of sessions must be below.
    let mut group_of: BTreeMap<usize, usize> = BTreeMap::new();
    for leads in early.keys() {
        if group_of.insert(split.group(*leads), *leads).is_some() {
            return None;
        }
    }
    let mut before: Vec<(usize, usize)> = Vec::new();
    for (at, who) in std::mem::take(&mut split.below) {
        if let Some(leads) = group_of.get(&split.group(at))
            && early[leads] != who
        {
            before.push((who, early[leads]));
        }
    }
    let order = in_order(wanted, session, &early, &before)?;
    let mut branches: BTreeMap<usize, Vec<usize>> = early.keys().map(|e| (*e, Vec::new())).collect();
    let mut rest = Vec::new();
    for at in todo.iter().copied().filter(|at| !early.contains_key(at)) {
        match group_of.get(&split.group(at)) {
            Some(leads) => branches.entry(*leads).or_default().push(at),
            None => rest.push(at),
        }
    }
    Some(Line { order, branches: branches.into_iter().collect(), rest })
}

/// The order of those born in a session that begins when nothing it needs is still to come.
pub(super) fn alone(wanted: &Wanted, session: usize) -> Option<Vec<usize>> {
    in_order(wanted, session, &BTreeMap::new(), &[])
}

/// Parents before children and `before` as told, leaders as late as possible: their sessions then have more above
/// them. None: they go round in a circle.
fn in_order(
    wanted: &Wanted,
    session: usize,
    early: &BTreeMap<usize, usize>,
    before: &[(usize, usize)],
) -> Option<Vec<usize>> {
    let members = wanted.sessions[session].members.iter().copied();
    let all: BTreeMap<usize, bool> =
        members.map(|m| (m, false)).chain(early.values().map(|l| (*l, true))).collect();
    let mut left: BTreeMap<usize, usize> = all.keys().map(|at| (*at, 0)).collect();
    let mut after: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    let parents = all.keys().filter_map(|at| Some((wanted.parent[*at]?, *at)));
    for (first, second) in parents.chain(before.iter().copied()).filter(|(first, _)| all.contains_key(first))
    {
        *left.get_mut(&second)? += 1;
        after.entry(first).or_default().push(second);
    }
    let ready = left.iter().filter(|(_, left)| **left == 0).map(|(at, _)| (all[at], *at));
    let mut ready: BTreeSet<(bool, usize)> = ready.collect();
    let mut order = Vec::with_capacity(all.len());
    while let Some((_, at)) = ready.pop_first() {
        order.push(at);
        for next in after.remove(&at).unwrap_or_default() {
            let left = left.get_mut(&next)?;
            *left -= 1;
            if *left == 0 {
                ready.insert((all[&next], next));
            }
        }
    }
    (order.len() == all.len()).then_some(order)
}

/// Sessions that must be below the same early leader, if any of them must be below one.
struct Split {
    group: BTreeMap<usize, usize>,
    /// Sessions with whom of the line they must be below.
    below: Vec<(usize, usize)>,
}

impl Split {
    fn new(todo: &[usize]) -> Split {
        Split { group: todo.iter().map(|at| (*at, *at)).collect(), below: Vec::new() }
    }

    fn group(&mut self, at: usize) -> usize {
        let mut top = at;
        while self.group[&top] != top {
            top = self.group[&top];
        }
        let mut at = at;
        while at != top {
            at = self.group.insert(at, top).unwrap_or(top);
        }
        top
    }

    fn join(&mut self, a: usize, b: usize) {
        let (a, b) = (self.group(a), self.group(b));
        self.group.insert(a, b);
    }
}
