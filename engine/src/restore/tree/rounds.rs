//! From births to forks: helpers, and rounds in which those who were born too deep move up.
//!
//! Whoever is not born by the parent it has in the end is forked with CLONE_PARENT if that makes it a child of that
//! parent, and otherwise by a helper, whose end will make it an orphan. The helpers end one after the other, the
//! deepest first, each while only the parent that its children are to get is a reaper: one [`Round`] each. Above
//! a helper that ends everybody still is where he was born; below, there is nobody any more who has to get further
//! up than its children.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::births::{Birth, Births, Impossible, Session, Wanted};
use super::{Build, Role};
use crate::error::{Error, Result};
use crate::pstree::VirtPid;
use crate::restore::read::TaskIx;

/// Orphans are made: `helper`, a child of `parent`, ends, and its children come to `reaper`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Round {
    /// Who ends.
    pub helper: TaskIx,
    /// Who waits for that.
    pub parent: TaskIx,
    /// The only reaper at that moment.
    pub reaper: TaskIx,
}

impl Build<'_> {
    /// Gives every node its maker.
    ///
    /// # Errors
    /// A tree that cannot have come about by forks, setsid and ends of parents.
    pub(super) fn find_makers(&mut self) -> Result<()> {
        let (wanted, numbers) = self.wanted()?;
        let births = Births::find(&wanted).map_err(|e| self.impossible(e))?;
        let nodes = self.add_heads(&wanted, &numbers, &births)?;
        self.make_all(&nodes, &numbers, &births)
    }

    /// The tree in terms of places and sessions, with the number of each session.
    fn wanted(&self) -> Result<(Wanted, Vec<VirtPid>)> {
        let mut members: BTreeMap<(bool, VirtPid), Vec<usize>> = BTreeMap::new();
        members.insert((false, self.outside.sid), Vec::new());
        for (i, node) in self.nodes.iter().enumerate() {
            if node.leads_session() && node.pgid != node.pid {
                return Err(Error::image(format!(
                    "pstree.img: task {} leads a session, so it cannot be in the group of {}",
                    node.pid, node.pgid
                )));
            }
            members.entry((!self.is_outside(node.sid), node.sid)).or_default().push(i);
        }
        let mut wanted = Wanted {
            parent: self.nodes.iter().map(|n| n.parent.map(TaskIx::at)).collect(),
            session: vec![0; self.nodes.len()],
            sessions: Vec::with_capacity(members.len()),
        };
        let numbers: Vec<VirtPid> = members.keys().map(|(_, sid)| *sid).collect();
        for (session, ((inside, sid), mut members)) in members.into_iter().enumerate() {
            members.iter().for_each(|m| wanted.session[*m] = session);
            let leader = self.by_pid.get(&sid).map(|ix| ix.at()).filter(|_| inside);
            let head = match leader {
                Some(leader) if !members.contains(&leader) => {
                    return Err(Error::image(format!(
                        "pstree.img: task {sid} is not in the session of its number"
                    )));
                }
                Some(leader) => leader,
                None => {
                    wanted.parent.push(None);
                    wanted.session.push(session);
                    wanted.parent.len() - 1
                }
            };
            members.retain(|m| *m != head);
            wanted.sessions.push(Session { head, members });
        }
        wanted.parent[0] = Some(wanted.sessions[0].head);
        Ok((wanted, numbers))
    }

    fn impossible(&self, e: Impossible) -> Error {
        let child = &self.nodes[if e.child < self.nodes.len() { e.child } else { 0 }];
        let parent = child.parent.map_or(VirtPid(0), |p| self.node(p).pid);
        let how = match e.gave_up {
            false => "no way leads to",
            true => "no way was found in reasonable time to",
        };
        Error::unsupported(format!(
            "{how} task {} in session {} as a child of task {parent}",
            child.pid, child.sid
        ))
    }

    /// Adds helpers that stand for leaders that are gone. Gives the node of each place, none for the outside.
    fn add_heads(
        &mut self,
        wanted: &Wanted,
        numbers: &[VirtPid],
        births: &Births,
    ) -> Result<Vec<Option<TaskIx>>> {
        let tasks = self.nodes.len();
        let mut nodes: Vec<Option<TaskIx>> =
            (0..wanted.parent.len()).map(|i| (i < tasks).then_some(TaskIx(i as u32))).collect();
        for at in births.order.iter().copied().filter(|at| *at >= tasks) {
            let Some(birth) = births.of[at] else { continue };
            let under = nodes[birth.under].ok_or_else(|| Error::bug("a helper above its maker"))?;
            let sid = numbers[wanted.session[at]];
            nodes[at] = Some(self.add_helper(sid, under, sid, sid)?);
        }
        Ok(nodes)
    }

    /// Hands forks to makers, with helpers in between where nothing else does.
    fn make_all(&mut self, nodes: &[Option<TaskIx>], numbers: &[VirtPid], births: &Births) -> Result<()> {
        let used: HashSet<VirtPid> = self.nodes.iter().flat_map(|n| [n.pid, n.sid, n.pgid]).collect();
        let mut free = self.free_numbers(used);
        // Parent of each node right after its birth; helpers in between, by who made them, when, and for whom.
        let mut parents: HashMap<TaskIx, TaskIx> = HashMap::new();
        let mut between: HashMap<(TaskIx, bool, TaskIx), TaskIx> = HashMap::new();
        let mut rounds = Vec::new();
        for at in births.order.iter().copied() {
            let (Some(ix), Some(Birth { under, session, held })) = (nodes[at], births.of[at]) else {
                continue;
            };
            if !self.node(ix).leads_session() {
                self.born[ix.at()] = Some(numbers[session]);
            }
            let Some(under) = nodes[under] else { continue };
            let parent = self.node(ix).parent.ok_or_else(|| Error::bug("a second root"))?;
            let sid = numbers[session];
            // Early: in a session that its maker is in before it leads its own.
            let before = self.node(under).leads_session() && self.node(under).sid != sid;
            if before {
                self.born[under.at()] = Some(sid);
            }
            let made = &mut self.made[ix.at()];
            made.before_setsid = before;
            if parent == under || parents.get(&under) == Some(&parent) && !held {
                made.sibling = parent != under;
                self.makers[ix.at()] = under;
                parents.insert(ix, parent);
                continue;
            }
            made.before_setsid = false;
            let helper = match between.get(&(under, before, parent)) {
                Some(helper) => *helper,
                None => {
                    let pid = free.next().ok_or_else(|| Error::host("there is no free pid for a helper"))?;
                    let helper = self.add(pid, Some(under), Role::Helper, sid, sid);
                    self.made[helper.at()].before_setsid = before;
                    self.passing.insert(helper);
                    between.insert((under, before, parent), helper);
                    rounds.push(Round { helper, parent: under, reaper: parent });
                    helper
                }
            };
            self.makers[ix.at()] = helper;
            self.nodes[parent.at()].reaper = true;
        }
        rounds.reverse();
        self.rounds = rounds;
        Ok(())
    }
}
