//! What the engine must know to speak to the restorer, the code that replaces the address space it
//! runs in; the blob itself is the binary of this package.
//!
//! # Safety
//! Structures here are plain integers in memory that two programs share; pointers never cross, only
//! offsets and addresses of the task being restored.
#![cfg_attr(not(test), no_std)]

pub mod report;
pub mod shared;

pub use shared::{ErrorSlot, Shared, Stage, TaskSlot};
