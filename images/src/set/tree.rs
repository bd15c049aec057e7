//! The tree of processes as a list to print.

use std::collections::HashMap;

use super::{ImageSet, Task};

/// A task in its place.
#[derive(Debug)]
pub struct Node<'a> {
    pub task: &'a Task,
    /// For each level below the root, whether an elder has further children: what tree lines need. The
    /// last one is about this task itself.
    pub more: Vec<bool>,
}

/// The tasks depth first, children in the order of the image. Tasks whose parent is not there come as
/// further roots.
pub fn tree(set: &ImageSet) -> Vec<Node<'_>> {
    let index: HashMap<u32, usize> = set.tasks.iter().enumerate().map(|(at, task)| (task.pid, at)).collect();
    let mut children: HashMap<usize, Vec<usize>> = HashMap::new();
    let mut pending: Vec<(usize, Vec<bool>)> = Vec::new();
    for (at, task) in set.tasks.iter().enumerate() {
        match index.get(&task.ppid) {
            Some(&parent) if parent != at => children.entry(parent).or_default().push(at),
            _ => pending.push((at, Vec::new())),
        }
    }
    pending.reverse();
    let mut nodes = Vec::with_capacity(set.tasks.len());
    while let Some((at, more)) = pending.pop() {
        let kids = children.remove(&at).unwrap_or_default();
        for (place, kid) in kids.iter().enumerate().rev() {
            let mut more = more.clone();
            more.push(place + 1 < kids.len());
            pending.push((*kid, more));
        }
        nodes.push(Node { task: &set.tasks[at], more });
    }
    nodes
}
