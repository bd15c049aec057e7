//! Carries out one action of the command line, from parsed options to the exit code.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use rcriu_engine::error::{Error, Result, SysContext};
use rcriu_engine::process::{self, Inherited};

use super::actions::Action;
use super::checked::{self, Folders};
use super::raw::Raw;
use super::served;
use crate::log::{self as logfile, To};
use crate::run;

/// Does `action`. `words` is what follows it on the command line, `configuration` the options about
/// configuration files.
pub fn operate(
    action: Action,
    raw: &Raw,
    words: &[OsString],
    configuration: &[OsString],
) -> Result<ExitCode> {
    for fd in &raw.close {
        drop(process::take_descriptor(*fd).map_err(|e| e.during("--close"))?);
    }
    let inherited = Inherited::hide()?;
    process::prepare_signals()?;
    process::raise_descriptor_limit();
    if matches!(action, Action::Swrk | Action::ServiceWorker) {
        return worker(action, raw, words);
    }
    excess(action, raw, words)?;
    if action == Action::Exec {
        return Err(Error::usage("the command exec was removed; use the compel tool of CRIU"));
    }
    let folders = Folders::open(raw)?;
    nix::unistd::fchdir(&folders.work).call("fchdir").map_err(|e| e.during("work folder"))?;
    open_log(raw)?;
    if let Some(parent) = &raw.prev_images_dir {
        ::log::info!("Will do snapshot from {}", parent.display());
    }
    process::check_privileges(raw.unprivileged)?;
    served::check(action, raw)?;
    match action {
        Action::Check => Ok(crate::check::run(raw)),
        Action::Dump | Action::PreDump => {
            let options = checked::dump(raw, &folders, None)?;
            run::dump(action, &options, raw.display_stats).map(|()| ExitCode::SUCCESS)
        }
        Action::CpuinfoDump => run::cpuinfo_dump(&folders.images).map(|()| ExitCode::SUCCESS),
        Action::CpuinfoCheck => run::cpuinfo_check(&folders.images, raw.cpu_cap).map(|()| ExitCode::SUCCESS),
        Action::Dedup => run::dedup(&folders.images).map(|()| ExitCode::SUCCESS),
        Action::Restore => restore(raw, &folders, words, &inherited),
        Action::PageServer => crate::servers::page_server(raw, &folders),
        Action::LazyPages => crate::servers::lazy_pages(raw, &folders),
        Action::Service => crate::service::listen(raw, configuration),
        other => Err(Error::bug(format!("nobody serves {}", other.name()))),
    }
}

/// Standard error of a worker may be a container's: nothing goes there.
fn worker(action: Action, raw: &Raw, words: &[OsString]) -> Result<ExitCode> {
    let served = match action {
        Action::Swrk => crate::service::swrk(raw, words),
        _ => crate::service::worker(raw),
    };
    if let Err(e) = &served {
        ::log::error!("{e}");
    }
    crate::log::discard();
    Ok(served.unwrap_or(ExitCode::FAILURE))
}

fn excess(action: Action, raw: &Raw, words: &[OsString]) -> Result<()> {
    if words.is_empty() || (action == Action::Restore && raw.exec_cmd) {
        return Ok(());
    }
    let all: Vec<_> = words.iter().map(|w| w.to_string_lossy()).collect();
    Err(Error::usage(format!("{} takes no further words, but got: {}", action.name(), all.join(" "))))
}

fn open_log(raw: &Raw) -> Result<()> {
    let to = match raw.log_file.as_deref() {
        None => To::Stderr,
        Some(path) if path.as_os_str() == "-" => To::Stdout,
        Some(path) => To::File(path),
    };
    logfile::open(to, raw.verbosity, raw.log_pid).call("open").map_err(|e| {
        e.during(format!("log file {}", raw.log_file.as_deref().unwrap_or("-".as_ref()).display()))
    })
}

fn restore(raw: &Raw, folders: &Folders, words: &[OsString], inherited: &Inherited) -> Result<ExitCode> {
    let options = checked::restore(raw, folders, words, None)?;
    if raw.dry_run {
        return run::dry_run(&options, raw.json);
    }
    run::restore(&options, raw.display_stats)?;
    if let [program, args @ ..] = words {
        inherited.reveal();
        let e = Command::new(program).args(args).exec();
        return Err(Error::io("execve", &e).during(format!("--exec-cmd {}", program.display())));
    }
    if raw.restore_detached { Ok(ExitCode::SUCCESS) } else { run::wait() }
}
