//! A tree that no restore could make is refused while it still runs.

use std::collections::HashSet;

use super::{collect::Task, refuse};
use crate::{
    error::{Context, Error, Result},
    pstree::{RealPid, VirtPid},
    restore::{
        TaskIx, preflight,
        tree::{Member, Outside, Tree},
    },
};

/// Plans the restore of `tasks`. `shell_job` allows sessions and groups to lead outside.
///
/// # Errors
/// What that plan would be refused for, a session or group that somebody outside of the tree leads.
pub fn check(tasks: &[Task], shell_job: bool) -> Result<()> {
    let members: Vec<Member> = tasks.iter().map(member).collect();
    if !shell_job {
        let inside: HashSet<VirtPid> = members.iter().map(|m| m.pid).collect();
        tasks.iter().try_for_each(|task| led_inside(task, &inside))?;
    }
    let Some(root) = members.first() else { return Ok(()) };
    // As if the restore ran where the root was started, on a machine where all numbers are free.
    let (sid, pgid) = if root.sid == root.pid { (VirtPid(0), VirtPid(0)) } else { (root.sid, root.pgid) };
    let outside = Outside { sid, pgid, shell_job };
    Tree::build(&members, outside, &|_| true).map(drop).during(|| "the tree could not be restored".into())
}

fn member(task: &Task) -> Member {
    Member {
        pid: task.virt,
        parent: task.parent.map(|at| TaskIx(at as u32)),
        pgid: task.pgid,
        sid: task.sid,
        other_tids: task.threads.iter().skip(1).map(|(virt, _)| *virt).collect(),
        alive: task.state.is_alive(),
        files: task.ids.files_id,
        fs: task.ids.fs_id,
        vm: task.ids.vm_id,
    }
}

/// While the leader lives nobody else can have its number. It is looked for by the number that we know it by.
fn led_inside(task: &Task, inside: &HashSet<VirtPid>) -> Result<()> {
    let led = [("session", task.sid, task.stat.sid), ("process group", task.pgid, task.stat.pgid)];
    for (what, number, leader) in led {
        let leader = RealPid(leader);
        if inside.contains(&number) || number.0 == 0 || preflight::death(leader)?.is_some() {
            continue;
        }
        return Err(Error::unsupported(format!(
            "{} is in the {what} of {}, which is not part of the tree",
            refuse::name(task.pid),
            refuse::name(leader)
        ))
        .remedy("dump a tree that both are in, or give --shell-job and restore where that number is free"));
    }
    Ok(())
}
