//! Runs the cases: each in a process of its own ([`crate::enclosure`]), counted as passed, failed or skipped
//! with its reason.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use nix::unistd::{Pid, Uid};

use crate::enclosure::enclosed;
use crate::events::PidFd;

/// Exit status of a case that could not run here; its last line is the reason.
pub(crate) const SKIPPED: u8 = 77;
/// Internal argument: run one case in this process.
const ONE: &str = "--run-one";

/// A case: a sentence and what must hold.
pub struct Case {
    name: String,
    pub(crate) body: Box<dyn Fn() -> Result<()> + Send + Sync>,
    limit: Duration,
    alone: bool,
    root: bool,
}

impl Case {
    /// A case that needs root, as everything that touches other processes does.
    pub fn new(name: impl Into<String>, body: impl Fn() -> Result<()> + Send + Sync + 'static) -> Case {
        let (limit, alone, root) = (Duration::from_secs(120), false, true);
        Case { name: name.into(), body: Box::new(body), limit, alone, root }
    }

    /// Runs when no other case does: it fills memory, threads or disks.
    pub fn alone(mut self) -> Case {
        self.alone = true;
        self
    }

    /// Runs for any user.
    pub fn for_anyone(mut self) -> Case {
        self.root = false;
        self
    }

    /// May take this long before it is killed and counted as failed.
    pub fn within(mut self, limit: Duration) -> Case {
        self.limit = limit;
        self
    }
}

/// Why a case cannot run here.
#[derive(Debug)]
pub struct Skip(pub String);

impl std::fmt::Display for Skip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// The error that makes a case count as skipped: `return Err(skip("needs python3"))`.
pub fn skip(why: impl Into<String>) -> anyhow::Error {
    Skip(why.into()).into()
}

enum Verdict {
    Passed,
    Skipped(String),
    Failed(String),
}

struct Arguments {
    filters: Vec<String>,
    skips: Vec<String>,
    exact: bool,
    list: bool,
    threads: usize,
}

fn arguments() -> Arguments {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let mut a =
        Arguments { filters: vec![], skips: vec![], exact: false, list: false, threads: cores.min(4) };
    let mut rest = std::env::args().skip(1);
    while let Some(arg) = rest.next() {
        let (key, inline) = match arg.split_once('=') {
            Some((k, v)) if k.starts_with("--") => (k.to_string(), Some(v.to_string())),
            _ => (arg.clone(), None),
        };
        match key.as_str() {
            "--exact" => a.exact = true,
            "--list" => a.list = true,
            "--skip" => a.skips.extend(inline.or_else(|| rest.next())),
            "--test-threads" => {
                a.threads = inline.or_else(|| rest.next()).and_then(|n| n.parse().ok()).unwrap_or(1).max(1);
            }
            "--format" | "--color" | "-Z" | "--report-time" if inline.is_none() => drop(rest.next()),
            flag if flag.starts_with('-') => {}
            _ => a.filters.push(arg),
        }
    }
    a
}

/// The whole of the test binary's main.
pub fn main(cases: Vec<Case>, prepare: fn() -> Result<()>) -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    if args.get(1).is_some_and(|a| a == ONE) {
        return match cases.iter().find(|c| Some(&c.name) == args.get(2)) {
            Some(case) => enclosed(case),
            None => ExitCode::FAILURE,
        };
    }
    let arguments = arguments();
    let wanted = |name: &str| {
        let hit = |f: &String| if arguments.exact { name == f } else { name.contains(f.as_str()) };
        (arguments.filters.is_empty() || arguments.filters.iter().any(hit))
            && !arguments.skips.iter().any(hit)
    };
    let chosen: Vec<&Case> = cases.iter().filter(|c| wanted(&c.name)).collect();
    if arguments.list {
        chosen.iter().for_each(|c| println!("{}: test", c.name));
        println!("\n{} tests, 0 benchmarks", chosen.len());
        return ExitCode::SUCCESS;
    }
    if let Err(e) = if chosen.is_empty() { Ok(()) } else { prepare() } {
        eprintln!("the cases can't start: {e:#}");
        return ExitCode::FAILURE;
    }
    println!("\nrunning {} cases", chosen.len());
    let (alone, together): (Vec<&Case>, Vec<&Case>) = chosen.into_iter().partition(|c| c.alone);
    let tally = Mutex::new(Tally::default());
    run_all(&together, arguments.threads, &tally);
    run_all(&alone, 1, &tally);
    let tally = tally.into_inner().unwrap_or_else(|e| e.into_inner());
    tally.print();
    if tally.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Cases that are known to fail, with the reason: `words of the name | why`, one a line. They are run, named
