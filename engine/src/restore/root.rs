//! The birth of the root task: the first process of the tree, in the namespaces that are made with it.

use std::time::{Duration, Instant};

use nix::sched::CloneFlags;

use super::{
    RealPid, Snapshot, TaskCx, TaskIx, entered::ForksInside, fork, guard::Placeholders, task, tree::Make,
};
use crate::{
    error::{Error, Kind, Result},
    faults, interrupt,
    mm::restore::Prepared,
    sys::clone3::Side,
    task::cgroup,
};

/// How long the number of the root may still be held by a process that has ended and is not yet reaped.
const UNREAPED: Duration = Duration::from_secs(5);

/// Number of the set of control groups the dumping process was in; CRIU up to 2.x did not tell it.
pub(super) fn groups(snapshot: &Snapshot) -> u32 {
    snapshot.inventory.root_cg_set.unwrap_or(cgroup::OWN)
}

/// Forks the root, and who bears the numbers of dead processes for as long as files below their /proc folders are being
/// opened: before it, or in a pid namespace that is made with it, of which it must be the first.
///
/// Precondition: this process has one thread.
pub(super) fn fork(cx: &TaskCx<'_>, memory: Prepared) -> Result<(RealPid, Placeholders)> {
    let dead = cx.plan.dead();
    let made = cx.plan.home.kinds().has(CloneFlags::CLONE_NEWPID);
    if made && !dead.is_empty() && !cx.kernel.clone3_set_tid {
        return Err(Error::unsupported(format!("a file below /proc of task {}, which is gone", dead[0]))
            .remedy("in a pid namespace of its own that needs clone3 with set_tid, of Linux 5.5"));
    }
    let inside = cx.home.map(|home| home.entered().fork_inside()).transpose()?;
    let before = if made { &[][..] } else { &dead[..] };
    let placeholders = Placeholders::fork(before, cx.area, cx.kernel)?;
    let root = root(cx, memory)?;
    inside.map_or(Ok(()), ForksInside::leave)?;
    if !made || dead.is_empty() {
        return Ok((root, placeholders));
    }
    let inside = ForksInside::of(root)?;
    let placeholders = Placeholders::fork(&dead, cx.area, cx.kernel)?;
    inside.leave()?;
    Ok((root, placeholders))
}

fn root(cx: &TaskCx<'_>, memory: Prepared) -> Result<RealPid> {
    faults::point("restore-fork-root")?;
    let make = Make {
        task: TaskIx::ROOT,
        before_setsid: false,
        sibling: cx.opts.sibling,
        share_files: false,
        share_fs: false,
    };
    let new = cx.plan.home.clone_flags();
    // Its number here is told to us, whichever it has there.
    // In a pid namespace that stayed outside, the dumped task may wait there to be reaped.
    let patience = Instant::now() + UNREAPED;
    let entered = cx.plan.home.entered().has(CloneFlags::CLONE_NEWPID);
    let side = loop {
        match fork::fork_node(&make, cx.node(), cx.area, cx.kernel, (new, false)) {
            Err(e) if entered && matches!(e.kind(), Kind::Host(_)) && Instant::now() < patience => {
                interrupt::check()?;
                std::thread::sleep(Duration::from_millis(2));
            }
            other => break other?,
        }
    };
    match side {
        Side::Parent(pid) => Ok(pid),
        Side::Child => {
            if let Err(e) = fork::neutral_signals() {
                cx.area.fail(cx.node().pid, &e);
                fork::leave(1)
            }
            task::run(*cx, memory, groups(cx.snapshot))
        }
    }
}
