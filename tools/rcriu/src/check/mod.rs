//! The command check: what this kernel has of what is needed.

use std::process::ExitCode;

use crate::cli::Raw;

/// Names of features that can be asked for.
pub fn is_feature(_name: &str) -> bool {
    _name == "mem_dirty_track"
}

/// Runs it.
pub fn run(_raw: &Raw) -> ExitCode {
    ExitCode::FAILURE
}
