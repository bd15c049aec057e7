//! Configuration files: options, one a line, that count before those of the command line.
//!
//! ```text
//! tcp-established                  # a switch
//! work-dir "/home/me/a \"b\" dir"  # a value, quoted because it has spaces
//! verbosity 4
//! no-restore-sibling
//! ```

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::getopt::{self, Given};
use super::options::{self, Takes};

/// Where the system's defaults are.
pub const SYSTEM: &str = "/etc/criu/default.conf";
/// The same for a user, below the home folder.
pub const USER: &str = ".criu/default.conf";
/// Environment variable that names one more file.
pub const VARIABLE: &str = "CRIU_CONFIG_FILE";

/// A file to read, and whether it must be there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// The file.
    pub path: PathBuf,
    /// An error if it is missing.
    pub required: bool,
}

/// The files that count, in order; later ones win.
///
/// `args` is the command line, of which only `--config` and `--no-default-config` matter here: they decide what
/// is read before the command line itself is.
pub fn sources(args: &[OsString], env: impl Fn(&str) -> Option<OsString>) -> Vec<Source> {
    let mut named = None;
    let mut defaults = true;
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let text = arg.to_string_lossy();
        if text == "--" {
            break;
        } else if text == "--no-default-config" {
            defaults = false;
        } else if text == "--config" {
            named = args.next().map(PathBuf::from);
            defaults = false;
        } else if let Some(path) = text.strip_prefix("--config=") {
            named = Some(PathBuf::from(path));
            defaults = false;
        }
    }
    let mut files = Vec::new();
    let mut add = |path: PathBuf, required| files.push(Source { path, required });
    if defaults {
        add(SYSTEM.into(), false);
        if let Some(home) = env("HOME") {
            add(Path::new(&home).join(USER), false);
        }
    }
    if let Some(path) = env(VARIABLE) {
        add(path.into(), true);
    }
    if let Some(path) = named {
        add(path, true);
    }
    files
}

/// Those options of `args` that decide about files, for a process of ours that is to read the same.
pub fn forwarded(args: &[OsString]) -> Vec<OsString> {
    let mut found = Vec::new();
    let mut args = args.iter().take_while(|a| *a != "--");
    while let Some(arg) = args.next() {
        let text = arg.to_string_lossy();
        if text == "--no-default-config" || text.starts_with("--config=") {
            found.push(arg.clone());
        } else if text == "--config" {
            found.push(arg.clone());
            found.extend(args.next().cloned());
        }
    }
    found
}

/// Reads one file. The error names file and line.
pub fn read(source: &Source) -> Result<Vec<Given>, String> {
    let name = source.path.display();
    let text = match std::fs::read_to_string(&source.path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && !source.required => return Ok(Vec::new()),
        Err(e) => return Err(format!("configuration file {name}: {e}")),
    };
    log::debug!("Parsing config file {name}");
    parse(&text).map_err(|(line, why)| format!("configuration file {name}, line {line}: {why}"))
}

/// Parses the text of a file. The error has the number of its line.
pub fn parse(text: &str) -> Result<Vec<Given>, (usize, String)> {
    let mut all = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let at = |why| (number + 1, why);
        if let Some((name, value)) = statement(line).map_err(at)? {
            all.extend(option(&name, value).map_err(at)?);
        }
    }
    Ok(all)
}

/// Name and value of a line; `None` if there is nothing on it.
fn statement(line: &str) -> Result<Option<(String, Option<String>)>, String> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return Ok(None);
    }
    let Some((name, rest)) = line.split_once([' ', '\t']) else {
        return Ok(Some((line.to_owned(), None)));
    };
    let rest = rest.trim_start();
    let (value, tail) = match rest.strip_prefix('"') {
        Some(quoted) => unquote(quoted)?,
        None => {
            let end = rest.find(|c: char| c.is_whitespace() || c == '#').unwrap_or(rest.len());
            (rest[..end].replace("\\\"", "\""), &rest[end..])
        }
    };
    let tail = tail.trim_start();
    if !tail.is_empty() && !tail.starts_with('#') {
        return Err(format!("`{tail}` after the value; put a value with spaces in double quotes"));
    }
    let quoted = rest.starts_with('"');
    Ok(Some((name.to_owned(), (quoted || !value.is_empty()).then_some(value))))
}

