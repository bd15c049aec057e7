//! Runs the engine with checked options, for the command line and the service alike.

use std::io::Write as _;
use std::process::ExitCode;

use rcriu_engine::error::{Error, Kind, Result};
use rcriu_engine::interrupt;
use rcriu_engine::kernel::Kernel;
use rcriu_engine::options::{CpuCap, Dir, DumpOptions, RestoreOptions};
use rcriu_engine::pstree::RealPid;
use rcriu_engine::restore::preflight::Preflight;
use rcriu_engine::stats;
use rcriu_images::ImageKind;

use crate::cli::Action;

/// A dump or pre-dump.
pub fn dump(action: Action, options: &DumpOptions, display_stats: bool) -> Result<()> {
    interrupt::set_deadline(options.timeout);
    match action {
        Action::Dump => rcriu_engine::dump::dump(options, &Kernel::probe()?)?,
        Action::PreDump => rcriu_engine::dump::predump::pre_dump(options, &Kernel::probe()?)?,
        other => return Err(Error::bug(format!("{} is no dump", other.name()))),
    }
    if display_stats {
        display(&options.common.work_dir, ImageKind::StatsDump);
    }
    Ok(())
}

/// Frees in the parents of the images what these have themselves.
pub fn dedup(images: &Dir) -> Result<()> {
    let freed = rcriu_engine::mm::dedup::parents(&images.images()?)?;
    log::info!("{freed} pages were freed in the parent images");
    Ok(())
}

/// Writes what this processor can do. An image that is there is written anew.
pub fn cpuinfo_dump(images: &Dir) -> Result<()> {
    rcriu_engine::cpuinfo::dump(&images.images()?)
}

/// Fails if this processor lacks what the image says; everything is compared if nothing in particular is asked for.
pub fn cpuinfo_check(images: &Dir, cap: CpuCap) -> Result<()> {
    let cap = if cap.is_empty() { CpuCap::ALL } else { cap };
    rcriu_engine::cpuinfo::check(&images.images()?, cap)
}

/// A restore; the root task's pid. Whoever asked may wait for the tasks' end with [`wait`].
pub fn restore(options: &RestoreOptions, display_stats: bool) -> Result<RealPid> {
    interrupt::set_deadline(options.timeout);
    let restored = rcriu_engine::restore::restore(options, &Kernel::probe()?)?;
    interrupt::set_deadline(None);
    if let Some(filler) = restored.filler {
        let _ = writeln!(std::io::stdout(), "Tasks run (root task {}), memory follows", restored.root);
        filler.wait()?;
        let _ = writeln!(std::io::stdout(), "All memory is in place");
    }
    if display_stats {
        display(&options.common.work_dir, ImageKind::StatsRestore);
    }
    Ok(restored.root)
}

/// Waits until the restored tasks that are our children have ended.
///
/// A signal ends only the waiting: the tasks are not ours any more.
pub fn wait() -> Result<ExitCode> {
    match rcriu_engine::restore::wait_for_all() {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(e) => match e.kind() {
            Kind::Interrupted(signal) => Ok(ExitCode::from(128u8.saturating_add(*signal as u8))),
            _ => Err(e),
        },
    }
}

/// `restore --dry-run`: the exit code is 0 if nothing is known to be in the way.
pub fn dry_run(options: &RestoreOptions, json: bool) -> Result<ExitCode> {
    let preflight = rcriu_engine::restore::dry_run(options, &Kernel::probe()?)?;
    let text = if json { as_json(&preflight)? } else { as_text(&preflight) };
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(if preflight.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn as_json(preflight: &Preflight) -> Result<String> {
    let mut value = serde_json::to_value(preflight).map_err(|e| Error::bug(e.to_string()))?;
    if let Some(map) = value.as_object_mut() {
        map.insert("ok".into(), preflight.is_ok().into());
    }
    Ok(format!("{value:#}\n"))
}

fn as_text(preflight: &Preflight) -> String {
    let Preflight { tasks, threads, zombies, helpers, files, problems } = preflight;
    let count = |n: &u32, one: &str, many: &str| format!("{n} {}", if *n == 1 { one } else { many });
    let mut parts = vec![
        count(tasks, "process", "processes"),
        count(threads, "thread", "threads"),
        count(files, "open file", "open files"),
    ];
    if *zombies > 0 {
        parts.push(count(zombies, "zombie", "zombies"));
    }
    if *helpers > 0 {
        parts.push(count(
            helpers,
            "helper for the time of the restore",
            "helpers for the time of the restore",
        ));
    }
    let mut text = format!("Would restore {}.\n", parts.join(", "));
    if problems.is_empty() {
        text.push_str("Nothing is in the way.\n");
    }
    for problem in problems {
        text.push_str(&format!("In the way: {}\n", problem.text));
    }
    text
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

#[cfg(test)]
mod tests {
    use super::*;
    use rcriu_engine::restore::preflight::{Area, Problem};

    #[test]
    fn a_dry_run_tells_what_is_in_the_way() {
        let mut preflight = Preflight { tasks: 2, threads: 5, files: 9, zombies: 1, ..Preflight::default() };
        assert_eq!(
            as_text(&preflight),
            "Would restore 2 processes, 5 threads, 9 open files, 1 zombie.\nNothing is in the way.\n"
        );
        preflight.problems.push(Problem { area: Area::Pid, text: "pid 7 is taken by sh".into() });
        assert!(as_text(&preflight).ends_with("In the way: pid 7 is taken by sh\n"));
        let json: serde_json::Value = serde_json::from_str(&as_json(&preflight).unwrap()).unwrap();
        assert_eq!((&json["ok"], &json["tasks"]), (&false.into(), &2.into()));
        assert_eq!(json["problems"][0]["area"], "pid");
    }
}
