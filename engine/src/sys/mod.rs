//! System calls that nix lacks: each file small, documented, the only door to the kernel for its area.

pub(crate) mod fd;
pub(crate) mod probe;
pub(crate) mod signal;
