//! Trees that nobody can fork into place: tasks are born deeper than they belong and move up in turn.
//!
//! A session goes on below the process that leads it, so whoever is in it and has a parent outside of it was once
//! below that parent together with the session's leader; later the leader moved up. So sessions are born one
//! below the other, with a helper above every task that is not where it belongs:
//!
//! ```text
//!   wanted      68 leads a session            born      68
//!               +- 70 in session 69                     +- helper
//!               72 leads a session, beside 68              +- 72
//!               +- 73 in session 69                           +- 69 (gone by then, a helper too)
//!                                                                +- helper - 70
//!                                                                +- helper - 73
//! ```
//!
//! Then, the deepest first, each helper ends while only the parent that its child is to get is a reaper: one
//! [`Round`] each. Below a node there is then nobody any more who has to get further up than it.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::{Build, Role};
use crate::error::{Error, Result};
use crate::pstree::VirtPid;
use crate::restore::read::TaskIx;

/// An orphan is made: `helper`, a child of `parent`, ends, and its child comes to `reaper`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Round {
    /// Who ends.
    pub helper: TaskIx,
    /// Who waits for that.
    pub parent: TaskIx,
    /// The only reaper at that moment.
    pub reaper: TaskIx,
}

/// Trees of more tasks are not looked at: what is done here grows faster than they do.
const MOST: usize = 3000;

/// One session.
#[derive(Default)]
struct Session {
    /// Whom all its members descend from: its leader, or the root. `None`: gone.
    head: Option<TaskIx>,
    /// All others.
    members: Vec<TaskIx>,
    /// Numbers of sessions that must be born above it.
    below: BTreeSet<usize>,
}

struct Places {
    sessions: Vec<Session>,
    numbers: Vec<VirtPid>,
    /// Session of each node, in the end.
    of: Vec<usize>,
    /// Session that a leader is born in because it forks members of it before setsid.
    early: BTreeMap<TaskIx, usize>,
    /// Nodes that others must be born below though they are not their children.
    passed: HashSet<TaskIx>,
    /// Who each node is born below, and whether before that one's setsid.
    above: BTreeMap<TaskIx, (TaskIx, bool)>,
    depth: BTreeMap<TaskIx, usize>,
    order: Vec<TaskIx>,
}

