//! Trees written down as rows, built and played.

use std::collections::BTreeMap;

use super::act::{ENGINE, OUTSIDE, act};
use super::history::Random;
use crate::{
    error::Result,
    pstree::VirtPid,
    restore::{
        read::TaskIx,
        tree::{Member, Outside, Role, Tree},
    },
};

/// `(pid, parent's pid or 0, pgid, sid)`.
pub(super) fn members(rows: &[(i32, i32, i32, i32)]) -> Vec<Member> {
    let at: BTreeMap<i32, TaskIx> = rows.iter().enumerate().map(|(i, r)| (r.0, TaskIx(i as u32))).collect();
    rows.iter()
        .enumerate()
        .map(|(i, &(pid, ppid, pgid, sid))| Member {
            pid: VirtPid(pid),
            parent: at.get(&ppid).copied(),
            pgid: VirtPid(pgid),
            sid: VirtPid(sid),
            other_tids: Vec::new(),
            alive: true,
            files: i as u32 + 1,
            fs: i as u32 + 1,
            vm: i as u32 + 1,
        })
        .collect()
}

pub(super) fn build(members: &[Member], outside: Outside) -> Result<Tree> {
    Tree::build(members, outside, &|_| true)
}

/// Plays the plan with the kernel's rules and compares what every task has become with what the plan says.
pub(super) fn play(tree: &Tree) {
    let got = act(tree, false, &[], &mut Random(7)).unwrap();
    let got: Vec<_> = got.iter().map(|(pid, p)| (*pid, p.parent, p.pgid, p.sid, p.alive)).collect();
    let tasks = tree.nodes.iter().filter(|n| n.role != Role::Helper);
    let mut wanted: Vec<_> = tasks
        .map(|n| {
            let parent = n.parent.map_or(ENGINE, |p| tree.node(p).pid.0);
            (n.pid.0, parent, n.pgid.0, n.sid.0, n.role == Role::Alive)
        })
        .collect();
    wanted.sort_unstable();
    assert_eq!(got, wanted);
}

pub(super) fn plays(rows: &[(i32, i32, i32, i32)]) -> Tree {
    let tree = build(&members(rows), OUTSIDE).unwrap();
    play(&tree);
    tree
}
