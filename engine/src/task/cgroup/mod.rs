//! Control groups: the groups each thread is in, their folders and properties, in every hierarchy.
//!
//! ```text
//! dump      sets (who is where) -> folders below the groups of the sets, with their properties
//! restore   missing folders are made -> each task enters its set at birth, threads before they are let go
//!           -> properties -> ... the tree runs -> freezer
//! ```
//! Folders that a restore has made, and properties it has changed, go back if it fails.
//!
//! Source: Documentation/admin-guide/cgroup-v1 and cgroup-v2.rst of the kernel.

mod attributes;
mod folders;
mod properties;
mod restore;
mod roots;
pub mod sets;
mod values;
mod yard;

pub use restore::{Groups, set_of};
pub use sets::{OWN, Sets};
pub use yard::hierarchy;
