//! What differs between processors: registers, the signal frame, the system call instruction.
//!
//! Only x86_64 exists; the rest of the engine says `arch::` and would find another one here.

pub mod x86_64;

pub use x86_64::*;
