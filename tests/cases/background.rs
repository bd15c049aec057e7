//! Dumps whose memory is copied while the tree runs again (`--background`).

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use rcriu_tests::cycle::unchanged;
use rcriu_tests::events::{PATIENCE, PidFd, wait_file};
use rcriu_tests::program::wait_gone;
use rcriu_tests::state::processes;
use rcriu_tests::{Case, Cycle, Engine, Images, Program};

const BACKGROUND: &[&str] = &["--leave-running", "--background"];

/// The program goes on unharmed, and so does what is restored once it is gone.
fn both_go_on(kind: &'static str, args: &'static [&'static str], steady: bool) -> Result<()> {
    let (program, images, cycle) = (Program::start(kind, args)?, Images::new()?, Cycle::new()?);
    let before = program.state()?;
    let all = processes()?.len();
    cycle.try_dump(program.pid(), &images, BACKGROUND)?.ok()?;
    if steady {
        unchanged(&before, || program.state()).context("the dump changed the tree that it left running")?;
    }
    no_copies(all)?;
    let tree = program.tree()?;
    tree.iter().for_each(|t| t.kill(Signal::SIGKILL));
    wait_gone(&tree)?;
    cycle.restore(&images)?;
    program.verify()
}

/// As many processes as before: no copy is left. One that has just ended is reaped by whoever adopts orphans.
fn no_copies(before: usize) -> Result<()> {
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        let now = processes()?.len();
        if now <= before {
            return Ok(());
        }
        while nix::sys::wait::waitpid(None, Some(nix::sys::wait::WaitPidFlag::WNOHANG))
            .is_ok_and(|s| s != nix::sys::wait::WaitStatus::StillAlive)
        {}
        ensure!(std::time::Instant::now() < deadline, "{now} processes instead of {before}");
        std::thread::yield_now();
    }
}

fn the_original_is_unharmed() -> Result<()> {
    let (program, images) = (Program::start("writer", &["64"])?, Images::new()?);
    let cycle = Cycle::new()?;
    for _ in 0..5 {
        cycle.try_dump(program.pid(), &images, BACKGROUND)?.ok()?;
    }
    program.verify()
}

/// More than this many MiB in small pages are protected, not copied.
const LARGE: &str = "160";
/// The same where part of it is always dropped.
const CHANGING: &str = "256";

