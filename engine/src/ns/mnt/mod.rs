//! Mount namespaces: that of the root task, and all others that tasks of its tree are in.
//!
//! A dump writes down every mount of the namespaces and the content of file systems that live in memory; what stands
//! on disks of the host is outside: the root, which whoever restores gives (`--root`), and mounts that options call
//! external. A restore makes the mounts in an empty place of a new namespace, each alone first, and then puts them
//! together, so that none is in the way of another and nothing propagates before it should:
//!
//! ```text
//! dump     mountinfo -> mounts, external ones marked -> Tree -> contents -> mountpoints-ID.img
//! plan     mountpoints-ID.img -> Tree: order, sources, propagation groups      (engine, nothing made)
//! prepare  clones of what is outside, as descriptors                           (engine, before the fork)
//! build    scratch tmpfs -> plain mounts -> trees -> pivot_root -> propagation       (in the new namespaces)
//! ```
//!
//! With a user namespace of its own, the new mount namespace may not clone mounts of the host, so those come as
//! descriptors from [`Tree::prepare`]; file systems must be made inside, to belong to it.

mod beside;
mod build;
mod content;
mod context;
mod dump;
mod external;
pub(crate) mod flags;
mod fstypes;
mod groups;
mod ids;
mod mount;
pub(crate) mod paths;
mod plain;
mod plan;
mod prepare;
mod reach;
mod sharing;
mod spaces;
mod spot;
mod terminals;
mod tree;
mod walk;

#[cfg(test)]
mod roundtrip;
#[cfg(test)]
mod testing;

pub use beside::Beside;
pub use build::build;
pub use dump::{DumpMounts, Table, dump, look};
pub use mount::{Mount, Outside};
pub use plan::read;
pub use prepare::Prepared;
pub use terminals::Masters;
pub use tree::Tree;
