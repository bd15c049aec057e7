//! The kernel's rules, to hold plans against: what a tree comes out as when it is made as the plan says.

use std::collections::{HashMap, HashSet};

use crate::{
    error::Result,
    pstree::VirtPid,
    restore::{
        read::TaskIx,
        tree::{Group, Member, Outside, Role, Tree},
    },
};

pub(super) const OUTSIDE: Outside = Outside { sid: VirtPid(50), pgid: VirtPid(60), shell_job: false };

/// `(pid, parent's pid or 0, pgid, sid)`.
pub(super) fn members(rows: &[(i32, i32, i32, i32)]) -> Vec<Member> {
    let at = |pid: i32| rows.iter().position(|r| r.0 == pid).map(|i| TaskIx(i as u32));
    rows.iter()
        .enumerate()
        .map(|(i, &(pid, ppid, pgid, sid))| Member {
            pid: VirtPid(pid),
            parent: at(ppid),
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

/// Plays the plan with the kernel's rules and compares every session, group and parent with what was wanted.
pub(super) fn play(tree: &Tree, outside: Outside) {
    struct Made {
        sid: i32,
        pgid: i32,
        parent: Option<TaskIx>,
    }
    fn live(tree: &Tree, ix: TaskIx, made: &mut HashMap<TaskIx, Made>) {
        let node = tree.node(ix);
        for early in [true, false] {
            for make in node.makes.iter().filter(|m| m.before_setsid == early) {
                let me = &made[&ix];
                let parent = if make.sibling { me.parent } else { Some(ix) };
                let child = Made { sid: me.sid, pgid: me.pgid, parent };
                assert!(made.insert(make.task, child).is_none(), "made twice");
                live(tree, make.task, made);
            }
            if early && node.leads_session() {
                made.get_mut(&ix).unwrap().sid = node.pid.0;
                made.get_mut(&ix).unwrap().pgid = node.pid.0;
            }
        }
    }
    let mut made = HashMap::new();
    made.insert(TaskIx::ROOT, Made { sid: outside.sid.0, pgid: outside.pgid.0, parent: None });
    live(tree, TaskIx::ROOT, &mut made);
    assert_eq!(made.len(), tree.nodes.len(), "not everybody is made");
    let mut moved: HashMap<TaskIx, Option<TaskIx>> = made.iter().map(|(ix, m)| (*ix, m.parent)).collect();
    let passing: HashSet<TaskIx> = tree.rounds.iter().map(|r| r.helper).collect();
    for round in &tree.rounds {
        assert_eq!(moved[&round.helper], Some(round.parent), "who reaps the helper");
        let mut above = Some(round.parent);
        while above.is_some_and(|a| a != round.reaper) {
            above = moved[&above.unwrap()];
        }
        assert!(above.is_some(), "{} is not above {}", round.reaper.0, round.helper.0);
        moved.values_mut().filter(|p| **p == Some(round.helper)).for_each(|p| *p = Some(round.reaper));
    }
    for (i, node) in tree.nodes.iter().enumerate() {
        let ix = TaskIx(i as u32);
        let got = &made[&ix];
        assert_eq!(got.sid, node.sid.0, "session of {}", node.pid);
        match node.group {
            Group::Born if passing.contains(&ix) => {}
            Group::Born => assert_eq!(got.pgid, node.pgid.0, "group of {}", node.pid),
            Group::Own => assert_eq!(node.pgid, node.pid),
            Group::Of(leader) | Group::Leave { to: leader, .. } => {
                assert_eq!(tree.node(leader).pid, node.pgid);
                assert_eq!(tree.node(leader).sid, node.sid, "a group of another session cannot be joined");
            }
            Group::Outside => {
                assert_eq!(node.sid, outside.sid);
                assert!([outside.pgid, outside.sid].contains(&node.pgid));
            }
        }
        // Orphans of helpers come to the next reaper above.
        let mut parent = if tree.rounds.is_empty() { got.parent } else { moved[&ix] };
        while tree.rounds.is_empty()
            && let Some(p) =
                parent.filter(|p| tree.node(*p).role == Role::Helper && node.role != Role::Helper)
        {
            let mut above = tree.node(p).parent;
            while above.is_some_and(|a| !tree.node(a).reaper) {
                above = tree.node(above.unwrap()).parent;
            }
            parent = above;
        }
        assert_eq!(parent, node.parent, "parent of {}", node.pid);
        let helpers: Vec<TaskIx> = tree
            .nodes
            .iter()
            .enumerate()
            .filter(|(_, n)| n.role == Role::Helper && n.parent == Some(ix))
            .map(|(i, _)| TaskIx(i as u32))
            .filter(|helper| !passing.contains(helper))
            .collect();
        assert_eq!(node.helpers, helpers, "helpers of {}", node.pid);
    }
}

pub(super) fn plays(rows: &[(i32, i32, i32, i32)]) -> Tree {
    let tree = build(&members(rows), OUTSIDE).unwrap();
    play(&tree, OUTSIDE);
    tree
}
