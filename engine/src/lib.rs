//! The engine: everything that touches processes. Front ends hand it checked `options`.
//!
//! Four worlds, each with its own context type, so that no function can do another world's work:
//!
//! | world | runs where | may | context |
//! |---|---|---|---|
//! | dump | our process, tasks frozen | read procfs, command the parasite, write images | `dump::DumpCx` |
//! | plan | our process, before any fork | read images, add nodes and edges | `restore::plan::PlanCx` |
//! | task | inside a task being rebuilt | open, dup, receive, fill the restorer's arguments | `restore::TaskCx` |
//! | blob | parasite or restorer | raw system calls on its arguments | crates `parasite`, `restorer` |
//!
//! ```text
//! dump     seize -> freeze -> collect -> for each task: infect -> fds -> pages -> core -> cure
//!          -> pstree -> inventory -> kill | leave running
//! restore  read -> preflight -> plan -> fork tree -> [each task: memory -> files -> args] -> hand to restorer
//!          -> sigchld -> creds -> complete -> detach
//! ```
//!
//! The order lives in `dump` and `restore` and knows no kind; knowledge of a kind lives in
//! `files`, `mm`, `ns` and `task`, dump and restore side by side in one file.

#![deny(unsafe_code)]

pub mod arch;
pub mod cpuinfo;
pub mod dump;
pub mod error;
pub mod faults;
pub mod files;
pub mod infect;
pub mod interrupt;
pub mod kernel;
pub mod mm;
mod netlock;
pub mod ns;
pub mod options;
pub mod process;
pub mod procfs;
pub mod pstree;
pub mod restore;
pub mod scripts;
mod spread;
pub mod stats;
pub mod sys;
pub mod task;

pub use error::{Error, Kind, Result};
