//! Splits arguments into options and the rest, by the rules of getopt_long(3), which scripts and container
//! runtimes rely on: options anywhere, `--` ends them, `-v4` and `-o FILE` and `-oFILE`, `--name=value` and
//! `--name value`, values that are optional only when attached, long names abbreviated as long as they are
//! unambiguous.
//!
//! A general parser was tried on paper and rejected: none has values that are optional *and* attached to a
//! short option (`-v`, `-vvvv`, `-v4`, `-x10,11`).

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use super::options::{self, Opt, Takes};

/// One option as it was given.
#[derive(Debug)]
pub struct Given {
    /// The definition.
    pub opt: &'static Opt,
    /// What was given with it.
    pub value: Value,
}

/// What was given with an option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// `--no-NAME`.
    Off,
    /// The option alone.
    On,
    /// The option with a value.
    Text(OsString),
}

/// Options and other words, each in the order given.
#[derive(Debug, Default)]
pub struct Split {
    /// The options.
    pub options: Vec<Given>,
    /// Everything else.
    pub words: Vec<OsString>,
}

/// Splits `args`, which do not include the program's name. The error is one line.
pub fn split(args: &[OsString]) -> Result<Split, String> {
    let mut out = Split::default();
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let bytes = arg.as_bytes();
        if bytes == b"--" {
            out.words.extend(args.cloned());
            break;
        } else if let Some(long) = bytes.strip_prefix(b"--") {
            out.options.push(long_option(long, &mut args)?);
        } else if bytes.len() > 1 && bytes[0] == b'-' {
            short_options(&bytes[1..], &mut args, &mut out.options)?;
        } else {
            out.words.push(arg.clone());
        }
    }
    Ok(out)
}

fn long_option<'a>(text: &[u8], rest: &mut impl Iterator<Item = &'a OsString>) -> Result<Given, String> {
    let (name, attached) = match text.iter().position(|b| *b == b'=') {
        Some(at) => (&text[..at], Some(OsString::from_vec(text[at + 1..].to_vec()))),
        None => (text, None),
    };
    let name = String::from_utf8_lossy(name);
    let (opt, negated) = find_long(&name)?;
    let value = match (opt.takes, attached) {
        (Takes::Nothing | Takes::Switch, Some(_)) => return Err(format!("--{name} takes no value")),
        (Takes::Nothing | Takes::Switch, None) if negated => Value::Off,
        (Takes::Nothing | Takes::Switch, None) => Value::On,
        (Takes::Maybe(_), attached) => attached.map_or(Value::On, Value::Text),
        (Takes::One(_), Some(value)) => Value::Text(value),
        (Takes::One(what), None) => match rest.next() {
            Some(value) => Value::Text(value.clone()),
            None => return Err(format!("--{} needs a value: {what}", opt.long)),
        },
    };
    Ok(Given { opt, value })
}

