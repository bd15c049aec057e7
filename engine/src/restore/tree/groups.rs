//! Process groups: any task may join one that exists in its session, so somebody must make it first.

use std::collections::HashMap;

use super::{Build, Group};
use crate::error::{Error, Result};
use crate::pstree::VirtPid;
use crate::restore::read::TaskIx;

impl Build<'_> {
    /// Says for each node how it gets its group; adds helpers for groups whose leader is gone.
    pub(super) fn find_groups(&mut self) -> Result<()> {
        // Sessions of groups: a group lives in exactly one.
        let mut sessions: HashMap<VirtPid, VirtPid> = HashMap::new();
        for i in 0..self.nodes.len() {
            if self.passing.contains(&TaskIx(i as u32)) {
                continue;
            }
            let (pgid, sid) = (self.nodes[i].pgid, self.nodes[i].sid);
            if *sessions.entry(pgid).or_insert(sid) != sid {
                return Err(Error::image(format!("pstree.img: group {pgid} is in two sessions")));
            }
            self.nodes[i].group = self.group_of(TaskIx(i as u32))?;
        }
        self.let_leaders_leave()
    }

    fn group_of(&mut self, ix: TaskIx) -> Result<Group> {
        let (pid, pgid, sid) = (self.node(ix).pid, self.node(ix).pgid, self.node(ix).sid);
        if pgid == pid {
            // setsid has made it already for a leader of a session.
            return Ok(if sid == pid { Group::Born } else { Group::Own });
        }
        if let Some(leader) = self.by_pid.get(&pgid).copied() {
            if self.is_helper(ix) && self.node(ix).parent == Some(leader) {
                return Ok(Group::Born);
            }
            return Ok(Group::Of(leader));
        }
        if sid == self.outside.sid && (pgid == self.outside.pgid || pgid == self.outside.sid) {
            return Ok(Group::Outside);
        }
        log::info!("Add a helper {pgid} for restoring PGID {pgid}");
        let helper = self.add_helper(pgid, ix, sid, pgid)?;
        self.nodes[helper.at()].group = Group::Own;
        Ok(Group::Of(helper))
    }

    /// A task whose number is that of a group it has left makes the group, then goes.
    fn let_leaders_leave(&mut self) -> Result<()> {
        let mut joiners: HashMap<TaskIx, u32> = HashMap::new();
        for node in &self.nodes {
            if let Group::Of(leader) = node.group {
                *joiners.entry(leader).or_default() += 1;
            }
        }
        for (leader, joiners) in joiners {
            let Group::Of(to) = self.node(leader).group else { continue };
            if !matches!(self.node(to).group, Group::Own | Group::Born) {
                return Err(Error::unsupported(format!(
                    "tasks {} and {} both left the process groups of their own numbers, and others stayed in them",
                    self.node(leader).pid,
                    self.node(to).pid
                )));
            }
            self.nodes[leader.at()].group = Group::Leave { joiners, to };
        }
        Ok(())
    }
}
