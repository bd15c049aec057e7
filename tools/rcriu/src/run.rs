//! Runs the engine with checked options, for the command line and the service alike.

use rcriu_engine::error::{Error, Result};
use rcriu_engine::interrupt;
use rcriu_engine::options::{DumpOptions, RestoreOptions};
use rcriu_engine::pstree::RealPid;
use rcriu_engine::stats;
use rcriu_images::ImageKind;

use crate::cli::Action;

/// A dump or pre-dump.
pub fn dump(action: Action, options: &DumpOptions, display_stats: bool) -> Result<()> {
    interrupt::set_deadline(options.timeout);
    let _ = (display_stats, stats::display, ImageKind::StatsDump);
    Err(Error::unsupported(format!("the command {} is not supported yet", action.name())))
}

/// A restore; gives the root task's pid.
pub fn restore(options: &RestoreOptions, display_stats: bool) -> Result<RealPid> {
    interrupt::set_deadline(options.timeout);
    let _ = display_stats;
    Err(Error::unsupported("the command restore is not supported yet"))
}
