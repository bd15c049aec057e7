//! The restore: from images to running tasks.
//!
//! ```text
//! read -> plan -> preflight -> fork tree -> [each task: memory -> files -> folder] -> restorer
//!      -> sigchld -> creds -> complete -> detach
//! ```

pub mod handoff;
pub mod plan;
pub mod preflight;
pub mod read;
pub mod stages;
pub mod task;
pub mod tree;

pub use read::{Snapshot, TaskImage, TaskIx};
pub use task::TaskCx;