impl Build<'_> {
    /// Gives every node its maker where [`Build::find_makers`] finds none.
    ///
    /// # Errors
    /// A tree that cannot have come about by forks, setsid and ends of parents, as far as is known.
    pub(super) fn find_rounds(&mut self) -> Result<()> {
        if self.nodes.len() > MOST {
            return Err(Error::unsupported(format!("a tree of more than {MOST} tasks that must move")));
        }
        let mut places = self.sessions()?;
        self.choose_births(&mut places)?;
        for at in order(&places.sessions)? {
            self.place_session(&mut places, at)?;
        }
        self.make_all(&places)
    }

    fn sessions(&self) -> Result<Places> {
        let mut numbers: BTreeMap<VirtPid, Vec<TaskIx>> = BTreeMap::new();
        for (i, node) in self.nodes.iter().enumerate() {
            numbers.entry(node.sid).or_default().push(TaskIx(i as u32));
        }
        let mut places = Places {
            sessions: Vec::new(),
            numbers: numbers.keys().copied().collect(),
            of: vec![0; self.nodes.len()],
            early: BTreeMap::new(),
            passed: HashSet::new(),
            above: BTreeMap::new(),
            depth: BTreeMap::new(),
            order: Vec::new(),
        };
        for (at, (sid, all)) in numbers.into_iter().enumerate() {
            let heads = |ix: &TaskIx| *ix == TaskIx::ROOT || self.node(*ix).leads_session();
            let (head, members): (Vec<_>, Vec<_>) = all.iter().copied().partition(heads);
            all.iter().for_each(|ix| places.of[ix.at()] = at);
            if head.is_empty() && self.by_pid.contains_key(&sid) {
                return Err(Error::unsupported(format!("task {sid} has left the session of its number")));
            }
            places.sessions.push(Session { head: head.first().copied(), members, below: BTreeSet::new() });
        }
        Ok(places)
    }

    /// Parents outside of a session whose children are in it, with whether the child is no leader.
    fn parents_outside(&self, places: &Places, at: usize) -> Vec<(TaskIx, bool)> {
        let session = &places.sessions[at];
        let of_head = session.head.and_then(|h| self.node(h).parent).map(|p| (p, false));
        let of_members = session.members.iter().filter_map(|m| self.node(*m).parent).map(|p| (p, true));
        of_head.into_iter().chain(of_members).filter(|(p, _)| places.of[p.at()] != at).collect()
    }

    /// Decides for the leaders with children in other sessions: those were forked before setsid, or their
    /// session's leader was once further below.
    fn choose_births(&self, places: &mut Places) -> Result<()> {
        let mut open = Vec::new();
        for at in 0..places.sessions.len() {
            for (parent, member) in self.parents_outside(places, at) {
                if member && parent != TaskIx::ROOT && self.node(parent).leads_session() {
                    open.push((parent, at));
                } else {
                    places.sessions[at].below.insert(places.of[parent.at()]);
                }
            }
        }
        open.sort_unstable();
        open.dedup();
        // First those that cannot be otherwise, then the others one by one.
        loop {
            let forced = open.iter().position(|(p, at)| places.is_below(places.of[p.at()], *at));
            if let Some(i) = forced {
                let (parent, at) = open.swap_remove(i);
                open.extend(self.be_born_early(places, parent, at)?);
            } else if let Some((parent, at)) = open.pop() {
                places.sessions[at].below.insert(places.of[parent.at()]);
            } else {
                break;
            }
        }
        for at in 0..places.sessions.len() {
            for (parent, _) in self.parents_outside(places, at) {
                let mut next = Some(parent);
                while let Some(ix) = next.filter(|ix| places.passed.insert(*ix)) {
                    next = self.node(ix).parent;
                }
            }
        }
        Ok(())
    }

    /// Gives what follows for its parent, if that is a leader, too: it must be there before.
    fn be_born_early(
        &self,
        places: &mut Places,
        leader: TaskIx,
        at: usize,
    ) -> Result<Option<(TaskIx, usize)>> {
        if let Some(other) = places.early.insert(leader, at) {
            if other == at {
                return Ok(None);
            }
            return Err(Error::unsupported(format!(
                "task {} would have to be born in the sessions {} and {}",
                self.node(leader).pid,
                places.numbers[other],
                places.numbers[at]
            )));
        }
        places.sessions[places.of[leader.at()]].below.insert(at);
        let Some(parent) = self.node(leader).parent.filter(|p| places.of[p.at()] != at) else {
            return Ok(None);
        };
        if parent != TaskIx::ROOT && self.node(parent).leads_session() {
            return Ok(Some((parent, at)));
        }
        places.sessions[at].below.insert(places.of[parent.at()]);
        Ok(None)
    }

    /// Needs: all sessions above have been placed.
    fn place_session(&mut self, places: &mut Places, at: usize) -> Result<()> {
        let mut needed: Vec<TaskIx> = self.parents_outside(places, at).into_iter().map(|(p, _)| p).collect();
        needed.retain(|p| places.early.get(p) != Some(&at));
        let head = match places.sessions[at].head {
            Some(TaskIx::ROOT) => {
                places.put(TaskIx::ROOT, None);
                TaskIx::ROOT
            }
            Some(head) if places.early.contains_key(&head) => head,
            head => {
                let under = places.order.iter().rev().copied().find(|t| places.has_above(*t, &needed));
                let under = under.ok_or_else(|| self.lost(places, at))?;
                let head = match head {
                    Some(head) => head,
                    None => {
                        let sid = places.numbers[at];
                        log::info!("Add a helper {sid} for restoring SID {sid}");
                        places.of.push(at);
                        self.add_helper(sid, under, sid, sid)?
                    }
                };
                places.put(head, Some((under, false)));
                head
            }
        };
        if !places.has_above(head, &needed) {
            return Err(self.lost(places, at));
        }
        let mut tip = head;
        for ix in self.members_in_order(places, at) {
            let Some(parent) = self.node(ix).parent else { continue };
            let parent_is_here = places.of[parent.at()] == at || places.early.get(&parent) == Some(&at);
            let chained = places.passed.contains(&ix) || places.early.contains_key(&ix);
            let under = if chained || !parent_is_here { tip } else { parent };
            if !places.has_above(under, &[parent]) {
                return Err(self.lost(places, at));
            }
            let before = places.early.get(&under) == Some(&at);
            places.put(ix, Some((under, before)));
            if chained {
                tip = ix;
            }
        }
        Ok(())
    }

    /// Those born in the session, parents before children, leaders of other sessions as late as possible.
    fn members_in_order(&self, places: &Places, at: usize) -> Vec<TaskIx> {
        let early = places.early.iter().filter(|(_, born)| **born == at).map(|(ix, _)| *ix);
        let all: BTreeSet<TaskIx> = places.sessions[at].members.iter().copied().chain(early).collect();
        let mut children: BTreeMap<TaskIx, Vec<TaskIx>> = BTreeMap::new();
        let mut ready = BTreeSet::new();
        for ix in &all {
            match self.node(*ix).parent.filter(|p| all.contains(p)) {
                Some(parent) => children.entry(parent).or_default().push(*ix),
                None => _ = ready.insert((places.early.contains_key(ix), *ix)),
            }
        }
        let mut order = Vec::with_capacity(all.len());
        while let Some((_, ix)) = ready.pop_first() {
            order.push(ix);
            let next = children.remove(&ix).unwrap_or_default();
            ready.extend(next.into_iter().map(|c| (places.early.contains_key(&c), c)));
        }
        order
    }

    fn lost(&self, places: &Places, at: usize) -> Error {
        Error::unsupported(format!(
            "no way is known to make the members of session {} below their parents",
            places.numbers[at]
        ))
    }

    /// Hands forks to makers, with helpers in between where the parent in the end is another.
    fn make_all(&mut self, places: &Places) -> Result<()> {
        let used: HashSet<VirtPid> = self.nodes.iter().flat_map(|n| [n.pid, n.sid, n.pgid]).collect();
        let mut free = self.free_numbers(used);
        let mut rounds = Vec::new();
        for ix in &places.order {
            let Some((under, before)) = places.above.get(ix).copied() else { continue };
            let parent = self.node(*ix).parent.ok_or_else(|| Error::bug("a second root"))?;
            if parent == under {
                self.makers[ix.at()] = under;
                self.made[ix.at()].before_setsid = before;
                continue;
            }
            let pid = free.next().ok_or_else(|| Error::host("there is no free pid for a helper"))?;
            let born = places.early.get(&under).filter(|_| before);
            let sid = born.map_or(self.node(under).sid, |at| places.numbers[*at]);
            let helper = self.add(pid, Some(under), Role::Helper, sid, sid);
            self.made[helper.at()].before_setsid = before;
            self.makers[ix.at()] = helper;
            self.passing.insert(helper);
            self.nodes[parent.at()].reaper = true;
            rounds.push(Round { helper, parent: under, reaper: parent });
        }
        rounds.reverse();
        self.rounds = rounds;
        Ok(())
    }
}

