//! Trees that lived: what processes have made of one, by any history, can be made again.

use std::collections::BTreeMap;

use super::act::{OUTSIDE, act};
use super::history::{Lived, Random, Weights, live};
use super::kernel::Process;
use crate::pstree::VirtPid;
use crate::restore::tree::{Outside, Tree};

/// As many as a debug build plays in a few seconds; `RCRIU_HISTORIES` asks for more.
const HISTORIES: u64 = 4000;

const KINDS: [Weights; 5] = [
    // As CRIU's suite does it.
    Weights { fork: 5, sibling: 5, setsid: 7, setpgid: 0, exit: 4, wait: 3, reaper: 10, late: 9 },
    Weights { fork: 8, sibling: 2, setsid: 6, setpgid: 3, exit: 6, wait: 5, reaper: 6, late: 5 },
    Weights { fork: 10, sibling: 0, setsid: 4, setpgid: 0, exit: 7, wait: 7, reaper: 9, late: 8 },
    Weights { fork: 6, sibling: 3, setsid: 2, setpgid: 10, exit: 5, wait: 5, reaper: 2, late: 2 },
    Weights { fork: 6, sibling: 6, setsid: 9, setpgid: 1, exit: 8, wait: 8, reaper: 9, late: 3 },
];

/// What must come of the restore: where the root is in a session from outside, that is replaced by ours.
fn wanted(
    lived: &Lived,
    members: &[crate::restore::tree::Member],
) -> BTreeMap<i32, (i32, i32, i32, bool, bool)> {
    let root = &members[0];
    let leads = root.sid == root.pid;
    let made_inside = |pgid| members.iter().any(|m| m.pid == pgid);
    let ours = |what: VirtPid, pgid: bool| match (leads, what) {
        (false, w) if pgid && w == root.pgid && !made_inside(w) => OUTSIDE.pgid.0,
        (false, w) if w == root.sid => OUTSIDE.sid.0,
        (_, w) => w.0,
    };
    let row = |m: &crate::restore::tree::Member| {
        let parent = m.parent.map_or(super::act::ENGINE, |p| members[p.at()].pid.0);
        (
            m.pid.0,
            (
                parent,
                ours(m.pgid, true),
                ours(m.sid, false),
                m.alive,
                m.alive && lived.kernel.at(m.pid.0).reaper,
            ),
        )
    };
    members.iter().map(row).collect()
}

fn row(p: &Process) -> (i32, i32, i32, bool, bool) {
    (p.parent, p.pgid, p.sid, p.alive, p.reaper && p.alive)
}

fn relive(seed: u64) -> Result<(), String> {
    let mut random = Random(seed);
    let weights = KINDS[random.below(KINDS.len())];
    let length = [12, 40, 150, 400][random.below(4)];
    let steps = 5 + random.below(length);
    let old = random.below(8) == 0;
    let lived = live(&mut random, weights, steps, old);
    let members = lived.members();
    let outside = Outside { shell_job: members[0].sid != members[0].pid, ..OUTSIDE };
    let tree = Tree::build(&members, outside, &|_| true).map_err(|e| format!("refused: {e}"))?;
    let reapers: Vec<VirtPid> =
        members.iter().filter(|m| m.alive && lived.kernel.at(m.pid.0).reaper).map(|m| m.pid).collect();
    let got = act(&tree, old, &reapers, &mut random)?;
    let got: BTreeMap<_, _> = got.iter().map(|(pid, p)| (*pid, row(p))).collect();
    let wanted = wanted(&lived, &members);
    match wanted.iter().find(|(pid, row)| got.get(*pid) != Some(*row)) {
        Some((pid, row)) => Err(format!("{pid} is {:?} instead of {row:?}", got.get(pid))),
        None if got.len() != wanted.len() => Err("somebody is left who was not there".to_owned()),
        None => Ok(()),
    }
}

#[test]
fn every_tree_that_lived_can_be_made_again() {
    let histories = std::env::var("RCRIU_HISTORIES").ok().and_then(|n| n.parse().ok()).unwrap_or(HISTORIES);
    let failed: Vec<(u64, String)> =
        (0..histories).filter_map(|seed| relive(seed).err().map(|e| (seed, e))).collect();
    let some: Vec<String> = failed.iter().take(40).map(|(seed, e)| format!("{seed}: {e}")).collect();
    assert!(failed.is_empty(), "{} of {histories}: {some:#?}", failed.len());
}
