//! System calls that nix lacks: each file small, documented, the only door to the kernel for its area.

pub(crate) mod anon;
pub(crate) mod check;
pub mod clone3;
pub mod errno;
pub(crate) mod fd;
pub mod futex;
pub(crate) mod handle;
pub(crate) mod inotify;
pub mod kcmp;
pub mod map;
pub mod pagemap_scan;
pub mod pidfd;
pub(crate) mod probe;
pub mod ptrace;
pub mod rlimit;
pub mod robust_list;
pub mod rseq;
pub mod sched;
pub(crate) mod shared;
pub(crate) mod signal;
pub(crate) mod sock_diag;
pub(crate) mod sockopt;
pub(crate) mod tty;
pub mod userfaultfd;
pub mod vm;
pub mod wait;