impl Places {
    fn put(&mut self, ix: TaskIx, above: Option<(TaskIx, bool)>) {
        let depth = above.and_then(|(a, _)| self.depth.get(&a)).map_or(0, |d| d + 1);
        self.depth.insert(ix, depth);
        self.above.extend(above.map(|a| (ix, a)));
        self.order.push(ix);
    }

    /// Whether all of `needed` are `ix` or above it, where it is born.
    fn has_above(&self, ix: TaskIx, needed: &[TaskIx]) -> bool {
        let mut left: BTreeSet<TaskIx> = needed.iter().copied().collect();
        let mut at = Some(ix);
        while let Some(ix) = at.filter(|_| !left.is_empty()) {
            left.remove(&ix);
            at = self.above.get(&ix).map(|(above, _)| *above);
        }
        left.is_empty()
    }

    /// Whether session `low` must be born below session `high`.
    fn is_below(&self, low: usize, high: usize) -> bool {
        let (mut seen, mut todo) = (HashSet::from([low]), vec![low]);
        while let Some(at) = todo.pop() {
            if self.sessions[at].below.contains(&high) {
                return true;
            }
            todo.extend(self.sessions[at].below.iter().copied().filter(|b| seen.insert(*b)));
        }
        false
    }
}

/// Sessions, those above before those below.
fn order(sessions: &[Session]) -> Result<Vec<usize>> {
    let mut left: Vec<usize> = sessions.iter().map(|s| s.below.len()).collect();
    let mut under: Vec<Vec<usize>> = vec![Vec::new(); sessions.len()];
    for (at, session) in sessions.iter().enumerate() {
        session.below.iter().for_each(|above| under[*above].push(at));
    }
    // That of the root has nobody above it.
    let mut ready: BTreeSet<usize> = (0..sessions.len()).filter(|at| left[*at] == 0).collect();
    let mut order = Vec::with_capacity(sessions.len());
    while let Some(at) = ready.pop_first() {
        order.push(at);
        for next in &under[at] {
            left[*next] -= 1;
            if left[*next] == 0 {
                ready.insert(*next);
            }
        }
    }
    match order.len() == sessions.len() {
        true => Ok(order),
        false => Err(Error::unsupported("sessions of which each would have to be older than the other")),
    }
}
