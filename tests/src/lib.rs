//! The harness: starts a program that checks itself, takes it through dump and restore, and has it verify.
//!
//! ```text
//! runner     one process per case; counts passes, failures, skips with reasons
//! enclosure  the namespaces of a case, and what must be gone when it ends
//! engine     the binaries under test: rcriu, and CRIU when CRIU_BIN names one
//! home       namespaces of a program's own, made by a first process
//! program    a program of tests/programs or any command, in its own session and scratch folder
//! rpc        a client of the worker that container runtimes start
//! cycle      dump -> reap -> restore, with the state of the tree compared from outside
//! user       somebody who is not root, and the binaries for them
//! state      what /proc shows of a tree, as keys and values that can be compared
//! events     waiting for deaths and file changes without sleeping
//! ```
//!
//! Protocol with a program: it sets its state up, prints `READY`, blocks in sigwait(3); on SIGTERM it
//! verifies and prints `PASS`, `FAIL why` or `SKIP why` as its last line. Its output is a regular file, so
//! that nothing of the harness is inside the dumped tree.
//!
//! # Safety
//!
//! The few unsafe blocks here call system calls that nix lacks, on arguments built beside them, and fork
//! while the process has one thread.

pub mod cycle;
pub mod enclosure;
pub mod engine;
pub mod events;
pub mod home;
pub mod program;
pub mod rpc;
pub mod runner;
pub mod state;
pub mod user;

pub use cycle::{Cycle, Images};
pub use engine::{Engine, Finished};
pub use home::Home;
pub use program::Program;
pub use program::Scratch;
pub use runner::{Case, skip};
pub use user::User;
