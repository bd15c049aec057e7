//! Sessions: which moment of which process a task must be forked from.

use std::collections::HashSet;

use super::{Build, Member, Node, Role};
use crate::error::{Error, Result};
use crate::pstree::VirtPid;
use crate::restore::read::TaskIx;

/// Helpers without a number of their own start here: lower ones belong to a booting system.
const FIRST_FREE: i32 = 301;
/// `pid_max` of a kernel that was told nothing.
const LAST_FREE: i32 = 32768;

impl<'a> Build<'a> {
    /// Puts the session and the group that lie outside the tree in the place of those of the dump.
    pub(super) fn adopt_outside(&mut self, members: &[Member]) -> Result<()> {
        let root = &members[0];
        let out = self.outside;
        // 0: the leader was outside the pid namespace that was dumped.
        for node in &mut self.nodes {
            if node.sid.0 == 0 {
                node.sid = out.sid;
            }
            if node.pgid.0 == 0 {
                node.pgid = out.pgid;
            }
        }
        if root.sid == root.pid {
            return Ok(());
        }
        if !out.shell_job && root.sid.0 != 0 {
            return Err(Error::usage(format!(
                "the root task {} is in the session of {}, which is not part of the dump",
                root.pid, root.sid
            ))
            .remedy("give --shell-job to restore it into the session of this shell"));
        }
        if root.pgid != root.pid {
            self.replace(root.pgid, out.pgid, "GID", |n| &mut n.pgid)?;
        }
        if root.sid != out.sid {
            // Others may be in the group of the shell itself; its session has such a group, too.
            self.nodes.iter_mut().filter(|n| n.pgid == root.sid).for_each(|n| n.pgid = out.sid);
            self.replace(root.sid, out.sid, "SID", |n| &mut n.sid)?;
        }
        for i in 0..self.nodes.len() {
            self.born[i] = (self.nodes[i].sid != self.nodes[i].pid).then_some(self.nodes[i].sid);
        }
        Ok(())
    }

    fn replace(
        &mut self,
        old: VirtPid,
        new: VirtPid,
        what: &str,
        field: impl Fn(&mut Node) -> &mut VirtPid,
    ) -> Result<()> {
        if old == new {
            return Ok(());
        }
        log::info!("Migrating process tree ({what} {old}->{new})");
        // Our own session or group must not be mistaken for one of the dump.
        let taken = self.by_pid.contains_key(&new) || self.tids.contains(&new);
        if taken || self.nodes.iter_mut().any(|n| *field(n) == new) {
            return Err(Error::host(format!("our own {what} {new} has the number of one in the dump"))
                .remedy("restore from another shell"));
        }
        self.nodes.iter_mut().filter_map(|n| (*field(n) == old).then(|| field(n))).for_each(|f| *f = new);
        Ok(())
    }

    /// Gives every node its maker; see the table in the module's parent.
    pub(super) fn find_makers(&mut self) -> Result<()> {
        for node in &self.nodes {
            if node.sid == node.pid && node.pgid != node.pid {
                return Err(Error::image(format!(
                    "pstree.img: task {} leads a session, so it cannot be in the group of {}",
                    node.pid, node.pgid
                )));
            }
        }
        // Children before parents: what a child needs of its parent's birth is known when the parent's
        // turn comes. Helpers added on the way are made at the place that adds them.
        for i in (1..self.nodes.len()).rev() {
            self.find_maker(TaskIx(i as u32))?;
        }
        Ok(())
    }

    fn find_maker(&mut self, child: TaskIx) -> Result<()> {
        let Some(session) = self.born[child.at()] else { return Ok(()) };
        let Some(parent) = self.node(child).parent else { return Ok(()) };
        if self.node(parent).sid == session {
            return Ok(());
        }
        let leader = self.by_pid.get(&session).copied();
        if let Some(l) = leader
            && self.node(l).parent == Some(parent)
            && self.node(l).leads_session()
            && l != child
        {
            self.make_sibling(child, l);
            return Ok(());
        }
        let leader_below = leader.is_some_and(|l| self.is_below(l, parent));
        if !leader_below && self.can_be_born_in(parent, session) {
            self.born[parent.at()] = Some(session);
            self.made[child.at()].before_setsid = true;
            return Ok(());
        }
        match leader {
            Some(l) if leader_below && self.node(l).leads_session() => self.make_orphan(child, parent, l),
            None => {
                log::info!("Add a helper {session} for restoring SID {session}");
                let helper = self.add_helper(session, parent, session, session)?;
                self.make_sibling(child, helper);
                Ok(())
            }
            Some(l) => Err(Error::unsupported(format!(
                "no way is known to make task {} in session {session} as a child of task {} while {} lives",
                self.node(child).pid,
                self.node(parent).pid,
                self.node(l).pid
            ))),
        }
    }

    /// Whether `node` leads a session of its own and may have been born in `session`.
    fn can_be_born_in(&self, node: TaskIx, session: VirtPid) -> bool {
        node != TaskIx::ROOT
            && self.node(node).leads_session()
            && self.born[node.at()].is_none_or(|born| born == session)
    }

    fn make_sibling(&mut self, child: TaskIx, maker: TaskIx) {
        self.makers[child.at()] = maker;
        self.made[child.at()].sibling = true;
    }

    /// `child` is forked by a helper below `leader`; when that exits, the child comes to `reaper`.
    fn make_orphan(&mut self, child: TaskIx, reaper: TaskIx, leader: TaskIx) -> Result<()> {
        let mut between = self.node(leader).parent;
        while let Some(ix) = between.filter(|ix| *ix != reaper) {
            if self.node(ix).reaper {
                return Err(Error::unsupported(format!(
                    "task {} cannot become a child of task {}: task {} between them would get it",
                    self.node(child).pid,
                    self.node(reaper).pid,
                    self.node(ix).pid
                )));
            }
            between = self.node(ix).parent;
        }
        let session = self.node(leader).sid;
        let present = self.node(leader).helpers.iter().copied().find(|h| !self.node(*h).leads_session());
        let helper = match present {
            Some(helper) => helper,
            None => {
                let pid = self.free_number()?;
                log::info!("Add a helper {pid} for restoring SID {session}");
                let pgid = self.node(leader).pgid;
                self.add_helper(pid, leader, session, pgid)?
            }
        };
        self.nodes[reaper.at()].reaper = true;
        self.makers[child.at()] = helper;
        Ok(())
    }

    /// A number that neither the images nor the host use.
    fn free_number(&self) -> Result<VirtPid> {
        let used = self.nodes.iter().flat_map(|n| [n.pid, n.sid, n.pgid]).collect();
        self.free_numbers(used).next().ok_or_else(|| Error::host("there is no free pid for a helper"))
    }

    /// All such numbers, but for those `used`.
    pub(super) fn free_numbers(&self, mut used: HashSet<VirtPid>) -> impl Iterator<Item = VirtPid> + use<'a> {
        used.extend(self.tids.iter().copied());
        let is_free = self.is_free;
        (FIRST_FREE..LAST_FREE).map(VirtPid).filter(move |p| !used.contains(p) && is_free(*p))
    }

    /// Whether a node is a helper.
    pub(super) fn is_helper(&self, ix: TaskIx) -> bool {
        self.node(ix).role == Role::Helper
    }
}
