//! The process tree and the numbers in it, used by dump and restore alike.

use std::fmt;

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
