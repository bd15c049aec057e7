//! The nice value of a session's autogroup (sched(7)): what its tasks together weigh against other sessions.
//!
//! Every setsid(2) makes an autogroup, so a restored session has one of its own; one that tasks share with a
//! session outside of the tree is not theirs to change.

use std::collections::HashSet;

use crate::{
    error::{Context, Result, SysContext},
    procfs::{ProcDir, number, trim},
    pstree::VirtPid,
    restore::stages::Area,
    restore::{Snapshot, plan::Plan},
};

/// The nice value, if it is not 0.
pub fn dump(dir: &ProcDir) -> Result<Option<i32>> {
    let bytes = match dir.read("autogroup") {
        Err(e) if e.errno() == Some(libc::ENOENT) => return Ok(None),
        other => other?,
    };
    // `/autogroup-25 nice 0`; empty for tasks that the administrator has put into another group.
    let Some(word) = trim(&bytes).rsplit(|c| *c == b' ').next().filter(|w| !w.is_empty()) else {
        return Ok(None);
    };
    let nice: i32 = number(word).ok_or_else(|| dir.strange("autogroup", &bytes))?;
    Ok((nice != 0).then_some(nice))
}

/// Sets the nice value of each session that was made, once.
pub fn restore(snapshot: &Snapshot, plan: &Plan, area: &Area) -> Result<()> {
    let mut done: HashSet<VirtPid> = HashSet::new();
    for (_, task) in snapshot.alive() {
        let Some(nice) = task.more.as_ref().and_then(|more| more.autogroup_nice) else { continue };
        let ours = plan.tree.nodes.iter().any(|node| node.pid == task.sid);
        if !done.insert(task.sid) || !ours {
            continue;
        }
        let path = format!("/proc/{}/autogroup", area.real(task.pid));
        match std::fs::write(&path, nice.to_string()) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                log::warn!(
                    "This kernel has no autogroups: nice value {nice} of session {} is lost",
                    task.sid
                );
            }
            other => other.call(format!("write({path})")).during(|| task.name())?,
        }
    }
    Ok(())
}
