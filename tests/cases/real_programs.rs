//! Programs as people run them: python, a shell's pipeline, redis, big trees and many threads, many turns.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use rcriu_tests::cycle::compare;
use rcriu_tests::events::{PATIENCE, wait_file};
use rcriu_tests::{Case, Cycle, Engine, Images, Program, skip};

use crate::interop::crit_reads;

/// The path of an installed program, or a skip that names the package.
fn installed(name: &str, package: &str) -> Result<String> {
    // Tests of the distribution's own build: a version manager's shim is a shell script that execs later.
    let found = ["/usr/bin", "/usr/local/bin", "/bin"].iter().map(|d| format!("{d}/{name}"));
    found
        .into_iter()
        .find(|p| Path::new(p).exists())
        .ok_or_else(|| skip(format!("{name} ({package}) is not installed")))
}

/// Fills a dictionary, counts in threads, and answers a sum when a file asks for it.
const PYTHON: &str = r#"
import threading, time, os, signal, sys
size = int(sys.argv[1])
d = {i: bytes([i % 251]) * 1000 for i in range(size)}
counts = [0] * 4
def count(i):
    while True:
        counts[i] += 1
        time.sleep(0.001)
for i in range(4):
    threading.Thread(target=count, args=(i,), daemon=True).start()
asked = threading.Event()
signal.signal(signal.SIGUSR1, lambda *a: asked.set())
print("READY", flush=True)
n = 0
while True:
    asked.wait()
    asked.clear()
    before = list(counts)
    while any(c <= b for c, b in zip(counts, before)):
        time.sleep(0.001)
    n += 1
    print("ANSWER", n, len(d), sum(v[0] for v in d.values()), flush=True)
"#;

/// Asks the python program through a signal and waits for its answer number `n`.
fn python_answers(program: &Program, n: usize, entries: usize) -> Result<()> {
    let sum: usize = (0..entries).map(|i| i % 251).sum();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(program.pid()), Signal::SIGUSR1).context("kill")?;
    program.wait_line(&format!("ANSWER {n} {entries} {sum}"))
}

fn python(cycle: &Cycle, entries: usize, turns: usize) -> Result<()> {
    let mut command = Command::new(installed("python3", "package python3")?);
    command.args(["-c", PYTHON, &entries.to_string()]);
    let program = Program::spawn(command)?;
    program.wait_line("READY")?;
    python_answers(&program, 1, entries)?;
    for turn in 1..=turns {
        let images = Images::new()?;
        let before = program.state()?.without(changing);
        cycle.dump(&program, &images)?;
        cycle.restore(&images)?;
        compare(&before, &program.state()?.without(changing))?;
        python_answers(&program, turn + 1, entries)?;
    }
    Ok(())
}

/// What a running program changes by itself: sizes of memory, where it reads and writes.
fn changing(key: &str) -> bool {
    key.ends_with(" memory") || key.contains("SigPnd") || key.contains("ShdPnd") || key.ends_with(" info")
}

fn shell_pipeline(cycle: &Cycle) -> Result<()> {
    let mut command = Command::new("/bin/bash");
    // A producer that waits for each request, a filter, and a consumer. The FIFO always has a writer, or a request
    // that is closed late would be the end; what the producer says last, it says when its child is gone.
    let script = "mkfifo ask; exec 3<>ask; echo READY; \
                  while read -r n <&3; do seq $n; echo end $n; done | \
                  sed -u 's/^/line /' | while read -r l; do echo got $l; done";
    command.args(["-c", script]);
    let program = Program::spawn(command)?;
    program.wait_line("READY")?;
    let ask = |n: usize| std::fs::write(program.dir().join("ask"), format!("{n}\n")).context("asking");
    ask(3)?;
    program.wait_line("got line end 3")?;
    for n in [5, 7] {
        cycle.turn(&program)?;
        ask(n)?;
        program.wait_line(&format!("got line end {n}"))?;
        let lines = (1..=n).all(|i| program.output().matches(&format!("got line {i}\n")).count() >= 1);
        ensure!(lines, "lines are missing: {}", program.output());
    }
    Ok(())
}

