//! Trees that lived: what processes have made of one, by any history, can be made again or is refused.

use super::play::{OUTSIDE, build, members, play};

proptest::proptest! {
    /// The same with reapers anywhere that come and go, and forks of siblings: orphans go to the next reaper.
    #[test]
    fn trees_with_reapers_can_be_made_again(
        steps in proptest::collection::vec((0..8u8, 0..1000usize), 1..200)
    ) {
        #[derive(Clone, Copy)]
        struct Task { pid: i32, parent: i32, sid: i32, reaper: bool }
        let mut tasks = vec![Task { pid: 1000, parent: 0, sid: 1000, reaper: true }];
        let mut next = 1001;
        for (what, a) in steps {
            let i = a % tasks.len();
            let task = tasks[i];
            match what {
                0..=2 => {
                    let sibling = what == 2 && i > 0;
                    let parent = if sibling { task.parent } else { task.pid };
                    tasks.push(Task { pid: next, parent, sid: task.sid, reaper: false });
                    next += 1;
                }
                3 | 4 if i > 0 => tasks[i].sid = task.pid,
                5 if i > 0 => tasks[i].reaper = !task.reaper,
                6 | 7 if i > 0 => {
                    let by_pid = |pid: i32| tasks.iter().find(|t| t.pid == pid).copied().unwrap();
                    let mut to = by_pid(task.parent);
                    while !to.reaper {
                        to = by_pid(to.parent);
                    }
                    tasks.remove(i);
                    tasks.iter_mut().filter(|t| t.parent == task.pid).for_each(|t| t.parent = to.pid);
                }
                _ => {}
            }
        }
        let mut rows = vec![(1000, 0, 1000, 1000)];
        let mut at = 0;
        while at < rows.len() {
            let parent = rows[at].0;
            rows.extend(tasks.iter().filter(|t| t.parent == parent).map(|t| (t.pid, parent, t.sid, t.sid)));
            at += 1;
        }
        match build(&members(&rows), OUTSIDE) {
            Ok(tree) => play(&tree, OUTSIDE),
            Err(e) => proptest::prop_assert!(false, "{e} for {rows:?}"),
        }
    }

    /// Whatever a real tree did by fork, setsid, setpgid and exit of leaders can be made again.
    #[test]
    fn trees_that_lived_can_be_made_again(steps in proptest::collection::vec((0..5u8, 0..64usize, 0..64usize), 1..60)) {
        // The root is a reaper, as the root of a container is.
        let mut pids = vec![(1000, 0, 1000, 1000)];
        let mut next = 1001;
        for (what, a, b) in steps {
            let i = a % pids.len();
            let (pid, _, pgid, sid) = pids[i];
            match what {
                0 | 1 => {
                    pids.push((next, pid, pgid, sid));
                    next += 1;
                }
                2 if i > 0 && pids.iter().all(|p| p.2 != pid) => {
                    pids[i].2 = pid;
                    pids[i].3 = pid;
                }
                3 if sid != pid => {
                    let target = pids[b % pids.len()];
                    let own = b % 2 == 0;
                    if own {
                        pids[i].2 = pid;
                    } else if target.3 == sid {
                        pids[i].2 = target.2;
                    }
                }
                4 if i > 0 => {
                    pids.remove(i);
                    for p in pids.iter_mut().filter(|p| p.1 == pid) {
                        p.1 = 1000;
                    }
                }
                _ => {}
            }
        }
        // Parents first, as images have them.
        let mut rows = vec![pids[0]];
        let mut at = 0;
        while at < rows.len() {
            let parent = rows[at].0;
            rows.extend(pids.iter().filter(|p| p.1 == parent).copied());
            at += 1;
        }
        match build(&members(&rows), OUTSIDE) {
            Ok(tree) => play(&tree, OUTSIDE),
            // What cannot be made is refused with both tasks named, never made wrong.
            Err(e) => proptest::prop_assert!(matches!(e.kind(), crate::Kind::Unsupported(_)), "{e} for {rows:?}"),
        }
    }
}
