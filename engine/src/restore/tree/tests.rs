//! Trees one by one, each of them for one rule of the plan.

mod act;
mod every;
mod history;
mod kernel;
mod lived;
mod play;

use super::*;
use act::OUTSIDE;
use play::{build, members, play, plays};

fn helpers(tree: &Tree) -> Vec<i32> {
    tree.nodes.iter().filter(|n| n.role == Role::Helper).map(|n| n.pid.0).collect()
}

#[test]
fn one_session_needs_no_tricks() {
    let tree = plays(&[(100, 0, 100, 100), (101, 100, 100, 100), (102, 100, 102, 100), (103, 102, 102, 100)]);
    assert!(helpers(&tree).is_empty());
    assert!(tree.nodes.iter().flat_map(|n| &n.makes).all(|m| !m.sibling && !m.before_setsid));
}

#[test]
fn a_child_of_the_old_session_is_forked_before_setsid() {
    // 101 forked 102, then called setsid.
    let tree = plays(&[(100, 0, 100, 100), (101, 100, 101, 101), (102, 101, 100, 100), (103, 101, 101, 101)]);
    assert!(helpers(&tree).is_empty());
    let order: Vec<_> = tree.nodes[1].makes.iter().map(|m| (m.task.0, m.before_setsid)).collect();
    assert_eq!(order, [(2, true), (3, false)]);
}

#[test]
fn the_old_session_is_handed_down_through_several_leaders() {
    plays(&[(100, 0, 100, 100), (101, 100, 101, 101), (102, 101, 102, 102), (103, 102, 100, 100)]);
}

#[test]
fn orphans_of_a_dead_leader_get_a_helper_that_leads() {
    // 150 led a session, forked 151 and 152 and died.
    let tree = plays(&[(100, 0, 100, 100), (151, 100, 150, 150), (152, 100, 150, 150)]);
    assert_eq!(helpers(&tree), [150]);
}

#[test]
fn orphans_of_a_living_leader_are_forked_by_it() {
    let tree = plays(&[(100, 0, 100, 100), (101, 100, 101, 101), (102, 100, 101, 101)]);
    assert!(helpers(&tree).is_empty());
    assert_eq!(tree.nodes[1].makes.len(), 1);
    assert!(tree.nodes[1].makes[0].sibling);
}

#[test]
fn orphans_of_a_leader_deeper_below_come_through_a_helper() {
    // 102 leads a session below 101; a child of it forked 103 and died, so 103 came to 100.
    let tree = plays(&[(100, 0, 100, 100), (101, 100, 100, 100), (102, 101, 102, 102), (103, 100, 102, 102)]);
    assert_eq!(helpers(&tree), [301]);
    assert!(tree.nodes[0].reaper);
}

#[test]
fn daemons_of_a_dead_session_below_one_parent() {
    // A double fork: session 150's leader is gone, its child 151 made a session of its own first.
    plays(&[(100, 0, 100, 100), (151, 100, 151, 151), (152, 151, 150, 150), (153, 100, 150, 150)]);
}

#[test]
fn sessions_with_members_below_several_parents_are_made_in_rounds() {
    // Nobody leads 69 and 74, and each has members below 68 and 72, which lead sessions of their own.
    let tree = plays(&[
        (66, 0, 66, 66),
        (67, 66, 67, 67),
        (68, 67, 68, 68),
        (70, 68, 69, 69),
        (77, 68, 74, 74),
        (72, 67, 72, 72),
        (73, 72, 69, 69),
        (75, 72, 74, 74),
    ]);
    assert!(!tree.rounds.is_empty());
    // The leader of 103 has moved up to the root, a member of its session has stayed.
    plays(&[(100, 0, 100, 100), (101, 100, 100, 100), (102, 101, 103, 103), (103, 100, 103, 103)]);
}