fn redis(cycle: &Cycle) -> Result<()> {
    let mut command = Command::new(installed("redis-server", "package redis-server")?);
    command.args(["--port", "0", "--unixsocket", "socket", "--save", "", "--appendonly", "no"]);
    let program = Program::spawn(command)?;
    let at = program.dir().join("socket");
    ensure!(
        wait_file(program.dir(), None, PATIENCE, || UnixStream::connect(&at).is_ok())?,
        "redis does not start"
    );
    let ask = |what: &str| -> Result<String> {
        let mut stream = UnixStream::connect(&at).context("connecting to redis")?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        stream.write_all(format!("{what}\r\nQUIT\r\n").as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).context("reading redis's answer")?;
        Ok(answer)
    };
    ensure!(ask("SET key before")?.starts_with("+OK"), "redis does not take a value");
    let fill = ask("EVAL \"for i=1,10000 do redis.call('SET', 'k'..i, i) end return 'filled'\" 0")?;
    ensure!(fill.contains("filled"), "redis does not fill itself: {fill}");
    let images = Images::new()?;
    let before = program.state()?.without(changing);
    cycle.dump(&program, &images)?;
    cycle.restore(&images)?;
    compare(&before, &program.state()?.without(changing))?;
    let answer = ask("GET key")?;
    ensure!(answer.contains("before"), "redis has lost its value: {answer}");
    ensure!(ask("DBSIZE")?.starts_with(":10001"), "redis has lost keys");
    ensure!(ask("SET key after")?.starts_with("+OK"), "redis does not take a value any more");
    Ok(())
}

fn checked(cycle: &Cycle, kind: &str, args: &[&str], turns: usize) -> Result<()> {
    let program = Program::start(kind, args)?;
    for turn in 1..=turns {
        cycle.turn(&program).with_context(|| format!("turn {turn}"))?;
    }
    program.verify()
}

type Run = fn(&Cycle) -> Result<()>;

const PROGRAMS: &[(&str, Run)] = &[
    ("a python with threads and 200 MB goes on", |c| python(c, 200_000, 2)),
    ("a pipeline of bash goes on", shell_pipeline),
    ("redis keeps what it holds", redis),
    ("a tree of 200 processes with sessions goes on", |c| checked(c, "tree", &["10", "20"], 1)),
    ("a thousand threads go on", |c| checked(c, "threads", &["1000"], 1)),
];

pub fn cases() -> Vec<Case> {
    let limit = Duration::from_secs(300);
    let mut cases: Vec<Case> = PROGRAMS
        .iter()
        .map(|(name, run)| {
            Case::new(format!("real programs: {name}"), move || run(&Cycle::new()?)).alone().within(limit)
        })
        .collect();
    cases.push(
        Case::new("real programs: twenty turns leave a tree of 200 processes equal", || {
            checked(&Cycle::new()?, "tree", &["10", "20"], 20)
        })
        .alone()
        .within(4 * limit),
    );
    cases
}

/// The same programs between the two engines; crit reads every image of ours.
pub fn interchange() -> Vec<Case> {
    let both = |(name, run): &(&'static str, Run)| {
        let (name, run) = (*name, *run);
        let case = |how: &str, ours_dumps: bool| {
            Case::new(format!("interop: {name}, {how}"), move || {
                let (ours, criu) = (Engine::rcriu()?, Engine::criu()?);
                let (dumper, restorer) = if ours_dumps { (ours, criu) } else { (criu, ours) };
                let cycle = Cycle::between(dumper, restorer);
                run(&if ours_dumps { cycle.checking(crit_reads) } else { cycle })
            })
            .alone()
            .within(Duration::from_secs(300))
        };
        [case("dumped by rcriu, restored by CRIU", true), case("dumped by CRIU, restored by rcriu", false)]
    };
    PROGRAMS.iter().flat_map(both).collect()
}
