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

use blobrt::abi::{FINGERPRINT_SEED, fingerprint};

/// Number of this build; the engine and the blob must agree on it.
pub const BUILD: u64 = fingerprint(FINGERPRINT_SEED, include_bytes!("lib.rs"));

/// Head of the arguments.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct TaskArgs {
    /// [`BUILD`] as the engine knows it.
    pub build: u64,
    /// [`BUILD`] as the blob knows it.
    pub answer: u64,
}

const _: () = assert!(size_of::<TaskArgs>() == 16);
