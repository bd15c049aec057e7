//! Which pages come late.
//!
//! By the rules of the lazy-pages protocol these are the pages that the dump marked so, whatever became of
//! copy-on-write sharing. A restore that serves itself may decide more freely: all private anonymous memory, but
//! for mappings that parent and child both have, which are filled at once so that what is equal stays shared.

use std::collections::{HashMap, HashSet};

use rcriu_images::{
    pagemap::{Run, Source},
    pb,
};

use crate::mm::{restore::key, vma::may_be_lazy};
use crate::pstree::VirtPid;
use crate::restore::Snapshot;

/// The rule of a restore.
#[derive(Debug)]
pub enum Late {
    /// Nothing comes late.
    Nothing,
    /// The pages that are marked.
    Marked,
    /// All that can, but for these mappings of each task, by start.
    All(HashMap<VirtPid, HashSet<u64>>),
}

/// What the rule means for one mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OfVma {
    Nothing,
    Marked,
    All,
}

impl Late {
    /// Everything that can come late does, but for what tasks of `snapshot` may share with each other.
    pub fn all(snapshot: &Snapshot) -> Late {
        let mut tasks = HashMap::new();
        for (_, task) in snapshot.alive() {
            let parent = task.parent.and_then(|ix| snapshot.get(ix)).map(|t| t.pid);
            let vmas = task.mm.as_ref().map_or(&[][..], |mm| &mm.vmas);
            let keys: HashMap<_, u64> =
                vmas.iter().filter(|v| may_be_lazy(v)).map(|v| (key(v), v.start)).collect();
            tasks.insert(task.pid, (parent, keys));
        }
        let mut at_once: HashMap<VirtPid, HashSet<u64>> = HashMap::new();
        for (pid, (parent, keys)) in &tasks {
            let Some(parent) = parent else { continue };
            let Some((_, parents)) = tasks.get(parent) else { continue };
            for (key, start) in keys.iter().filter(|(key, _)| parents.contains_key(*key)) {
                at_once.entry(*pid).or_default().insert(*start);
                at_once.entry(*parent).or_default().extend(parents.get(key));
            }
        }
        Late::All(at_once)
    }

    /// What it means for `vma` of task `pid`.
    pub fn of(&self, pid: VirtPid, vma: &pb::VmaEntry) -> OfVma {
        match self {
            Late::Nothing => OfVma::Nothing,
            _ if !may_be_lazy(vma) => OfVma::Nothing,
            Late::Marked => OfVma::Marked,
            Late::All(at_once) if at_once.get(&pid).is_some_and(|s| s.contains(&vma.start)) => OfVma::Nothing,
            Late::All(_) => OfVma::All,
        }
    }
}

impl OfVma {
    /// Whether the pages of `run` come late.
    pub fn is_late(self, run: &Run) -> bool {
        let somewhere = matches!(run.source, Source::Stored { .. } | Source::Lazy);
        match self {
            OfVma::Nothing => false,
            OfVma::Marked => somewhere && run.lazy,
            OfVma::All => somewhere,
        }
    }
}