/// and counted, but do not fail the run; one that passes is reported, so that its line goes.
const KNOWN: &str = include_str!("../known-failures.txt");

fn known(name: &str) -> Option<&'static str> {
    let rows = KNOWN.lines().filter(|l| !l.starts_with('#'));
    rows.filter_map(|l| l.split_once(" | "))
        .find(|(words, _)| name.contains(words.trim()))
        .map(|(_, why)| why)
}

#[derive(Default)]
struct Tally {
    passed: usize,
    known: Vec<(String, &'static str)>,
    failed: Vec<(String, String)>,
    skipped: BTreeMap<String, Vec<String>>,
}

impl Tally {
    fn print(&self) {
        for (name, why) in &self.failed {
            println!("\n---- {name} ----\n{}", why.trim_end());
        }
        if !self.failed.is_empty() {
            println!("\nfailures:");
            self.failed.iter().for_each(|(name, _)| println!("    {name}"));
        }
        if !self.known.is_empty() {
            println!("\nknown failures:");
            self.known.iter().for_each(|(name, why)| println!("    {name}: {why}"));
        }
        let skipped: usize = self.skipped.values().map(Vec::len).sum();
        if skipped > 0 {
            println!("\nskipped:");
            for (why, names) in &self.skipped {
                println!("  {:4}  {why}", names.len());
            }
        }
        let verdict = if self.failed.is_empty() { "ok" } else { "FAILED" };
        println!(
            "\ncases: {verdict}. {} passed; {} failed; {} known to fail; {skipped} skipped\n",
            self.passed,
            self.failed.len(),
            self.known.len()
        );
    }
}

fn run_all(cases: &[&Case], threads: usize, tally: &Mutex<Tally>) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..threads.min(cases.len()) {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let start = Instant::now();
                    let verdict = spawn(case);
                    let took = start.elapsed().as_millis();
                    let mut tally = tally.lock().unwrap_or_else(|e| e.into_inner());
                    match verdict {
                        Verdict::Passed => {
                            println!("{} ... ok ({took} ms)", case.name);
                            tally.passed += 1;
                        }
                        Verdict::Skipped(why) => {
                            println!("{} ... skipped: {why}", case.name);
                            tally.skipped.entry(why).or_default().push(case.name.clone());
                        }
                        Verdict::Failed(out) => match known(&case.name) {
                            Some(why) => {
                                println!("{} ... known failure: {why}", case.name);
                                tally.known.push((case.name.clone(), why));
                            }
                            None => {
                                println!("{} ... FAILED", case.name);
                                tally.failed.push((case.name.clone(), out));
                            }
                        },
                    }
                }
            });
        }
    });
}

fn spawn(case: &Case) -> Verdict {
    if case.root && !Uid::effective().is_root() {
        return Verdict::Skipped("needs root".into());
    }
    match output_of(case) {
        Err(e) => Verdict::Failed(format!("{e:#}")),
        Ok((Some(0), _)) => Verdict::Passed,
        Ok((Some(code), out)) if code == i32::from(SKIPPED) => {
            Verdict::Skipped(out.lines().last().unwrap_or("no reason given").to_string())
        }
        Ok((_, out)) => Verdict::Failed(out),
    }
}

/// Exit code (None: killed) and output of a case run in a child.
fn output_of(case: &Case) -> Result<(Option<i32>, String)> {
    // What the case makes is made below this folder, which goes even when the case is killed.
    let scratch = tempfile::Builder::new().prefix("rcriu-case.").tempdir().context("scratch folder")?;
    // Programs that give up root pass through it.
    fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o755)).context("chmod")?;
    let (mut reader, writer) = std::io::pipe().context("pipe")?;
    let mut child = Command::new(std::env::current_exe()?)
        .args([ONE, &case.name])
        .env("TMPDIR", scratch.path())
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .spawn()
        .context("starting the case")?;
    let pidfd = PidFd::open(Pid::from_raw(child.id() as i32)).context("pidfd_open")?;
    std::thread::scope(|scope| {
        let late = scope.spawn(move || {
            let late = pidfd.wait_dead(case.limit).is_err();
            if late {
                pidfd.kill(Signal::SIGKILL);
            }
            late
        });
        // The pipe is at its end only when the last process of the case is gone.
        let mut out = Vec::new();
        let read = reader.read_to_end(&mut out);
        let status = child.wait().context("waiting for the case")?;
        read.context("reading the case's output")?;
        let mut out = String::from_utf8_lossy(&out).into_owned();
        if late.join().unwrap_or(false) {
            out += &format!("\nkilled: it took more than {:?}", case.limit);
        }
        Ok((status.code(), out))
    })
}
