//! What a restore will do, decided before the first fork; tasks inherit it by fork and never change it.

use std::collections::{BTreeMap, HashSet};

use nix::sched::CloneFlags;

use crate::error::{Error, Result, SysContext};
use crate::files::{FilesPlan, PlanFiles, Table};
use crate::kernel::Kernel;
use crate::mm::status;
use crate::ns;
use crate::options::RestoreOptions;
use crate::pstree::VirtPid;
use crate::restore::entered::Entered;
use crate::restore::home::Home;
use crate::restore::preflight;
use crate::restore::read::{Snapshot, TaskImage, TaskIx};
use crate::restore::tree::{Member, Node, Outside, Role, Tree};
use crate::task::lsm::{Labels, policy::Policies, sockets};

/// The whole restore, immutable.
#[derive(Debug)]
pub struct Plan {
    /// Who forks whom.
    pub tree: Tree,
    /// Who opens what, in which order.
    pub files: FilesPlan,
    /// Namespaces of its own.
    pub home: Home,
    /// By what security modules confine it.
    pub labels: Labels,
    /// Policy that it had loaded for itself.
    pub policies: Policies,
}

impl Plan {
    /// Decides everything.
    ///
    /// # Errors
    /// State that cannot be restored, images that contradict each other.
    pub fn build(snapshot: &Snapshot, opts: &RestoreOptions, kernel: &Kernel) -> Result<Plan> {
        let root = snapshot.root();
        let entered = Entered::read(&snapshot.dir, root.pid.0, &root.ids, opts)?;
        let spaces = |kind| spaces(snapshot, kind);
        let home = Home::read(&snapshot.dir, (&root.ids, &spaces), (snapshot.namespaces, entered), opts)?;
        segments_stay(snapshot, &home)?;
        let apart = home.is_away(CloneFlags::CLONE_NEWPID);
        // Nobody else is in a pid namespace that is made for the tree.
        let is_free = |pid| apart || preflight::is_free(pid);
        let tree = Tree::build(&Member::of(snapshot), outside(opts, apart)?, &is_free)?;
        let mut cx = PlanFiles::new(&snapshot.dir, opts, kernel, &snapshot.files)?;
        cx.networks = home.networks();
        cx.devices = !opts.common.empty_net_ns;
        if home.is_away(CloneFlags::CLONE_NEWNS)
            && let Some(make) = tree.nodes.iter().flat_map(|node| &node.makes).find(|make| make.share_fs)
        {
            return Err(Error::unsupported(format!(
                "task {} shares its working folder (CLONE_FS) with another in a mount namespace of their own, which \
                 the kernel lets neither enter",
                tree.node(make.task).pid
            ))
            .remedy("dump the tree when they no longer share it"));
        }
        let given = opts.common.lsm_profile.as_ref();
        let labels = Labels::new(&snapshot.inventory, given);
        let policies = Policies::read(&snapshot.dir, given, Labels::dumped(snapshot))?;
        let mut files = FilesPlan::build(cx, &tables(snapshot))?;
        files.label(sockets::wanted(&labels, snapshot));
        let plan = Plan { tree, files, home, labels, policies };
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

/// Numbers of all namespaces of this kind that tasks are in, that of the root task first; none if images do not tell.
fn spaces(snapshot: &Snapshot, kind: CloneFlags) -> Vec<u32> {
    let mut known = HashSet::new();
    let ids = snapshot.alive().filter_map(|(_, task)| ns::id(&task.ids, kind));
    ids.filter(|id| known.insert(*id)).collect()
}

/// Refuses to join an ipc namespace with System V shared memory attached that was in one that is not made again.
fn segments_stay(snapshot: &Snapshot, home: &Home) -> Result<()> {
    let ipc = CloneFlags::CLONE_NEWIPC;
    if !snapshot.namespaces.has(ipc) || home.kinds().has(ipc) {
        return Ok(());
    }
    let attached = |task: &TaskImage| {
        task.mm.iter().flat_map(|mm| &mm.vmas).any(|vma| vma.status & status::SYSVIPC != 0)
    };
    match snapshot.alive().find(|(_, task)| attached(task)) {
        None => Ok(()),
        Some((_, task)) => Err(Error::unsupported(
            "it has System V shared memory attached that is in the ipc namespace of the dump",
        )
        .remedy("restore without --join-ns ipc")
        .during(task.name())),
    }
}

/// Our own session and group, which have no number in a pid namespace that is `apart`.
fn outside(opts: &RestoreOptions, apart: bool) -> Result<Outside> {
    if apart {
        return Ok(Outside { sid: VirtPid(0), pgid: VirtPid(0), shell_job: opts.common.shell_job });
    }
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
