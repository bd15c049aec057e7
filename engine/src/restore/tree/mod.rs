//! Who forks whom, when, and with what shared: the process tree as it can really be made.
//!
//! A task's session is that of its maker at the moment of the fork, or its own after setsid(2); nothing else
//! can be chosen. Images only tell what the tree looked like at the end, when leaders of sessions and groups
//! may be gone and orphans may hang below a reaper. So [`Tree::build`] finds for every task who must have been
//! above it when it was born (`births`), and of that a maker:
//!
//! | the task's session is | it is made by |
//! |---|---|
//! | its parent's | its parent |
//! | one its parent left by setsid | its parent, before that setsid |
//! | led by a sibling | that sibling, with CLONE_PARENT |
//! | led by nobody any more | a helper that leads it, a sibling if that does, with CLONE_PARENT |
//! | any other | a helper below a member of the session; its end makes an orphan, in a [`Round`] |
//!
//! Other helpers live until everybody has his session and group, then exit and are reaped.

mod births;
mod groups;
mod outside;
mod rounds;
mod sharing;

use std::collections::{HashMap, HashSet};

pub use rounds::Round;

use crate::error::{Error, Result};
use crate::pstree::VirtPid;
use crate::restore::read::{Snapshot, TaskIx};

/// What becomes of a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// A task that will live.
    Alive,
    /// A task that will be dead, waiting to be reaped by its parent.
    Zombie,
    /// Made by us, gone again before any task runs.
    Helper,
}

/// How a node gets its process group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Group {
    /// It is in the right one when it is born.
    Born,
    /// It makes one of its own number.
    Own,
    /// It joins the group of this node once that exists.
    Of(TaskIx),
    /// It joins a group that lives outside the tree.
    Outside,
    /// It makes one of its own number, waits until `joiners` have joined it, then joins another node's, or one
    /// that lives outside the tree.
    Leave { joiners: u32, to: Option<TaskIx> },
}

/// One process to make.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Node {
    /// The pid it gets.
    pub pid: VirtPid,
    /// Its parent in the end; `None` for the root.
    pub parent: Option<TaskIx>,
    /// What becomes of it.
    pub role: Role,
    /// Session in the end. A node whose session is its own pid calls setsid.
    pub sid: VirtPid,
    /// Group in the end.
    pub pgid: VirtPid,
    /// How it gets there.
    pub group: Group,
    /// Forks to do before setsid, then those after it, in order.
    pub makes: Vec<Make>,
    /// Orphans are to become its children: it is a subreaper while it forks and in its rounds.
    pub reaper: bool,
    /// Helpers among its own children, to be reaped.
    pub helpers: Vec<TaskIx>,
}

/// One fork.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Make {
    /// Who is made.
    pub task: TaskIx,
    /// Before the maker's setsid.
    pub before_setsid: bool,
    /// CLONE_PARENT: the new task becomes the maker's sibling.
    pub sibling: bool,
    /// CLONE_FILES.
    pub share_files: bool,
    /// CLONE_FS.
    pub share_fs: bool,
}

impl Node {
    /// Whether it leads its session.
    pub fn leads_session(&self) -> bool {
        self.sid == self.pid
    }
}

/// All processes of a restore: the tasks of the snapshot under the same numbers, then helpers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tree {
    /// By [`TaskIx`].
    pub nodes: Vec<Node>,
    /// Orphans to make once everybody exists, in this order, before other helpers end.
    pub rounds: Vec<Round>,
}

/// Where the restore itself runs: what tasks inherit when their session or group lies outside the tree.
#[derive(Clone, Copy, Debug)]
pub struct Outside {
    /// Our session.
    pub sid: VirtPid,
    /// Our process group.
    pub pgid: VirtPid,
    /// `--shell-job`: session and group of the root are replaced by ours.
    pub shell_job: bool,
}

/// What the tree needs to know of a task.
#[derive(Clone, Debug)]
pub struct Member {
    /// Pid.
    pub pid: VirtPid,
    /// Number of the parent, always smaller than its own.
    pub parent: Option<TaskIx>,
    /// Process group.
    pub pgid: VirtPid,
    /// Session.
    pub sid: VirtPid,
    /// All its tids but the leader's.
    pub other_tids: Vec<VirtPid>,
    /// Whether it lives.
    pub alive: bool,
    /// Descriptor table, file system state and memory, by id.
    pub files: u32,
    /// See `files`.
    pub fs: u32,
    /// See `files`.
    pub vm: u32,
}

impl Member {
    /// The members of a snapshot.
    pub fn of(snapshot: &Snapshot) -> Vec<Member> {
        snapshot
            .tasks
            .iter()
            .map(|t| Member {
                pid: t.pid,
                parent: t.parent,
                pgid: t.pgid,
                sid: t.sid,
                other_tids: t.threads[1..].to_vec(),
                alive: t.is_alive(),
                files: t.ids.files_id,
                fs: t.ids.fs_id,
                vm: t.ids.vm_id,
            })
            .collect()
    }
}

