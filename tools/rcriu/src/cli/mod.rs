//! The command line: words in, checked options to the engine, one line and an exit code out.
//!
//! ```text
//! configuration files -> getopt -> Raw (what was typed) -> served? -> checked options -> engine
//! command line        ->                 ^
//! RPC request         -------------------'
//! ```
//!
//! Exit code 0 is done, 1 is anything else.

mod actions;
pub mod checked;
mod config;
mod getopt;
mod help;
mod operate;
mod options;
mod own;
mod raw;
pub mod served;

use std::ffi::OsString;
use std::process::ExitCode;

use rcriu_engine::{Error, Kind, Result};

pub use actions::Action;
pub use checked::Folders;
pub use config::Source as ConfigFile;
pub use raw::{DEFAULT_VERBOSITY, Raw};

/// Does what `args`, the words after the program's name, ask for.
pub fn run(args: &[OsString]) -> ExitCode {
    let own = args.first().and_then(|word| own::ALL.iter().find(|own| *word == own.name));
    if let Some(own) = own {
        return (own.run)(&args[1..]);
    }
    if let Some(code) = information(args) {
        return code;
    }
    let parsed = match parse(args) {
        Ok(parsed) => parsed,
        Err(why) => return usage(&why),
    };
    let Parsed { raw, action, words } = parsed;
    crate::log::set_level(raw.verbosity);
    match operate::operate(action, &raw, &words, &config::forwarded(args)) {
        Ok(code) => code,
        Err(e) => {
            report(action, &e);
            ExitCode::FAILURE
        }
    }
}

/// Whether there is a command `name` of our own.
pub fn has_command(name: &str) -> bool {
    own::ALL.iter().any(|own| own.name == name)
}

/// `--help` and `--version` win over everything, mistakes included; so does no word at all.
fn information(args: &[OsString]) -> Option<ExitCode> {
    if args.is_empty() {
        print!("{}", help::text(None));
        return Some(ExitCode::FAILURE);
    }
    let asks = |long: &str, short: &str| match getopt::split(args) {
        Ok(split) => split.options.iter().any(|g| g.opt.long == long),
        Err(_) => args.iter().take_while(|a| *a != "--").any(|a| *a == long_form(long) || a == short),
    };
    if asks("help", "-h") {
        let mut words: Vec<_> = getopt::split(args).map(|s| s.words).unwrap_or_default();
        print!("{}", help::text(Action::take(&mut words).ok()));
        return Some(ExitCode::SUCCESS);
    }
    if asks("version", "-V") {
        print_version();
        return Some(ExitCode::SUCCESS);
    }
    None
}

fn long_form(name: &str) -> OsString {
    format!("--{name}").into()
}

/// liblxc takes the first line up to its end for the version.
fn print_version() {
    use std::io::Write;
    let text = format!("Version: {}\nrcriu {}\n", crate::CRIU_VERSION, env!("CARGO_PKG_VERSION"));
    // Whoever reads only the first line may have closed the pipe.
    let _ = std::io::stdout().write_all(text.as_bytes());
}

struct Parsed {
    raw: Raw,
    action: Action,
    words: Vec<OsString>,
}

fn parse(args: &[OsString]) -> Result<Parsed, String> {
    let mut raw = Raw::default();
    apply_files(&mut raw, &config::sources(args, |name| std::env::var_os(name)))?;
    let split = getopt::split(args)?;
    for given in &split.options {
        raw.apply(given).map_err(|e| e.to_string())?;
    }
    let mut words = split.words;
    let action = Action::take(&mut words)?;
    Ok(Parsed { raw, action, words })
}

/// Puts the options of configuration files into effect. The error names the file.
pub fn apply_files(raw: &mut Raw, files: &[config::Source]) -> Result<(), String> {
    for file in files {
        for given in config::read(file)? {
            raw.apply(&given).map_err(|e| format!("configuration file {}: {e}", file.path.display()))?;
        }
    }
    Ok(())
}

fn usage(why: &str) -> ExitCode {
    eprintln!("rcriu: {why}\nTry `rcriu --help`.");
    ExitCode::FAILURE
}

/// The one line: into the log, and to standard error unless the log is there or the error output is not ours.
fn report(action: Action, e: &Error) {
    log_failure(action, e);
    let ours = !matches!(action, Action::Swrk | Action::ServiceWorker);
    if ours && crate::log::is_elsewhere() {
        eprintln!("rcriu: {e}");
    }
}

/// Writes the error of an action into the log, with the closing line that log readers wait for.
pub fn log_failure(action: Action, e: &Error) {
    ::log::error!("{e}");
    match action {
        // Nothing was begun.
        _ if matches!(e.kind(), Kind::Usage(_)) => {}
        Action::Dump => ::log::error!("Dumping FAILED."),
        Action::PreDump => ::log::error!("Pre-dumping FAILED."),
        Action::Restore => ::log::error!("Restoring FAILED."),
        _ => {}
    }
}
