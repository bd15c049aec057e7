//! What each of some sessions still misses.

use std::collections::{BTreeMap, BTreeSet};

use super::needs::{Need, Why};

/// Sessions that have not begun, and how many others each waits for.
#[derive(Debug)]
pub(super) struct Missing {
    /// By session.
    pub count: BTreeMap<usize, usize>,
    /// Those of which nothing is missing.
    pub free: BTreeSet<usize>,
    /// Who waits for whom.
    waiting: BTreeMap<usize, Vec<usize>>,
}

impl Missing {
    /// Of those in `todo`, for each other.
    pub fn of(needs: &[Vec<Need>], todo: &[usize]) -> Missing {
        let mut missing = Missing {
            count: todo.iter().map(|at| (*at, 0)).collect(),
            free: BTreeSet::new(),
            waiting: BTreeMap::new(),
        };
        for at in todo {
            let open: BTreeSet<usize> =
                needs[*at].iter().map(|n| n.of).filter(|of| missing.count.contains_key(of)).collect();
            missing.count.insert(*at, open.len());
            if open.is_empty() {
                missing.free.insert(*at);
            }
            open.into_iter().for_each(|of| missing.waiting.entry(of).or_default().push(*at));
        }
        missing
    }

    /// Nobody waits for `session` any more.
    pub fn has_begun(&mut self, session: usize) {
        self.count.remove(&session);
        for at in self.waiting.remove(&session).unwrap_or_default() {
            if let Some(count) = self.count.get_mut(&at) {
                *count -= 1;
                if *count == 0 {
                    self.free.insert(at);
                }
            }
        }
    }

    /// Those that can be the next: they miss nothing but leaders above their members, and nobody but who waits for
    /// them, too. The best first.
    pub fn candidates(&self, needs: &[Vec<Need>], todo: &[usize]) -> Vec<usize> {
        let mut parts: BTreeMap<usize, usize> = BTreeMap::new();
        let mut found = Vec::new();
        // Each part of sessions that wait for each other all around is complete once all that its last one
        // waits for is in it: later ones in this order wait for earlier ones at most.
        for last in self.by_end(todo).into_iter().rev() {
            if parts.contains_key(&last) {
                continue;
            }
            let (mut part, mut open, mut first) = (vec![last], vec![last], true);
            parts.insert(last, last);
            while let Some(at) = open.pop() {
                for of in needs[at].iter().map(|n| n.of).filter(|of| self.count.contains_key(of)) {
                    match parts.get(&of) {
                        Some(of) => first &= *of == last,
                        None => {
                            parts.insert(of, last);
                            part.push(of);
                            open.push(of);
                        }
                    }
                }
            }
            if first {
                let early_only = |n: &Need| n.why == Why::Early || !self.count.contains_key(&n.of);
                part.retain(|at| needs[*at].iter().all(early_only));
                part.sort_by_key(|at| (self.count[at], *at));
                found.extend(part);
            }
        }
        found
    }

    /// In the order in which a walk from each to those that wait for it comes to its end.
    fn by_end(&self, todo: &[usize]) -> Vec<usize> {
        let mut seen = BTreeSet::new();
        let mut ended = Vec::with_capacity(todo.len());
        for start in todo.iter().copied() {
            if !seen.insert(start) {
                continue;
            }
            let mut way = vec![(start, 0)];
            while let Some((at, next)) = way.last_mut() {
                let to = self.waiting.get(at).and_then(|w| w.get(*next)).copied();
                *next += 1;
                match to {
                    Some(to) if seen.insert(to) => way.push((to, 0)),
                    Some(_) => {}
                    None => {
                        ended.push(*at);
                        way.pop();
                    }
                }
            }
        }
        ended
    }
}
