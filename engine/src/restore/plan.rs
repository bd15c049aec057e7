//! What a restore will do, decided before the first fork; tasks inherit it by fork and never change it.

use crate::error::{Error, Result};
use crate::kernel::Kernel;
use crate::options::RestoreOptions;
use crate::pstree::VirtPid;
use crate::restore::preflight;
use crate::restore::read::{Snapshot, TaskImage, TaskIx};
use crate::restore::tree::{Member, Node, Outside, Tree};

/// What planning may look at: images and options, no lasting system call.
#[derive(Clone, Copy)]
pub struct PlanCx<'a> {
    /// What was asked for.
    pub opts: &'a RestoreOptions,
    /// What this kernel offers.
    pub kernel: &'a Kernel,
    /// What the images say.
    pub snapshot: &'a Snapshot,
    /// Who forks whom.
    pub tree: &'a Tree,
}

/// The whole restore, immutable.
#[derive(Debug)]
pub struct Plan {
    /// Who forks whom.
    pub tree: Tree,
}

impl Plan {
    /// Decides everything.
    ///
    /// # Errors
    /// State that cannot be restored, images that contradict each other.
    pub fn build(snapshot: &Snapshot, opts: &RestoreOptions) -> Result<Plan> {
        let tree = Tree::build(&Member::of(snapshot), outside(opts)?, &preflight::is_free)?;
        for (i, node) in tree.nodes.iter().enumerate() {
            log::debug!("Plan: {i}: {node:?}");
        }
        Ok(Plan { tree })
    }

    /// A process of the plan.
    pub fn node(&self, ix: TaskIx) -> &Node {
        self.tree.node(ix)
    }
}

/// Our own session and group.
fn outside(opts: &RestoreOptions) -> Result<Outside> {
    let sid = nix::unistd::getsid(None).map_err(|e| Error::sys("getsid", e as i32))?;
    Ok(Outside {
        sid: VirtPid(sid.as_raw()),
        pgid: VirtPid(nix::unistd::getpgrp().as_raw()),
        shell_job: opts.common.shell_job,
    })
}

/// The image of a node, with a name for messages; helpers have none.
pub fn image(snapshot: &Snapshot, ix: TaskIx) -> Result<&TaskImage> {
    snapshot.get(ix).ok_or_else(|| Error::bug(format!("node {} is a helper and has no image", ix.0)))
}
