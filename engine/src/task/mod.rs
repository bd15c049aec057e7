//! State of a task or thread besides memory and files: one kind per file, dump and restore side by side.

pub mod affinity;
pub mod attributes;
pub mod autogroup;
pub mod cgroup;
pub mod coredump;
pub mod creds;
pub mod dispatch;
pub mod fs;
pub mod ioprio;
pub mod keys;
pub mod landlock;
pub mod lsm;
pub mod misc;
pub mod more;
pub mod numa;
pub mod refused;
pub mod rlimits;
pub mod rseq;
pub mod sched;
pub mod seccomp;
pub mod sigaction;
pub mod sigqueue;
pub mod stop;
pub mod timers;
