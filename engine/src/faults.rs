//! Named points at which a test can make an operation fail.
//!
//! `RCRIU_FAULT=name` makes the point `name` return an error, `RCRIU_FAULT=name:kill` makes the process that
//! comes to it end by SIGKILL, `RCRIU_FAULT=name:abort` by SIGABRT, which a tracer sees first: the ways in which
//! things go wrong.

use crate::error::{Error, Result, SysContext};

/// Environment variable with the name of the point that fails.
pub const FAULT: &str = "RCRIU_FAULT";

/// Every point: `point` refuses a name that is not in this list, so that tests can rely on it.
pub const POINTS: &[&str] = &[
    "infect-call-entered",
    "infect-call-running",
    "infect-call-ended",
    "infect-call-undone",
    "infect-blob-entered",
    "infect-blob-running",
    "infect-blob-ended",
    "infect-blob-undone",
    "restore-read",
    "restore-plan",
    "restore-preflight",
    "restore-fork-root",
    "restore-task-born",
    "restore-forked",
    "restore-task-files",
    "restore-rebuilt",
    "restore-seized",
    "restore-caught",
    "restore-ready",
];

/// Fails here if the environment says so.
pub fn point(name: &'static str) -> Result<()> {
    debug_assert!(POINTS.contains(&name), "{name} is not listed");
    let Ok(wanted) = std::env::var(FAULT) else { return Ok(()) };
    match wanted.strip_prefix(name) {
        Some("") => Err(Error::host(format!("fault injected at {name}"))),
        Some(":kill") => {
            nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL).call("kill")
        }
        Some(":abort") => std::process::abort(),
        _ => Ok(()),
    }
}