/// Work in progress.
struct Build<'a> {
    nodes: Vec<Node>,
    /// Session each node is born in: where that matters, for leaders only once [`Build::find_makers`] is done.
    born: Vec<Option<VirtPid>>,
    /// Who makes each node (the root: itself) and how.
    made: Vec<Make>,
    makers: Vec<TaskIx>,
    by_pid: HashMap<VirtPid, TaskIx>,
    tids: HashSet<VirtPid>,
    outside: Outside,
    /// Whether somebody is in the session that the restore runs in.
    from_outside: bool,
    /// Helpers that only make orphans: no group matters to them.
    passing: HashSet<TaskIx>,
    rounds: Vec<Round>,
    /// Whether a pid is free on this host, for helpers whose number does not matter.
    is_free: &'a dyn Fn(VirtPid) -> bool,
}

impl Tree {
    /// Finds makers, helpers and groups for `members` (parents before children, the root first).
    /// `is_free` says whether a number is free on this host.
    ///
    /// # Errors
    /// A tree that cannot be made (with the tasks concerned), a session outside without `--shell-job`.
    pub fn build(members: &[Member], outside: Outside, is_free: &dyn Fn(VirtPid) -> bool) -> Result<Tree> {
        let mut build = Build::new(members, outside, is_free);
        build.adopt_outside()?;
        build.find_makers()?;
        build.find_groups()?;
        build.share(members)?;
        build.finish()
    }

    /// A node.
    pub fn node(&self, ix: TaskIx) -> &Node {
        &self.nodes[ix.at()]
    }

    /// How many nodes there are.
    pub fn len(&self) -> u32 {
        self.nodes.len() as u32
    }

    /// Whether there is none; never true for a tree that was built.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }
}

impl<'a> Build<'a> {
    fn new(members: &[Member], outside: Outside, is_free: &'a dyn Fn(VirtPid) -> bool) -> Self {
        let mut build = Build {
            nodes: Vec::with_capacity(members.len()),
            born: Vec::new(),
            made: Vec::new(),
            makers: Vec::new(),
            by_pid: HashMap::new(),
            tids: members.iter().flat_map(|m| m.other_tids.iter().copied()).collect(),
            outside,
            from_outside: false,
            passing: HashSet::new(),
            rounds: Vec::new(),
            is_free,
        };
        for m in members {
            let role = if m.alive { Role::Alive } else { Role::Zombie };
            build.add(m.pid, m.parent, role, m.sid, m.pgid);
        }
        build
    }

    fn add(
        &mut self,
        pid: VirtPid,
        parent: Option<TaskIx>,
        role: Role,
        sid: VirtPid,
        pgid: VirtPid,
    ) -> TaskIx {
        let ix = TaskIx(self.nodes.len() as u32);
        self.nodes.push(Node {
            pid,
            parent,
            role,
            sid,
            pgid,
            group: Group::Born,
            makes: Vec::new(),
            reaper: false,
            helpers: Vec::new(),
        });
        self.born.push(None);
        self.makers.push(parent.unwrap_or(ix));
        self.made.push(Make {
            task: ix,
            before_setsid: false,
            sibling: false,
            share_files: false,
            share_fs: false,
        });
        self.by_pid.insert(pid, ix);
        ix
    }

    fn node(&self, ix: TaskIx) -> &Node {
        &self.nodes[ix.at()]
    }

    /// Adds a helper with the given number, which must belong to no thread.
    fn add_helper(&mut self, pid: VirtPid, parent: TaskIx, sid: VirtPid, pgid: VirtPid) -> Result<TaskIx> {
        if self.tids.contains(&pid) {
            return Err(Error::unsupported(format!(
                "the number {pid} of a session or group whose leader is gone is now that of a thread in the tree"
            )));
        }
        let ix = self.add(pid, Some(parent), Role::Helper, sid, pgid);
        self.nodes[parent.at()].helpers.push(ix);
        Ok(ix)
    }

    /// Hands every fork to its maker.
    fn finish(mut self) -> Result<Tree> {
        self.check_makers()?;
        for i in 1..self.nodes.len() {
            let maker = self.makers[i];
            self.nodes[maker.at()].makes.push(self.made[i]);
        }
        for node in &mut self.nodes {
            // Forks before setsid come first; within each part, the one with the lower pid.
            let first = |m: &Make| !m.before_setsid;
            node.makes.sort_by_key(first);
        }
        Ok(Tree { nodes: self.nodes, rounds: self.rounds })
    }

    /// Every chain of makers must lead to the root.
    fn check_makers(&self) -> Result<()> {
        // 0 not seen, 1 on the way, 2 leads to the root
        let mut seen = vec![0u8; self.nodes.len()];
        seen[0] = 2;
        for start in 1..self.nodes.len() {
            let mut way = Vec::new();
            let mut at = start;
            while seen[at] == 0 {
                seen[at] = 1;
                way.push(at);
                at = self.makers[at].at();
            }
            if seen[at] == 1 {
                return Err(Error::unsupported(format!(
                    "task {} and task {} would each have to be forked by the other",
                    self.nodes[start].pid, self.nodes[at].pid
                )));
            }
            way.into_iter().for_each(|i| seen[i] = 2);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
