//! The process tree and the numbers in it, used by dump and restore alike.

use std::{collections::HashMap, fmt, sync::Arc};

/// A pid as this engine's pid namespace sees it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RealPid(pub i32);

/// A pid as the dumped tasks see it, the one that stands in images.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VirtPid(pub i32);

macro_rules! pid {
    ($name:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }
    };
}
pid!(RealPid);
pid!(VirtPid);

/// What numbers of tasks, threads, groups and sessions are inside of the tree's pid namespace.
#[derive(Clone, Debug, Default)]
pub struct Numbering(Option<Arc<HashMap<i32, i32>>>);

impl Numbering {
    /// Of a tree in a pid namespace of its own: pairs of our number and its own.
    pub fn inner(pairs: impl IntoIterator<Item = (i32, i32)>) -> Numbering {
        Numbering(Some(Arc::new(pairs.into_iter().collect())))
    }

    /// The number inside; 0, as the kernel has it, for one that nobody inside can see.
    pub fn virt(&self, real: i32) -> i32 {
        match &self.0 {
            None => real,
            Some(inner) => inner.get(&real).copied().unwrap_or(0),
        }
    }

    /// The same of a thread of the tree.
    pub fn of(&self, real: RealPid) -> VirtPid {
        VirtPid(self.virt(real.0))
    }
}

/// Number of an open file, unique in an image set (`file_entry.id`); 0 is never given out.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct FileId(pub u32);

impl fmt::Display for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Life state of a task as images store it (`task_core_entry.task_state`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TaskState {
    /// Runs (or sleeps).
    Alive,
    /// Exited, not yet waited for.
    Dead,
    /// Stopped by job control.
    Stopped,
    /// Exited, not yet waited for, seen through ptrace.
    Zombie,
}

impl TaskState {
    /// The number in images.
    pub fn to_image(self) -> u32 {
        match self {
            TaskState::Alive => 1,
            TaskState::Dead => 2,
            TaskState::Stopped => 3,
            TaskState::Zombie => 6,
        }
    }
    /// From the number in images; `None` for a number the format does not have.
    pub fn from_image(v: u32) -> Option<Self> {
        Some(match v {
            1 => TaskState::Alive,
            2 => TaskState::Dead,
            3 => TaskState::Stopped,
            6 => TaskState::Zombie,
            _ => return None,
        })
    }
    /// Whether the task has memory, descriptors and registers.
    pub fn is_alive(self) -> bool {
        matches!(self, TaskState::Alive | TaskState::Stopped)
    }
}