/// The option that `name` is or abbreviates, and whether in its `no-` form.
fn find_long(name: &str) -> Result<(&'static Opt, bool), String> {
    let mut candidates: Vec<(&'static Opt, bool)> = Vec::new();
    for opt in options::all() {
        for negated in [false, true] {
            let Some(full) = opt.long_form(negated) else { continue };
            if full == name {
                return Ok((opt, negated));
            }
            if full.starts_with(name) {
                candidates.push((opt, negated));
            }
        }
    }
    match candidates.as_slice() {
        [] => Err(format!("unknown option --{name}")),
        [one] => Ok(*one),
        many => {
            let names: Vec<_> =
                many.iter().filter_map(|(o, n)| o.long_form(*n)).map(|n| format!("--{n}")).collect();
            Err(format!("--{name} may be any of {}", names.join(", ")))
        }
    }
}

fn short_options<'a>(
    mut text: &[u8],
    rest: &mut impl Iterator<Item = &'a OsString>,
    out: &mut Vec<Given>,
) -> Result<(), String> {
    while let [letter, tail @ ..] = text {
        let letter = char::from(*letter);
        let opt = options::all()
            .find(|o| o.short == Some(letter))
            .ok_or_else(|| format!("unknown option -{letter}"))?;
        let attached = || OsStr::from_bytes(tail).to_owned();
        let value = match opt.takes {
            Takes::Nothing | Takes::Switch => {
                out.push(Given { opt, value: Value::On });
                text = tail;
                continue;
            }
            Takes::Maybe(_) if tail.is_empty() => Value::On,
            Takes::Maybe(_) => Value::Text(attached()),
            Takes::One(_) if !tail.is_empty() => Value::Text(attached()),
            Takes::One(what) => match rest.next() {
                Some(value) => Value::Text(value.clone()),
                None => return Err(format!("-{letter} needs a value: {what}")),
            },
        };
        out.push(Given { opt, value });
        break;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn show(args: &[&str]) -> Result<String, String> {
        let args: Vec<OsString> = args.iter().map(OsString::from).collect();
        let split = split(&args)?;
        let mut words: Vec<String> = split
            .options
            .iter()
            .map(|g| match &g.value {
                Value::On => g.opt.long.to_string(),
                Value::Off => format!("!{}", g.opt.long),
                Value::Text(v) => format!("{}={}", g.opt.long, v.to_string_lossy()),
            })
            .collect();
        words.extend(split.words.iter().map(|w| format!("[{}]", w.to_string_lossy())));
        Ok(words.join(" "))
    }

    #[test]
    fn options_may_stand_anywhere() {
        assert_eq!(show(&["-t", "1", "dump", "-D", "x"]).unwrap(), "tree=1 images-dir=x [dump]");
        assert_eq!(show(&["dump", "--tree=1"]).unwrap(), "tree=1 [dump]");
    }

    #[test]
    fn short_options_bundle_and_take_attached_values() {
        assert_eq!(show(&["-dSt5"]).unwrap(), "restore-detached restore-sibling tree=5");
        assert_eq!(show(&["-Ddir"]).unwrap(), "images-dir=dir");
    }

    #[test]
    fn optional_values_are_attached_only() {
        assert_eq!(show(&["-v4"]).unwrap(), "verbosity=4");
        assert_eq!(show(&["-vvvv"]).unwrap(), "verbosity=vvv");
        assert_eq!(show(&["-v", "4"]).unwrap(), "verbosity [4]");
        assert_eq!(
            show(&["--verbosity=3", "-x", "-x7,8"]).unwrap(),
            "verbosity=3 ext-unix-sk ext-unix-sk=7,8"
        );
        assert_eq!(show(&["--manage-cgroups", "full"]).unwrap(), "manage-cgroups [full]");
    }

    #[test]
    fn long_names_may_be_abbreviated_when_unambiguous() {
        assert_eq!(show(&["--leave-r"]).unwrap(), "leave-running");
        assert_eq!(show(&["--no-tcp-e"]).unwrap(), "!tcp-established");
        let e = show(&["--leave"]).unwrap_err();
        assert!(e.contains("--leave-running") && e.contains("--leave-stopped"), "{e}");
        // An exact name wins over longer ones that start with it.
        assert_eq!(show(&["--tls"]).unwrap(), "tls");
    }

    #[test]
    fn two_dashes_end_the_options() {
        assert_eq!(
            show(&["restore", "--exec-cmd", "--", "ls", "-l"]).unwrap(),
            "exec-cmd [restore] [ls] [-l]"
        );
        assert_eq!(show(&["-"]).unwrap(), "[-]");
    }

    #[test]
    fn mistakes_are_named() {
        assert_eq!(show(&["--frobnicate"]).unwrap_err(), "unknown option --frobnicate");
        assert_eq!(show(&["-q"]).unwrap_err(), "unknown option -q");
        assert_eq!(show(&["--tree"]).unwrap_err(), "--tree needs a value: PID");
        assert_eq!(show(&["-t"]).unwrap_err(), "-t needs a value: PID");
        assert_eq!(show(&["--shell-job=1"]).unwrap_err(), "--shell-job takes no value");
    }
}
