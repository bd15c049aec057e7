//! The dump.

pub(crate) mod identity;
