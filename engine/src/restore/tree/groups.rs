//! Process groups: any task may join one that exists in its session, so somebody must make it first.

use std::collections::{BTreeMap, HashMap, HashSet};

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
            let leader = self.by_pid.get(&pgid).map(|leader| self.node(*leader).sid);
            if *sessions.entry(pgid).or_insert(sid) != sid || leader.is_some_and(|of| of != sid) {
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
            return Ok(Group::Of(leader));
        }
        if self.is_outside(sid) && (pgid == self.outside.pgid || pgid == self.outside.sid) {
            return Ok(Group::Outside);
        }
        let helper = self.add_helper(pgid, ix, sid, pgid)?;
        self.nodes[helper.at()].group = Group::Own;
        Ok(Group::Of(helper))
    }

    /// A task whose number is that of a group it has left makes the group, and goes once somebody is in it who
    /// stays: a helper, where all who are in it have left groups of their own and might wait for each other.
    fn let_leaders_leave(&mut self) -> Result<()> {
        let of: Vec<Option<TaskIx>> = self.nodes.iter().map(|n| joined(n.group)).collect();
        let mut leave: BTreeMap<TaskIx, u32> = of.iter().flatten().map(|leader| (*leader, 0)).collect();
        leave.retain(|leader, _| self.node(*leader).pgid != self.node(*leader).pid);
        let stays = (0..of.len()).filter(|i| !leave.contains_key(&TaskIx(*i as u32)));
        for leader in stays.filter_map(|i| of[i]).collect::<Vec<_>>() {
            leave.entry(leader).and_modify(|joiners| *joiners += 1);
        }
        let used: HashSet<VirtPid> = self.nodes.iter().flat_map(|n| [n.pid, n.sid, n.pgid]).collect();
        let mut free = self.free_numbers(used);
        for (leader, joiners) in leave {
            if joiners == 0 {
                let pid = free.next().ok_or_else(|| Error::host("there is no free pid for a helper"))?;
                let (pgid, sid) = (self.node(leader).pid, self.node(leader).sid);
                let helper = self.add_helper(pid, leader, sid, pgid)?;
                self.nodes[helper.at()].group = Group::Of(leader);
            }
            self.nodes[leader.at()].group = Group::Leave { joiners: joiners.max(1), to: of[leader.at()] };
        }
        Ok(())
    }
}

/// Whose group it joins.
fn joined(group: Group) -> Option<TaskIx> {
    match group {
        Group::Of(leader) => Some(leader),
        _ => None,
    }
}
