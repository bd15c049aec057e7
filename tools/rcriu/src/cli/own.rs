//! Commands that CRIU does not have. Each gets the words after its name and parses them itself.

use std::ffi::OsString;
use std::io::Write as _;
use std::process::ExitCode;

use super::help;
use crate::demo;

/// One such command.
pub struct Own {
    /// As typed, as the first word.
    pub name: &'static str,
    /// One line for help; empty if it is not for people.
    pub help: &'static str,
    /// Does it.
    pub run: fn(&[OsString]) -> ExitCode,
}

/// All of them.
pub const ALL: &[Own] = &[
    Own { name: "demo", help: "See a program frozen, saved and brought back", run: demo::run },
    Own { name: demo::PROGRAM, help: "", run: demo::program },
    Own { name: "show", help: "Print what is in images", run: crate::show::command },
    Own { name: "man", help: "Print the man page", run: man },
    Own {
        name: "completions",
        help: "Print completions for bash, zsh, fish, elvish, powershell",
        run: completions,
    },
];

/// Those that help lists.
pub fn listed() -> impl Iterator<Item = &'static Own> {
    ALL.iter().filter(|own| !own.help.is_empty())
}

fn man(_: &[OsString]) -> ExitCode {
    match help::man() {
        Ok(page) => print(&page),
        Err(e) => fail(&e.to_string()),
    }
}

fn completions(args: &[OsString]) -> ExitCode {
    let shell = args.first().and_then(|a| a.to_str()).map(str::parse::<clap_complete::Shell>);
    match shell {
        Some(Ok(shell)) => print(&help::completions(shell)),
        _ => fail("completions needs the name of a shell: bash, zsh, fish, elvish or powershell"),
    }
}

fn print(text: &[u8]) -> ExitCode {
    match std::io::stdout().write_all(text) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn fail(why: &str) -> ExitCode {
    eprintln!("rcriu: {why}");
    ExitCode::FAILURE
}