/// The text up to the closing quote, and what follows it. Only `\"` is an escape.
fn unquote(text: &str) -> Result<(String, &str), String> {
    let mut value = String::new();
    let mut chars = text.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' if chars.peek().is_some_and(|(_, next)| *next == '"') => {
                chars.next();
                value.push('"');
            }
            '"' => return Ok((value, &text[at + 1..])),
            c => value.push(c),
        }
    }
    Err("the closing double quote is missing".into())
}

fn option(name: &str, value: Option<String>) -> Result<Vec<Given>, String> {
    let takes = options::all().find(|o| o.long == name).map(|o| o.takes);
    let words: Vec<OsString> = match (takes, value) {
        (Some(Takes::One(_) | Takes::Maybe(_)), Some(value)) => vec![format!("--{name}={value}").into()],
        (_, None) => vec![format!("--{name}").into()],
        (_, Some(value)) => {
            log::warn!("configuration file: {name} takes no value, `{value}` is ignored");
            vec![format!("--{name}").into()]
        }
    };
    Ok(getopt::split(&words)?.options)
}

#[cfg(test)]
mod tests {
    use super::super::raw::Raw;
    use super::*;

    fn raw(text: &str) -> Raw {
        let mut raw = Raw::default();
        for given in parse(text).unwrap() {
            raw.apply(&given).unwrap();
        }
        raw
    }

    #[test]
    fn switches_values_quotes_and_comments() {
        let r = raw(
            "# nothing\n\n  tcp-established\ntree\t12 # the tree\nno-shell-job   # another comment\n\
                     work-dir \"/home/me/my \\\"work\\\" #1 dir\"   # here\nlsm-profile \"selinux:a\"\nverbosity 4\n",
        );
        assert!(r.tcp.established && !r.shell_job);
        assert_eq!(r.tree, Some(12));
        assert_eq!(r.work_dir.as_deref(), Some(Path::new("/home/me/my \"work\" #1 dir")));
        assert_eq!(r.verbosity, 4);
        assert_eq!(r.lsm_profile.unwrap().name, "a");
    }

    #[test]
    fn a_switch_with_a_value_is_still_the_switch() {
        assert!(raw("tcp-close yes\n").tcp.close);
    }

    #[test]
    fn mistakes_name_their_line() {
        assert_eq!(parse("tree 1\nwork-dir a b\n").unwrap_err().0, 2);
        assert_eq!(parse("work-dir \"a\n").unwrap_err().0, 1);
        assert_eq!(parse("work-dir \"a\" b\n").unwrap_err().0, 1);
        let (line, why) = parse("\n\nfrobnicate\n").unwrap_err();
        assert_eq!((line, why.as_str()), (3, "unknown option --frobnicate"));
        assert!(parse("tree\n").unwrap_err().1.contains("PID"));
    }

    #[test]
    fn files_come_in_crius_order() {
        let env = |name: &str| match name {
            "HOME" => Some("/home/me".into()),
            VARIABLE => Some("/env.conf".into()),
            _ => None,
        };
        let paths = |args: &[&str]| {
            let args: Vec<OsString> = args.iter().map(OsString::from).collect();
            sources(&args, env).into_iter().map(|s| s.path.display().to_string()).collect::<Vec<_>>()
        };
        assert_eq!(paths(&["dump"]), ["/etc/criu/default.conf", "/home/me/.criu/default.conf", "/env.conf"]);
        assert_eq!(paths(&["--no-default-config"]), ["/env.conf"]);
        assert_eq!(paths(&["dump", "--config", "x"]), ["/env.conf", "x"]);
        assert_eq!(paths(&["--config=y"]), ["/env.conf", "y"]);
        assert_eq!(paths(&["restore", "--", "--config=y"]).len(), 3);
    }

    #[test]
    fn what_decides_about_files_can_be_passed_on() {
        let args: Vec<OsString> = ["service", "--config", "x", "-v4", "--no-default-config", "--config=y"]
            .iter()
            .map(OsString::from)
            .collect();
        assert_eq!(forwarded(&args), ["--config", "x", "--no-default-config", "--config=y"]);
    }

    #[test]
    fn a_missing_file_matters_only_if_named() {
        let at = |required| Source { path: "/nonexistent/x.conf".into(), required };
        assert!(read(&at(false)).unwrap().is_empty());
        assert!(read(&at(true)).unwrap_err().contains("/nonexistent/x.conf"));
    }
}