#[test]
fn a_leader_between_two_sessions_is_born_in_the_one_that_began_before() {
    // 103 was born in session 104 though it is a child of 102, and 104 in session 100 though it has a child there.
    let tree = plays(&[
        (100, 0, 100, 100),
        (102, 100, 100, 100),
        (103, 102, 103, 103),
        (105, 103, 104, 104),
        (104, 100, 104, 104),
        (106, 104, 100, 100),
    ]);
    assert_eq!(tree.rounds.iter().map(|r| tree.node(r.reaper).pid.0).collect::<Vec<_>>(), [102, 100]);
}

#[test]
fn where_one_order_of_sessions_leads_nowhere_another_is_tried() {
    // 101 cannot be the first to begin: 102 and 103 would be born in its session, each below the other.
    plays(&[
        (100, 0, 100, 100),
        (101, 100, 101, 101),
        (102, 100, 102, 102),
        (103, 100, 103, 103),
        (104, 100, 104, 104),
        (110, 102, 101, 101),
        (111, 103, 101, 101),
        (112, 102, 103, 103),
        (113, 103, 102, 102),
        (114, 101, 102, 102),
        (115, 104, 103, 103),
        (116, 103, 104, 104),
        (117, 102, 104, 104),
    ]);
}

#[test]
fn what_no_history_leads_to_is_refused_by_name() {
    for (rows, child) in [
        // A member of a session above its leader.
        (&[(100, 0, 100, 100), (101, 100, 102, 102), (102, 101, 102, 102)][..], "task 102 "),
        // Sessions 102 and 103 would each have to have begun below a member of the other.
        (
            &[
                (100, 0, 100, 100),
                (101, 100, 102, 102),
                (105, 101, 103, 103),
                (104, 100, 103, 103),
                (106, 104, 102, 102),
            ],
            "a child of task 10",
        ),
        // As above, but without the fourth session: whichever began first, two would be below each other.
        (
            &[
                (100, 0, 100, 100),
                (101, 100, 101, 101),
                (102, 100, 102, 102),
                (103, 100, 103, 103),
                (110, 102, 101, 101),
                (111, 103, 101, 101),
                (112, 102, 103, 103),
                (113, 103, 102, 102),
                (114, 101, 102, 102),
                (115, 101, 103, 103),
            ],
            "a child of task 10",
        ),
    ] {
        let e = build(&members(rows), OUTSIDE).unwrap_err();
        assert!(matches!(e.kind(), crate::Kind::Unsupported(_)) && e.to_string().contains(child), "{e}");
    }
}

#[test]
fn groups_without_a_leader_get_a_helper() {
    let tree = plays(&[(100, 0, 100, 100), (101, 100, 170, 100), (102, 100, 170, 100)]);
    assert_eq!(helpers(&tree), [170]);
    assert_eq!(tree.nodes[1].helpers.len(), 1);
}

#[test]
fn a_leader_may_have_left_its_group() {
    let tree = plays(&[(100, 0, 100, 100), (101, 100, 102, 100), (102, 100, 102, 100), (103, 101, 101, 100)]);
    assert_eq!(tree.nodes[1].group, Group::Leave { joiners: 1, to: Some(TaskIx(2)) });
}

#[test]
fn leaders_in_each_others_groups_hold_them_by_helpers() {
    let tree = plays(&[(100, 0, 100, 100), (101, 100, 102, 100), (102, 100, 101, 100)]);
    assert_eq!(helpers(&tree), [301, 302]);
}

#[test]
fn a_session_outside_needs_shell_job() {
    let rows = [(100, 0, 100, 40), (101, 100, 101, 40), (102, 100, 45, 40)];
    let e = build(&members(&rows), OUTSIDE).unwrap_err().to_string();
    assert!(e.contains("--shell-job"), "{e}");
    let outside = Outside { shell_job: true, ..OUTSIDE };
    let tree = build(&members(&rows), outside).unwrap();
    play(&tree);
    assert_eq!(tree.nodes[1].sid, VirtPid(50));
    assert_eq!(helpers(&tree), [45]);
}

