//! Every tree that a few forks can lead to, by any history: none of them may be refused.

use std::collections::HashSet;

use super::act::{OUTSIDE, act};
use super::history::Random;
use super::play::members;
use crate::restore::tree::Tree;

/// Forks in a history.
const FORKS: usize = 5;

/// Parent and session of each that lives, by number; numbers are given in the order of births.
type State = [Option<(u8, u8)>; FORKS + 1];

/// All states one call away. Reapers are not told: who ends may have any of those above it as the one that gets
/// its children, as flags can be set right before and taken back right after.
fn next(state: &State, born: usize) -> Vec<(State, usize)> {
    let mut found = Vec::new();
    let living = || (0..=born).filter_map(|i| state[i].map(|(parent, sid)| (i, parent, sid)));
    for (i, parent, sid) in living() {
        if born < FORKS {
            for parent in [Some(i as u8), (i > 0).then_some(parent)].into_iter().flatten() {
                let mut forked = *state;
                forked[born + 1] = Some((parent, sid));
                found.push((forked, born + 1));
            }
        }
        if i == 0 {
            continue;
        }
        if usize::from(sid) != i {
            let mut led = *state;
            led[i] = Some((parent, i as u8));
            found.push((led, born));
        }
        let mut above = Some(parent);
        while let Some(to) = above {
            let mut ended = *state;
            ended[i] = None;
            ended.iter_mut().flatten().filter(|(p, _)| usize::from(*p) == i).for_each(|(p, _)| *p = to);
            found.push((ended, born));
            above = (to > 0).then(|| state[usize::from(to)].map(|(p, _)| p)).flatten();
        }
    }
    found
}

#[test]
fn no_tree_of_a_few_forks_is_refused() {
    let mut first = [None; FORKS + 1];
    first[0] = Some((0, 0));
    let mut seen = HashSet::from([(first, 0)]);
    let mut open = vec![(first, 0)];
    let mut random = Random(1);
    while let Some((state, born)) = open.pop() {
        open.extend(next(&state, born).into_iter().filter(|s| seen.insert(*s)));
        let number = |i: u8| 1000 + i32::from(i);
        let mut rows = vec![(1000, 0, 1000, 1000)];
        let mut at = 0;
        while at < rows.len() {
            let parent = rows[at].0;
            let living = state.iter().enumerate().skip(1).filter_map(|(i, s)| Some((i as u8, (*s)?)));
            let children = living.filter(|(_, (p, _))| number(*p) == parent);
            rows.extend(children.map(|(i, (_, sid))| (number(i), parent, number(sid), number(sid))));
            at += 1;
        }
        let tree =
            Tree::build(&members(&rows), OUTSIDE, &|_| true).unwrap_or_else(|e| panic!("{e} of {rows:?}"));
        let got = act(&tree, false, &[], &mut random).unwrap_or_else(|e| panic!("{e} of {rows:?}"));
        let got: Vec<_> = got.iter().map(|(pid, p)| (*pid, p.parent, p.pgid, p.sid)).collect();
        rows[0].1 = super::act::ENGINE;
        rows.sort_unstable();
        assert_eq!(got, rows);
    }
    println!("{} trees", seen.len());
}
