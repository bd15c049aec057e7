//! What the engine must know to speak to the restorer, the code that replaces the address space it
//! runs in; the blob itself is the binary of this package.
//!
//! # Safety
//! Structures here are plain integers in memory that two programs share; pointers never cross, only
//! offsets and addresses of the task being restored.
#![cfg_attr(not(test), no_std)]

pub mod args;
pub mod report;
pub mod shared;

pub use args::{TaskArgs, ThreadArgs};
pub use shared::{ErrorSlot, Shared, Stage, TaskSlot};

use blobrt::abi::{FINGERPRINT_SEED, fingerprint};

/// Number of this build; the engine and the blob must agree on it.
pub const BUILD: u64 = {
    let mut hash = fingerprint(FINGERPRINT_SEED, include_bytes!("lib.rs"));
    hash = fingerprint(hash, include_bytes!("args.rs"));
    hash = fingerprint(hash, include_bytes!("args/memory.rs"));
    hash = fingerprint(hash, include_bytes!("args/table.rs"));
    hash = fingerprint(hash, include_bytes!("args/thread.rs"));
    hash = fingerprint(hash, include_bytes!("report.rs"));
    fingerprint(hash, include_bytes!("shared.rs"))
};
