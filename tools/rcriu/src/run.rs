//! Runs the engine with checked options, for the command line and the service alike.

use std::io::Write as _;

use rcriu_engine::error::{Error, Result};
use rcriu_engine::interrupt;
use rcriu_engine::kernel::Kernel;
use rcriu_engine::options::{Dir, DumpOptions, RestoreOptions};
use rcriu_engine::pstree::RealPid;
use rcriu_engine::stats;
use rcriu_images::ImageKind;

use crate::cli::Action;

/// A dump or pre-dump.
pub fn dump(action: Action, options: &DumpOptions, display_stats: bool) -> Result<()> {
    interrupt::set_deadline(options.timeout);
    match action {
        Action::Dump => rcriu_engine::dump::dump(options, &Kernel::probe()?)?,
        other => return Err(Error::bug(format!("{} is no dump", other.name()))),
    }
    if display_stats {
        display(&options.common.work_dir, ImageKind::StatsDump);
    }
    Ok(())
}

/// A restore; gives the root task's pid.
pub fn restore(options: &RestoreOptions, display_stats: bool) -> Result<RealPid> {
    interrupt::set_deadline(options.timeout);
    let _ = display_stats;
    Err(Error::unsupported("the command restore is not supported yet"))
}

/// Prints the statistics just written. They are no reason to fail.
fn display(work_dir: &Dir, kind: ImageKind) {
    match stats::read(work_dir, kind) {
        Ok(Some(entry)) => {
            let _ = std::io::stdout().write_all(stats::display(&entry).as_bytes());
        }
        Ok(None) => log::warn!("there are no statistics to display"),
        Err(e) => log::warn!("statistics: {e}"),
    }
}
