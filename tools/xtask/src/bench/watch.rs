//! The process above the one that measures: whatever ends a run, nothing of it stays behind.
//!
//! Programs that are dumped and restored lead sessions of their own, so that a terminal's Ctrl-C never reaches them;
//! and settings of the machine that a row needs have to be put back. So the run is a child: when it has ended, or a
//! signal says that it should, everything that it started has become ours and is killed.

use std::fs;
use std::process::{Child, Command, ExitStatus};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use rcriu_tests::state::{descendants, processes};

/// How many mappings a process may have.
const MAP_COUNT: &str = "/proc/sys/vm/max_map_count";
/// Enough for the row with most of them, twice: a restore builds the new ones beside the old.
const MAPPINGS: u64 = 262_144;

/// Runs this program once more with `--watched`, until it ends or a signal comes.
///
/// # Errors
/// A run that failed or was broken off.
pub fn run() -> Result<()> {
    nix::sys::prctl::set_child_subreaper(true).context("PR_SET_CHILD_SUBREAPER")?;
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGCHLD]);
    signals.thread_block().context("sigprocmask")?;
    let _count = MapCount::raise();
    let program = std::env::current_exe().context("this program's own name")?;
    let mut child = Command::new(program)
        .args(std::env::args_os().skip(1))
        .arg("--watched")
        .spawn()
        .context("starting the run")?;
    let status = wait(&mut child, &signals)?;
    while kill_all()? {}
    match status {
        Some(status) if status.success() => Ok(()),
        Some(status) => bail!("the run failed: {status}"),
        None => bail!("broken off"),
    }
}

/// Undoes what [`run`] did to the signals: called by the run itself, before it starts anything.
pub fn watched() -> Result<()> {
    SigSet::all().thread_unblock().context("sigprocmask")
}

fn wait(child: &mut Child, signals: &SigSet) -> Result<Option<ExitStatus>> {
    loop {
        match signals.wait().context("sigwait")? {
            Signal::SIGCHLD => {
                if let Some(status) = child.try_wait().context("waiting for the run")? {
                    return Ok(Some(status));
                }
            }
            _ => {
                child.kill().context("ending the run")?;
                child.wait().context("waiting for the run")?;
                return Ok(None);
            }
        }
    }
}

/// Kills and reaps all descendants; whether there were any.
fn kill_all() -> Result<bool> {
    let left = descendants(&processes()?, std::process::id().cast_signed());
    for pid in &left {
        let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
    }
    while matches!(waitpid(None, None), Ok(_) | Err(Errno::EINTR)) {}
    Ok(!left.is_empty())
}

/// The limit on mappings while it is raised; dropped, it is as before.
struct MapCount(Option<String>);

impl MapCount {
    /// A machine that does not allow it skips the row instead.
    fn raise() -> MapCount {
        let before = fs::read_to_string(MAP_COUNT).ok();
        let low =
            before.as_ref().and_then(|text| text.trim().parse().ok()).is_some_and(|n: u64| n < MAPPINGS);
        MapCount(before.filter(|_| low && fs::write(MAP_COUNT, MAPPINGS.to_string()).is_ok()))
    }
}

impl Drop for MapCount {
    fn drop(&mut self) {
        if let Some(before) = &self.0
            && let Err(e) = fs::write(MAP_COUNT, before)
        {
            eprintln!("{MAP_COUNT} can't be put back to {}: {e}", before.trim());
        }
    }
}
