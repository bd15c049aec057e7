//! Getting into a running process and out again without a trace.

pub mod blob;
