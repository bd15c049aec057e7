//! What the engine must know to speak to the parasite, the code that runs inside a process being
//! dumped.
//!
//! One call is one entry: the engine fills the control page, sets registers, lets the thread run
//! until the blob is at its end, and reads the page.
#![cfg_attr(not(test), no_std)]

use blobrt::abi::{FINGERPRINT_SEED, fingerprint};

/// Number of this build; the engine and the blob must agree on it.
pub const BUILD: u64 = fingerprint(FINGERPRINT_SEED, include_bytes!("lib.rs"));

/// Head of the control page.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Control {
    /// [`BUILD`] as the engine knows it.
    pub build: u64,
    /// [`BUILD`] as the blob knows it, written by every call.
    pub answer: u64,
}

const _: () = assert!(size_of::<Control>() == 16);