/// A task with large memory is followed while that is read: it goes on unharmed, and what is restored is of one moment.
fn large_memory(kind: &'static str, args: &'static [&'static str]) -> Result<()> {
    let (program, images, cycle) = (Program::start(kind, args)?, Images::new()?, Cycle::new()?);
    let all = processes()?.len();
    protected_dump(&program, &images, &cycle)?;
    let tree = program.tree()?;
    let seccomp = std::fs::read_to_string(format!("/proc/{}/status", program.pid()))?;
    ensure!(seccomp.contains("TracerPid:\t0"), "it is still traced");
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", program.pid()))?;
    ensure!(!smaps.lines().any(|l| l.starts_with("VmFlags:") && l.contains(" uw ")), "it is still protected");
    if all < processes()?.len() {
        no_copies(all)?;
    }
    // Unharmed: it stands still for a moment only to be ended.
    tree.iter().for_each(|t| t.kill(Signal::SIGKILL));
    wait_gone(&tree)?;
    // A child that it had just made keeps the number of its group.
    while nix::sys::wait::waitpid(Pid::from_raw(-program.pid()), None).is_ok() {}
    cycle.restore(&images)?;
    program.verify()
}

fn large_original(kind: &'static str, args: &'static [&'static str]) -> Result<()> {
    let (program, cycle) = (Program::start(kind, args)?, Cycle::new()?);
    for _ in 0..2 {
        protected_dump(&program, &Images::new()?, &cycle)?;
    }
    program.verify()
}

/// Dumps until the memory was protected: what changes its place faster than that, or is small at the moment, is
/// copied by a fork, which is right too.
fn protected_dump(program: &Program, images: &Images, cycle: &Cycle) -> Result<()> {
    let mut log = String::new();
    for _ in 0..10 {
        cycle.try_dump(program.pid(), images, BACKGROUND)?.ok()?;
        log = std::fs::read_to_string(images.file("dump.log"))?;
        if log.lines().any(|l| l.contains(" is protected: ") || l.contains(" is given up: ")) {
            return Ok(());
        }
    }
    bail!("it was never protected: {log}")
}

fn says(images: &Images, words: &str) -> Result<()> {
    let log = std::fs::read_to_string(images.file("dump.log"))?;
    ensure!(log.contains(words), "the log does not say that it {words}: {log}");
    Ok(())
}

/// Without write protection the same memory is copied by fork.
fn large_without_protection() -> Result<()> {
    let (program, images) = (Program::start("writer", &[LARGE])?, Images::new()?);
    let pid = program.pid().to_string();
    let mut args = vec!["dump", "-t", &pid, "-D", images.as_str()?, "-v4", "-o", "dump.log"];
    args.extend(BACKGROUND);
    let engine = Engine::rcriu()?;
    let mut command = engine.command(&args);
    command.env("RCRIU_WITHOUT", "uffd_wp_async");
    engine.finish(command)?.ok()?;
    says(&images, "from copy")?;
    program.verify()
}

/// The program ends, is killed or executes another one while its memory is read: it does so, and the snapshot is
/// complete.
fn ends_meanwhile(kind: &str, how: Signal) -> Result<()> {
    let (program, images, cycle) = (Program::start(kind, &[LARGE])?, Images::new()?, Cycle::new()?);
    let pid = program.pid().to_string();
    let mut args = vec!["dump", "-t", &pid, "-D", images.as_str()?, "-v4", "-o", "dump.log"];
    args.extend(BACKGROUND);
    let target = PidFd::open(Pid::from_raw(program.pid())).context("pidfd_open")?;
    let engine = Engine::rcriu()?;
    let child = engine.command(&args).spawn().context("starting the dump")?;
    let dump = PidFd::open(Pid::from_raw(child.id() as i32)).context("pidfd_open")?;
    let writing = || images.names().is_ok_and(|n| n.iter().any(|n| n.starts_with("pages-")));
    ensure!(wait_file(images.path(), Some(&dump), PATIENCE, writing)?, "the dump ended too early");
    target.kill(how);
    let done = child.wait_with_output()?;
    ensure!(done.status.success(), "the dump failed: {}", String::from_utf8_lossy(&done.stderr));
    if how == Signal::SIGUSR1 {
        let again = || program.output().matches("READY").count() == 2;
        ensure!(wait_file(program.dir(), Some(&target), PATIENCE, again)?, "it has not become another");
        target.kill(Signal::SIGKILL);
    }
    target.wait_dead(PATIENCE).context("the program has not ended")?;
    target.reap();
    std::fs::write(program.dir().join("out"), "")?;
    cycle.restore(&images)?;
    program.verify()
}

/// The dumping process is killed while it copies: the program goes on, the copies end.
fn killed_while_copying() -> Result<()> {
    let (program, images) = (Program::start("writer", &["200"])?, Images::new()?);
    let all = processes()?.len();
    let pid = program.pid().to_string();
    let mut args = vec!["dump", "-t", &pid, "-D", images.as_str()?, "-v4", "-o", "dump.log"];
    args.extend(BACKGROUND);
    let mut child = Engine::rcriu()?.command(&args).spawn().context("starting the dump")?;
    let pidfd = PidFd::open(Pid::from_raw(child.id() as i32)).context("pidfd_open")?;
    let writing = || images.names().is_ok_and(|n| n.iter().any(|n| n.starts_with("pages-")));
    ensure!(wait_file(images.path(), Some(&pidfd), PATIENCE, writing)?, "the dump ended too early");
    pidfd.kill(Signal::SIGKILL);
    child.wait()?;
    no_copies(all)?;
    ensure!(!images.file("inventory.img").exists(), "an unfinished set has an inventory");
    program.verify()
}

fn needs_a_running_tree() -> Result<()> {
    let (program, images) = (Program::start("sleeper", &[])?, Images::new()?);
    let cycle = Cycle::new()?;
    cycle.try_dump(program.pid(), &images, &["--background"])?.refused()?.says(&["--leave-running"])?;
    let track: Vec<&str> = BACKGROUND.iter().copied().chain(["--track-mem"]).collect();
    cycle.try_dump(program.pid(), &images, &track)?.refused()?.says(&["--track-mem"])?;
    program.verify()
}

/// What cannot be copied by a fork is copied while the tree is frozen, and the log says why.
fn what_cannot_fork() -> Result<()> {
    let (program, images) = (Program::start("private-memory", &[])?, Images::new()?);
    Cycle::new()?.try_dump(program.pid(), &images, BACKGROUND)?.ok()?;
    let log = std::fs::read_to_string(images.file("dump.log"))?;
    ensure!(log.contains("not inherited by children"), "the log does not say what was copied frozen: {log}");
    program.verify()
}

/// Tasks run before their memory is there; the command ends when all of it is, and says so.
fn restored_in_the_background(kind: &str, args: &[&str]) -> Result<()> {
    let (program, images, cycle) = (Program::start(kind, args)?, Images::new()?, Cycle::new()?);
    let all = processes()?.len();
    cycle.dump(&program, &images)?;
    let done = cycle.try_restore(&images, &["--background"])?.ok()?;
    ensure!(done.stdout.contains("All memory is in place"), "it says {:?}", done.stdout);
    no_copies(all)?;
    program.verify()
}

/// The process that fills memory is killed: the command fails, and the tasks are gone rather than find zeroes.
fn filler_killed() -> Result<()> {
    let (program, images, cycle) =
        (Program::start("random-memory", &["512"])?, Images::new()?, Cycle::new()?);
    cycle.dump(&program, &images)?;
    let args = ["restore", "-d", "--background", "-D", images.as_str()?, "-v4", "-o", "restore.log"];
    let mut command = Engine::rcriu()?.command(&args);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("restore")?;
    let mut line = String::new();
    let mut out = BufReader::new(child.stdout.take().context("no output")?);
    out.read_line(&mut line)?;
    ensure!(line.starts_with("Tasks run"), "it says {line:?}");
    let own = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id()))?;
    let root = program.pid().to_string();
    let filler = own.split_whitespace().find(|pid| **pid != *root).context("nobody fills memory")?;
    nix::sys::signal::kill(Pid::from_raw(filler.parse()?), Signal::SIGKILL)?;
    let tree = program.tree().unwrap_or_default();
    let done = child.wait_with_output()?;
    ensure!(!done.status.success(), "the restore succeeded");
    let why = String::from_utf8_lossy(&done.stderr);
    ensure!(why.contains("was killed") && why.contains("1 processes"), "it says {why}");
    wait_gone(&tree)
}

