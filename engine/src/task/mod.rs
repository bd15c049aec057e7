//! State of a task or thread besides memory and files: one kind per file, dump and restore side by side.

pub mod cgroup;
pub mod creds;
pub mod fs;
pub mod misc;
pub mod rlimits;
pub mod rseq;
pub mod sched;
pub mod seccomp;
pub mod sigaction;
pub mod sigqueue;
pub mod stop;
pub mod timers;