#[test]
fn the_roots_group_outside_becomes_ours() {
    let outside = Outside { shell_job: true, ..OUTSIDE };
    let tree = build(&members(&[(100, 0, 45, 40), (101, 100, 45, 40), (102, 100, 40, 40)]), outside).unwrap();
    play(&tree);
    assert_eq!(tree.nodes[0].pgid, VirtPid(60));
    assert_eq!((tree.nodes[1].group, tree.nodes[2].pgid), (Group::Outside, VirtPid(50)));
    assert!(helpers(&tree).is_empty());
    // Ours is the number of somebody in the dump.
    let clash = build(&members(&[(100, 0, 100, 40), (50, 100, 50, 40)]), outside).unwrap_err().to_string();
    assert!(clash.contains("another shell"), "{clash}");
}

#[test]
fn a_helpers_number_may_not_be_a_threads() {
    let mut rows = members(&[(100, 0, 100, 100), (101, 100, 170, 100)]);
    rows[0].other_tids.push(VirtPid(170));
    let e = build(&rows, OUTSIDE).unwrap_err().to_string();
    assert!(e.contains("170") && e.contains("thread"), "{e}");
}

#[test]
fn contradictions_are_errors() {
    for rows in [
        // A leader of a session in another's group; a group in two sessions.
        &[(100, 0, 100, 100), (101, 100, 100, 101)][..],
        &[(100, 0, 100, 100), (101, 100, 101, 101), (102, 101, 100, 101)],
    ] {
        let e = build(&members(rows), OUTSIDE).unwrap_err();
        assert!(e.to_string().contains("pstree.img"), "{e}");
    }
}

#[test]
fn shared_tables_go_from_parent_to_child_or_between_siblings() {
    let mut rows = members(&[(100, 0, 100, 100), (101, 100, 100, 100), (102, 100, 100, 100)]);
    rows[1].files = rows[0].files;
    rows[1].fs = rows[0].fs;
    let tree = build(&rows, OUTSIDE).unwrap();
    play(&tree);
    let make = tree.nodes[0].makes[0];
    assert!(make.share_files && make.share_fs && !make.sibling);
    // Two children share what their parent has not: the elder forks the younger.
    rows[1].files = 77;
    rows[2].files = 77;
    let tree = build(&rows, OUTSIDE).unwrap();
    play(&tree);
    let make = tree.nodes[1].makes[0];
    assert!(make.task == TaskIx(2) && make.sibling && make.share_files && !make.share_fs);
    // Cousins cannot.
    let mut rows =
        members(&[(100, 0, 100, 100), (101, 100, 100, 100), (102, 101, 100, 100), (103, 100, 100, 100)]);
    rows[2].files = 77;
    rows[3].files = 77;
    let e = build(&rows, OUTSIDE).unwrap_err().to_string();
    assert!(e.contains("CLONE_FILES") && e.contains("102") && e.contains("103"), "{e}");
    // Nobody can be given another's memory.
    rows[3].files = 4;
    rows[2].vm = rows[1].vm;
    assert!(build(&rows, OUTSIDE).unwrap_err().to_string().contains("CLONE_VM"));
}

#[test]
fn a_zombie_can_lead_and_share_nothing() {
    let mut rows = members(&[(100, 0, 100, 100), (101, 100, 101, 101), (102, 100, 101, 101)]);
    rows[1].alive = false;
    rows[1].files = rows[0].files;
    let tree = build(&rows, OUTSIDE).unwrap();
    play(&tree);
    assert_eq!(tree.nodes[1].role, Role::Zombie);
    assert!(tree.nodes[0].makes.iter().all(|m| !m.share_files));
}

#[test]
fn deep_and_wide_trees_are_planned() {
    let deep: Vec<_> = (0..2000).map(|i| (1000 + i, if i == 0 { 0 } else { 999 + i }, 1000, 1000)).collect();
    plays(&deep);
    let wide: Vec<_> = (0..2000).map(|i| (1000 + i, if i == 0 { 0 } else { 1000 }, 1000, 1000)).collect();
    plays(&wide);
    // A chain of daemons, each born in the first session.
    let chain: Vec<_> = (0..500)
        .map(|i| {
            let sid = if i == 499 { 1000 } else { 1000 + i };
            (1000 + i, if i == 0 { 0 } else { 999 + i }, sid, sid)
        })
        .collect();
    plays(&chain);
}
