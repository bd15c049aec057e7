//! Measures dump and restore of programs from tests/programs, and of another binary in turn, and prints
//! medians and ratios as a table for the README.
//!
//! ```text
//! rows     what is measured: one entry per line of the table
//! measure  one round: start a program, dump it, restore it, have it verify
//! limit    what the machine can do at best with as many bytes, in the same run
//! table    medians and ratios, as Markdown
//! watch    the process above, which leaves nothing behind
//! ```
//!
//! Each round ends with the restored program checking itself: a figure of a restore that lost something is
//! worth nothing. Both binaries take turns, so that what else the machine does meets both.

mod limit;
mod measure;
mod rows;
mod table;
mod watch;

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use rcriu_tests::Engine;

use self::measure::Round;
use self::rows::{ROWS, Row};
use self::table::Line;
use crate::dist;
use crate::prepush::cargo;
use crate::root;

/// What is measured, unless RCRIU_BIN names another.
const INSTALLED: dist::Options = dist::Options { dev: false };

#[derive(clap::Args)]
pub struct Options {
    /// Another binary with the same command line, measured in turn
    #[arg(long, value_name = "BIN")]
    peer: Option<PathBuf>,
    /// Rounds of each row
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Only rows whose name contains one of these words, separated by commas
    #[arg(long, value_name = "WORDS", default_value = "")]
    rows: String,
    /// One round, and no row that takes long
    #[arg(long)]
    quick: bool,
    /// Show every round, with processor time, on stderr
    #[arg(long)]
    each: bool,
    /// The release binaries are built already
    #[arg(long, hide = true)]
    built: bool,
    /// Somebody cleans up behind this process
    #[arg(long, hide = true)]
    watched: bool,
}

impl Options {
    fn wants(&self, row: &Row) -> bool {
        (self.rows.is_empty() || self.rows.split(',').any(|word| row.name.contains(word.trim())))
            && !(self.quick && row.long)
    }

    fn rounds(&self, row: &Row) -> usize {
        match (self.quick, row.long) {
            (true, _) => 1,
            // The longest rows differ least from round to round.
            (_, true) => self.rounds.div_ceil(2),
            _ => self.rounds.max(1),
        }
    }
}

/// Builds the binary to install and what measures it, and starts over as that.
fn build() -> Result<()> {
    dist::build(&INSTALLED)?;
    let packages = ["--package", "rcriu-tests", "--package", "xtask"];
    cargo(&[&["build", "--release", "--quiet"][..], &packages].concat())?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    let error =
        Command::new(target.join("release/xtask")).args(std::env::args_os().skip(1)).arg("--built").exec();
    bail!("exec of the release build: {error}");
}

pub fn run(options: &Options) -> Result<()> {
    if !options.built {
        return build();
    }
    if !options.watched {
        return watch::run();
    }
    watch::watched()?;
    nix::sys::prctl::set_child_subreaper(true).context("PR_SET_CHILD_SUBREAPER")?;
    let other = std::env::var_os("RCRIU_BIN").map(PathBuf::from);
    let ours = Engine::at(&other.unwrap_or_else(|| dist::path(&INSTALLED)))?;
    let peer = options.peer.as_deref().map(Engine::at).transpose()?;
    println!("{}", table::head(options.rounds));
    let mut lines: Vec<Line> = Vec::new();
    for row in ROWS.iter().filter(|row| options.wants(row)) {
        let line = match line(&ours, peer.as_ref(), row, options) {
            Ok(line) => line,
            Err(e) => {
                println!("| {} | {} |", row.name, table::reason(&e));
                continue;
            }
        };
        println!("{}", line.text());
        lines.push(line);
    }
    println!("{}", table::growth(&lines));
    Ok(())
}

/// Measures both binaries in turn.
fn line(ours: &Engine, peer: Option<&Engine>, row: &'static Row, options: &Options) -> Result<Line> {
    let (mut mine, mut theirs, mut limits) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..options.rounds(row) {
        let show = |who: &str, round: &Result<Round>| {
            if options.each {
                eprintln!("{} #{number} {who}: {}", row.name, table::each(round));
            }
        };
        let round = (row.measure)(ours, row, false);
        show("ours", &round);
        mine.push(round?);
        if let Some(peer) = peer.filter(|_| row.peer) {
            let round = (row.measure)(peer, row, true);
            show("peer", &round);
            theirs.push(round);
        }
        if row.mib > 0 {
            limits.push(limit::measure(row.mib, row.cold)?);
        }
    }
    // A peer that cannot do a row does not keep us from telling our figures.
    let theirs: Result<Vec<Round>> = theirs.into_iter().collect();
    Ok(Line::new(row, &mine, theirs, &limits))
}