pub fn cases() -> Vec<Case> {
    let kinds: &[(&str, &[&str], bool)] = &[
        ("writer", &["64"], false),
        ("threads", &["12"], true),
        ("tree", &["3", "3"], true),
        ("private-memory", &[], true),
        ("file-memory", &[], true),
        ("shared-memory", &[], true),
        ("regular-files", &[], true),
        ("pipes", &[], true),
    ];
    let goes_on = kinds.iter().map(|(kind, args, steady)| {
        Case::new(format!("background: {kind} goes on, and what is restored too"), move || {
            both_go_on(kind, args, *steady)
        })
    });
    goes_on
        .chain([
            Case::new("background: a writer is dumped again and again", the_original_is_unharmed),
            Case::new("background: a kill while memory is copied does no harm", killed_while_copying),
            Case::new("background: random memory is restored behind a running task", || {
                restored_in_the_background("random-memory", &["64"])
            }),
            Case::new("background: tasks end when the process that fills their memory is killed", || {
                filler_killed()
            }),
            Case::new("background: a writer is restored behind its back", || {
                restored_in_the_background("writer", &["64"])
            }),
            Case::new("background: a tree is restored behind its back", || {
                restored_in_the_background("tree", &["3", "3"])
            }),
            Case::new("background: memory of a large writer is of one moment", || {
                large_memory("writer", &[LARGE])
            }),
            Case::new("background: large memory is of one moment however it is changed", || {
                large_memory("movers", &[CHANGING, "3"])
            }),
            Case::new("background: large memory of another user is of one moment", || {
                large_memory("movers", &[CHANGING, "2", "1000"])
            }),
            Case::new("background: large memory that changes in every way is unharmed", || {
                large_original("movers", &[CHANGING, "3"])
            }),
            Case::new(
                "background: large memory is copied where it cannot be protected",
                large_without_protection,
            ),
            Case::new("background: a large program may end meanwhile", || {
                ends_meanwhile("writer", Signal::SIGTERM)
            }),
            Case::new("background: a large program may be killed meanwhile", || {
                ends_meanwhile("writer", Signal::SIGKILL)
            }),
            Case::new("background: a large program may execute another one meanwhile", || {
                ends_meanwhile("changeling", Signal::SIGUSR1)
            }),
            Case::new("background: options that do not fit are refused", needs_a_running_tree),
            Case::new("background: memory that no child inherits is copied at once", what_cannot_fork),
        ])
        .collect()
}
