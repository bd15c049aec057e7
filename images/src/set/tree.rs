//! The tree of processes as a list to print.

use std::collections::HashMap;

use super::{ImageSet, Task};

/// Levels for which [`Node::bars`] are kept. A chain of a million tasks must not cost a million lists of
/// that length, and no screen shows as many.
pub const MAX_BARS: usize = 16;

/// A task in its place.
#[derive(Debug)]
pub struct Node<'a> {
    pub task: &'a Task,
    /// 0 for a root.
    pub depth: usize,
    /// For each level between the root and this task, from the top, at most [`MAX_BARS`]: whether the
    /// ancestor there has younger siblings, so that a line passes by this task.
    pub bars: Vec<bool>,
    /// Whether this task has no younger siblings.
    pub last: bool,
}

/// The tasks depth first, children in the order of the image. Tasks whose parent is not there come as
/// further roots.
pub fn tree(set: &ImageSet) -> Vec<Node<'_>> {
    let index: HashMap<u32, usize> = set.tasks.iter().enumerate().map(|(at, task)| (task.pid, at)).collect();
    let mut children: HashMap<usize, Vec<usize>> = HashMap::new();
    let mut pending: Vec<Pending> = Vec::new();
    for (at, task) in set.tasks.iter().enumerate() {
        match index.get(&task.ppid) {
            Some(&parent) if parent != at => children.entry(parent).or_default().push(at),
            _ => pending.push(Pending { at, depth: 0, bars: Vec::new(), last: true }),
        }
    }
    pending.reverse();
    let mut nodes = Vec::with_capacity(set.tasks.len());
    while let Some(Pending { at, depth, bars, last }) = pending.pop() {
        let kids = children.remove(&at).unwrap_or_default();
        let mut below = bars.clone();
        if depth > 0 && below.len() < MAX_BARS {
            below.push(!last);
        }
        for (place, &kid) in kids.iter().enumerate().rev() {
            let last = place + 1 == kids.len();
            pending.push(Pending { at: kid, depth: depth + 1, bars: below.clone(), last });
        }
        nodes.push(Node { task: &set.tasks[at], depth, bars, last });
    }
    nodes
}

/// A task whose turn comes later.
struct Pending {
    at: usize,
    depth: usize,
    bars: Vec<bool>,
    last: bool,
}
