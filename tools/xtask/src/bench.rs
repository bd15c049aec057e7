//! Measures dump and restore of programs from tests/programs, and of another binary in turn, and prints
//! medians and ratios as a table for the README.
//!
//! Each round starts the program anew, dumps it with one binary, restores it, and has it verify: a figure of
//! a restore that lost something is worth nothing.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rcriu_images::ImageKind;
use rcriu_images::frame::EntryReader;
use rcriu_images::pb::StatsEntry;
use rcriu_tests::program::wait_gone;
use rcriu_tests::{Engine, Images, Program};

use crate::prepush::cargo;
use crate::root;

#[derive(clap::Args)]
pub struct Options {
    /// Another binary with the same command line, measured in turn
    #[arg(long, value_name = "BIN")]
    peer: Option<PathBuf>,
    /// Rounds of each row
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Only rows whose name contains this
    #[arg(long, default_value = "")]
    only: String,
    /// The release binaries are built already
    #[arg(long, hide = true)]
    built: bool,
}

/// Name of a row, the program and its arguments.
const ROWS: &[(&str, &str, &[&str])] = &[
    ("smallest process", "sleeper", &[]),
    ("1 GiB of random memory", "random-memory", &["1024"]),
    ("200 processes", "tree", &["10", "20"]),
    ("1,000 threads", "threads", &["1000"]),
    ("10,000 descriptors", "many-descriptors", &["10000"]),
    ("100,000 mappings", "many-mappings", &["100000"]),
];

/// One round's figures.
#[derive(Clone, Copy)]
struct Figures {
    dump: Duration,
    restore: Duration,
    frozen: Duration,
    bytes: u64,
}

fn timed(engine: &Engine, args: &[&str]) -> Result<Duration> {
    let start = Instant::now();
    engine.run(args)?.ok()?;
    Ok(start.elapsed())
}

/// Microseconds that the tree was frozen, as the dump's own statistics say.
fn frozen(images: &Images) -> Result<Duration> {
    let file = fs::File::open(images.file("stats-dump")).context("stats-dump")?;
    let mut reader = EntryReader::new(file, "stats-dump", None);
    reader.header(ImageKind::StatsDump)?;
    let stats: StatsEntry = reader.one()?;
    Ok(Duration::from_micros(stats.dump.map_or(0, |d| u64::from(d.frozen_time))))
}

fn round(engine: &Engine, kind: &str, args: &[&str]) -> Result<Figures> {
    let program = Program::start(kind, args)?;
    let images = Images::new()?;
    let (dir, pid) = (images.as_str()?, program.pid().to_string());
    let tree = program.tree()?;
    let dump = timed(engine, &["dump", "-t", &pid, "-D", dir, "-o", "dump.log"])?;
    wait_gone(&tree)?;
    let mut bytes = 0;
    for entry in fs::read_dir(images.path())? {
        bytes += entry?.metadata()?.len();
    }
    let restore = timed(engine, &["restore", "-d", "-D", dir, "-o", "restore.log"])?;
    let frozen = frozen(&images)?;
    program.verify()?;
    Ok(Figures { dump, restore, frozen, bytes })
}

fn median<T: Ord + Copy>(mut values: Vec<T>) -> Option<T> {
    values.sort();
    values.get(values.len() / 2).copied()
}

fn medians(rounds: &[Figures]) -> Option<Figures> {
    Some(Figures {
        dump: median(rounds.iter().map(|f| f.dump).collect())?,
        restore: median(rounds.iter().map(|f| f.restore).collect())?,
        frozen: median(rounds.iter().map(|f| f.frozen).collect())?,
        bytes: median(rounds.iter().map(|f| f.bytes).collect())?,
    })
}

fn milliseconds(d: Duration) -> String {
    format!("{:.1}", d.as_secs_f64() * 1000.0)
}

fn ratio(ours: Duration, theirs: Duration) -> String {
    if theirs.is_zero() { "-".into() } else { format!("{:.2}", ours.as_secs_f64() / theirs.as_secs_f64()) }
}

fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo
        .lines()
        .find_map(|l| l.strip_prefix("model name"))
        .unwrap_or("")
        .trim_start_matches(['\t', ':', ' ']);
    let cores = std::thread::available_parallelism().map_or(0, |n| n.get());
    format!("{model}, {cores} cores, Linux {}", read("/proc/sys/kernel/osrelease").trim())
}

pub fn run(options: &Options) -> Result<()> {
    if !options.built {
        cargo(&[
            "build",
            "--release",
            "--quiet",
            "--package",
            "rcriu",
            "--package",
            "rcriu-tests",
            "--package",
            "xtask",
        ])?;
        let target =
            std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
        let error = Command::new(target.join("release/xtask"))
            .args(std::env::args_os().skip(1))
            .arg("--built")
            .exec();
        bail!("exec of the release build: {error}");
    }
    nix::sys::prctl::set_child_subreaper(true).context("PR_SET_CHILD_SUBREAPER")?;
    let ours = Engine::rcriu()?;
    let peer = options.peer.as_deref().map(Engine::at).transpose()?;
    println!(
        "{}; medians of {} rounds, milliseconds; ratio: ours by the other's\n",
        machine(),
        options.rounds
    );
    println!(
        "| program | dump | restore | frozen | MiB | dump, peer | restore, peer | frozen, peer | ratio dump | ratio restore | ratio frozen |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    for (name, kind, args) in ROWS.iter().filter(|row| row.0.contains(&options.only)) {
        match row(&ours, peer.as_ref(), kind, args, options.rounds) {
            Ok(cells) => println!("| {name} | {} |", cells.join(" | ")),
            Err(e) => println!("| {name} | {} |", format!("{e:#}").lines().next().unwrap_or("")),
        }
    }
    Ok(())
}

/// Measures both binaries in turn, so that what the machine does meanwhile meets both.
fn row(
    ours: &Engine,
    peer: Option<&Engine>,
    kind: &str,
    args: &[&str],
    rounds: usize,
) -> Result<Vec<String>> {
    let (mut mine, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..rounds.max(1) {
        mine.push(round(ours, kind, args)?);
        if let Some(peer) = peer {
            theirs.push(round(peer, kind, args));
        }
    }
    let mine = medians(&mine).context("no rounds")?;
    let mib = format!("{:.1}", mine.bytes as f64 / f64::from(1 << 20));
    let mut cells = vec![milliseconds(mine.dump), milliseconds(mine.restore), milliseconds(mine.frozen), mib];
    let theirs: Result<Vec<Figures>> = theirs.into_iter().collect();
    match theirs.map(|t| medians(&t)) {
        Ok(Some(t)) => cells.extend([
            milliseconds(t.dump),
            milliseconds(t.restore),
            milliseconds(t.frozen),
            ratio(mine.dump, t.dump),
            ratio(mine.restore, t.restore),
            ratio(mine.frozen, t.frozen),
        ]),
        Ok(None) => cells.extend(["-"; 6].map(String::from)),
        Err(_) => cells.extend(["fails", "fails", "fails", "-", "-", "-"].map(String::from)),
    }
    Ok(cells)
}
