//! What a restore will do, decided before the first fork; tasks inherit it by fork and never change it.

use std::collections::{BTreeMap, HashSet};

use crate::error::{Error, Result, SysContext};
use crate::files::{FilesPlan, PlanFiles, Table};
use crate::kernel::Kernel;
use crate::options::RestoreOptions;
use crate::pstree::VirtPid;
use crate::restore::preflight;
use crate::restore::read::{Snapshot, TaskImage, TaskIx};
use crate::restore::tree::{Member, Node, Outside, Role, Tree};

/// The whole restore, immutable.
#[derive(Debug)]
pub struct Plan {
    /// Who forks whom.
    pub tree: Tree,
    /// Who opens what, in which order.
    pub files: FilesPlan,
}

impl Plan {
    /// Decides everything.
    ///
    /// # Errors
    /// State that cannot be restored, images that contradict each other.
    pub fn build(snapshot: &Snapshot, opts: &RestoreOptions, kernel: &Kernel) -> Result<Plan> {
        let tree = Tree::build(&Member::of(snapshot), outside(opts)?, &preflight::is_free)?;
        let cx = PlanFiles::new(&snapshot.dir, opts, kernel, &snapshot.files)?;
        let plan = Plan { tree, files: FilesPlan::build(cx, &tables(snapshot))? };
        plan.log();
        Ok(plan)
    }

    /// A process of the plan.
    pub fn node(&self, ix: TaskIx) -> &Node {
        self.tree.node(ix)
    }

    /// How messages call it: `task 12 (worker)`, `helper 13`.
    pub fn name(&self, snapshot: &Snapshot, ix: TaskIx) -> String {
        match snapshot.get(ix) {
            Some(image) => image.name(),
            None => format!("helper {}", self.node(ix).pid),
        }
    }

    /// Numbers of dead processes below whose /proc folders files are open: somebody must bear them for as long
    /// as those are being opened.
    pub fn dead(&self) -> Vec<VirtPid> {
        let known: std::collections::HashSet<VirtPid> = self.tree.nodes.iter().map(|n| n.pid).collect();
        self.files.dead_pids().iter().copied().filter(|p| !known.contains(p)).collect()
    }

    fn log(&self) {
        let passing: HashSet<TaskIx> = self.tree.rounds.iter().map(|r| r.helper).collect();
        for (i, node) in self.tree.nodes.iter().enumerate().filter(|(_, n)| n.role == Role::Helper) {
            let (what, number) = match node.leads_session() || passing.contains(&TaskIx(i as u32)) {
                true => ("SID", node.sid),
                false => ("PGID", node.pgid),
            };
            log::info!("Add a helper {} for restoring {what} {number}", node.pid);
        }
        if log::log_enabled!(log::Level::Debug) {
            for node in &self.tree.nodes {
                log::debug!("Plan: {node:?}");
            }
            self.files.text().lines().for_each(|line| log::debug!("Plan: {line}"));
        }
    }
}

/// One table for each `files_id`; its task is the one with the lowest number of those that share it, from
/// which all others were forked.
fn tables(snapshot: &Snapshot) -> Vec<Table<'_>> {
    let mut at: BTreeMap<u32, usize> = BTreeMap::new();
    let mut tables: Vec<Table<'_>> = Vec::new();
    for (_, task) in snapshot.alive() {
        let private = task.ids.files_id == 0;
        match at.get(&task.ids.files_id).filter(|_| !private) {
            Some(&i) => tables[i].sharers.push(task.pid),
            None => {
                at.insert(task.ids.files_id, tables.len());
                tables.push(Table { task: task.pid, sharers: Vec::new(), fds: snapshot.fds(task) });
            }
        }
    }
    tables
}

/// Our own session and group.
fn outside(opts: &RestoreOptions) -> Result<Outside> {
    let sid = nix::unistd::getsid(None).call("getsid")?;
    Ok(Outside {
        sid: VirtPid(sid.as_raw()),
        pgid: VirtPid(nix::unistd::getpgrp().as_raw()),
        shell_job: opts.common.shell_job,
    })
}

/// The image of a node; helpers have none.
pub fn image(snapshot: &Snapshot, ix: TaskIx) -> Result<&TaskImage> {
    snapshot.get(ix).ok_or_else(|| Error::bug(format!("node {} is a helper and has no image", ix.0)))
}
