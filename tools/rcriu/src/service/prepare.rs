//! From a request to options, folders and an open log.
//!
//! Order of precedence, lowest first: configuration files, the request, the configuration file that the request
//! names.

use std::path::{Path, PathBuf};

use rcriu_engine::error::{Error, Result, SysContext};
use rcriu_images::pb::CriuOpts;

use super::{Trust, opts};
use crate::cli::{self, Action, Folders, Raw};
use crate::log::{self as logfile, To};

/// Name of the log when the client gives none.
const LOG: &str = "criu.log";

/// What the configuration file that the request names decides, so that the request does not.
#[derive(Default)]
struct Decided {
    images_dir: bool,
    work_dir: bool,
    log_file: bool,
    verbosity: bool,
}

/// Prepares `action` for the client with pid `peer`, on top of `base`. The log is open when this succeeds, and
/// in the work folder, which is the current one.
pub fn prepare(
    base: &Raw,
    opts: &CriuOpts,
    peer: i32,
    trust: Trust,
    action: Action,
) -> Result<(Raw, Folders)> {
    let mut raw = base.clone();
    opts::apply(&mut raw, opts, peer, trust)?;
    let decided = match &opts.config_file {
        Some(file) => overrule(&mut raw, file.as_ref())?,
        None => Decided::default(),
    };
    let of_client = |fd: i32| PathBuf::from(format!("/proc/{peer}/fd/{fd}"));
    if !decided.images_dir {
        raw.images_dir = match (opts.images_dir_fd, &opts.images_dir) {
            (fd, _) if fd != -1 => Some(of_client(fd)),
            (_, Some(path)) => Some(path.into()),
            (_, None) if action == Action::Check => None,
            (_, None) => return Err(Error::usage("the request names no folder for images")),
        };
    }
    if let Some(fd) = opts.work_dir_fd.filter(|_| !decided.work_dir) {
        raw.work_dir = Some(of_client(fd));
    }
    if !decided.verbosity {
        raw.verbosity = u32::try_from(opts.log_level()).unwrap_or(0);
    }
    let folders = Folders::open(&raw)?;
    nix::unistd::fchdir(&folders.work).call("fchdir").map_err(|e| e.during("work folder"))?;
    open_log(&raw, opts, decided.log_file)?;
    Ok((raw, folders))
}

/// Puts the options of the file at `path` on top. It need not exist.
fn overrule(raw: &mut Raw, path: &Path) -> Result<Decided> {
    let before = raw.clone();
    raw.images_dir = None;
    raw.work_dir = None;
    raw.log_file = None;
    raw.given.clear();
    let source = cli::ConfigFile { path: path.to_owned(), required: false };
    cli::apply_files(raw, &[source]).map_err(Error::usage)?;
    let decided = Decided {
        images_dir: raw.images_dir.is_some(),
        work_dir: raw.work_dir.is_some(),
        log_file: raw.log_file.is_some(),
        verbosity: raw.given.contains("verbosity"),
    };
    raw.given.extend(before.given);
    raw.images_dir = raw.images_dir.take().or(before.images_dir);
    raw.work_dir = raw.work_dir.take().or(before.work_dir);
    raw.log_file = raw.log_file.take().or(before.log_file);
    Ok(decided)
}

fn open_log(raw: &Raw, opts: &CriuOpts, decided: bool) -> Result<()> {
    let to = match (opts.log_file.as_deref(), raw.log_file.as_deref()) {
        (_, Some(path)) if decided => To::File(path),
        (Some(name), _) if name.contains('/') => {
            return Err(Error::usage(format!(
                "log_file {name}: give a plain name; it is made in the work folder"
            )));
        }
        (Some(name), _) => To::File(name.as_ref()),
        (None, _) if opts.log_to_stderr() => To::Stderr,
        (None, Some(path)) => To::File(path),
        (None, None) => To::File(LOG.as_ref()),
    };
    logfile::open(to, raw.verbosity, raw.log_pid).call("open").map_err(|e| e.during("log file"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clients_file_overrules_the_request() {
        let tmp = tempfile::tempdir().unwrap();
        let file = tmp.path().join("runc.conf");
        std::fs::write(&file, "tcp-established\nno-shell-job\nwork-dir /w\nverbosity 3\n").unwrap();
        let mut raw = Raw { shell_job: true, images_dir: Some("/i".into()), ..Raw::default() };
        raw.note("shell-job", true);
        raw.note("file-locks", true);
        let decided = overrule(&mut raw, &file).unwrap();
        assert!(decided.work_dir && decided.verbosity && !decided.images_dir && !decided.log_file);
        assert!(raw.tcp.established && !raw.shell_job);
        assert_eq!((raw.images_dir, raw.work_dir), (Some("/i".into()), Some("/w".into())));
        assert!(raw.given.contains("file-locks") && raw.given.contains("tcp-established"));
    }

    #[test]
    fn the_clients_file_is_usually_missing() {
        let mut raw = Raw { work_dir: Some("/w".into()), ..Raw::default() };
        let decided = overrule(&mut raw, Path::new("/nonexistent/runc.conf")).unwrap();
        assert!(!decided.work_dir);
        assert_eq!(raw.work_dir, Some("/w".into()));
    }
}
