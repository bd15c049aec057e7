//! Restores that fail or are interrupted: nothing is left behind.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use rcriu_tests::cycle::unchanged;
use rcriu_tests::program::wait_gone;
use rcriu_tests::{Case, Cycle, Engine, Finished, Images, Program};

use super::{Running, below, dumped, nothing_left};

/// Whether a restore that was killed had done its work: all tasks live and go on doing so. Those that do not are
/// being killed already.
fn whole_tree_stays(tasks: usize) -> Result<bool> {
    let enough = std::time::Instant::now() + Duration::from_millis(500);
    while std::time::Instant::now() < enough {
        if below()?.len() != tasks {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(true)
}

/// Restores are interrupted at moments spread over their duration; the last one is let through.
fn interrupted_restores(signal: Signal) -> Result<()> {
    let (program, images) = dumped("tree", &["3", "3"])?;
    let start = std::time::Instant::now();
    ensure!(Running::restore(&images)?.end()? == Some(0), "a restore that nobody disturbs fails");
    let whole = start.elapsed().as_micros() as u64;
    let tasks = below()?.len();
    let kill_tree = || -> Result<()> {
        let tree = program.tree()?;
        tree.iter().for_each(|t| t.kill(Signal::SIGKILL));
        wait_gone(&tree)
    };
    kill_tree()?;
    for turn in 0..20 {
        let restore = Running::restore(&images)?;
        restore.for_a_while(whole * turn / 20)?;
        restore.pidfd.kill(signal);
        let code = restore.end()?;
        if code == Some(0) || code.is_none() && whole_tree_stays(tasks)? {
            kill_tree()?;
            continue;
        }
        nothing_left(&format!("restore {turn}, interrupted,"))?;
    }
    Cycle::new()?.restore(&images)?;
    program.verify()
}

/// The names in a folder with their sizes, to see what a failed command leaves.
fn listing(dir: &std::path::Path) -> Result<Vec<(String, u64)>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        names.push((entry.file_name().to_string_lossy().into_owned(), entry.metadata()?.len()));
    }
    names.sort();
    Ok(names)
}

/// A restore that must fail: in words, with nothing left, and that works once `mend` has run.
fn restore_fails(kind: &str, spoil: impl Fn(&Program, &Images) -> Result<()>, words: &[&str]) -> Result<()> {
    let (program, images) = dumped(kind, &[])?;
    spoil(&program, &images)?;
    let before = listing(program.dir())?;
    let finished: Finished = Cycle::new()?.try_restore(&images, &[])?.refused()?;
    finished.says(words)?;
    nothing_left("the failed restore")?;
    ensure!(listing(program.dir())? == before, "the failed restore left files behind");
    Ok(())
}

fn truncate(images: &Images, prefix: &str) -> Result<()> {
    let name = images.names()?.into_iter().find(|n| n.starts_with(prefix)).context("no such image")?;
    let file = fs::OpenOptions::new().write(true).open(images.file(&name))?;
    file.set_len(file.metadata()?.len() - 3).context("truncating an image")
}

fn pid_taken() -> Result<()> {
    let program = Program::start("sleeper", &[])?;
    let images = Images::new()?;
    let cycle = Cycle::new()?;
    cycle.try_dump(program.pid(), &images, &["--leave-running"])?.ok()?;
    let before = program.state()?;
    cycle.try_restore(&images, &[])?.refused()?.says(&[&program.pid().to_string()])?;
    unchanged(&before, || program.state()).context("the failed restore changed the owner of the pid")?;
    program.verify()
}

/// Without a way to choose pids (before Linux 5.5) the kernel is told the last one it gave; whoever forks in
/// between gets the number, and we a wrong one.
fn others_fork(kind: &str, args: &[&str]) -> Result<()> {
    let (program, images) = dumped(kind, args)?;
    let mut shell = std::process::Command::new("/bin/sh");
    shell.args(["-c", "while :; do ( : ); done"]);
    let forker = Program::spawn(shell)?;
    let engine = Engine::rcriu()?;
    let mut command = engine.command(&["restore", "-d", "-D", images.as_str()?, "-v4", "-o", "restore.log"]);
    command.env("RCRIU_WITHOUT", "clone3_set_tid");
    let finished = engine.finish(command)?;
    drop(forker);
    finished.ok()?;
    program.verify()
}

pub fn cases() -> Vec<Case> {
    let mut cases = vec![
        Case::new("failures: a restore gets its pids although others fork, without clone3", || {
            others_fork("tree", &["3", "3"])
        }),
        Case::new("failures: siblings get their pids although others fork, without clone3", || {
            others_fork("sessions", &["leaderless"])
        }),
        Case::new("failures: a pid that is taken is named and its owner left alone", pid_taken),
        Case::new("failures: a truncated core image fails the restore by name", || {
            restore_fails("sleeper", |_, i| truncate(i, "core-"), &["core-"])
        }),
        Case::new("failures: truncated pages fail the restore by name", || {
            restore_fails("sleeper", |_, i| truncate(i, "pages-"), &["pages-"])
        }),
        Case::new("failures: a missing inventory fails the restore by name", || {
            restore_fails("sleeper", |_, i| Ok(fs::remove_file(i.file("inventory.img"))?), &["inventory.img"])
        }),
        Case::new("failures: a missing mm image fails the restore by name", || {
            let spoil =
                |p: &Program, i: &Images| Ok(fs::remove_file(i.file(&format!("mm-{}.img", p.pid())))?);
            restore_fails("sleeper", spoil, &["mm-"])
        }),
        Case::new("failures: a file that is gone fails the restore by name", || {
            restore_fails("regular-files", |p, _| Ok(fs::remove_file(p.dir().join("data"))?), &["data"])
        }),
        Case::new("failures: a file that has grown fails the restore by name", || {
            let spoil = |p: &Program, _: &Images| Ok(fs::write(p.dir().join("data"), [0; 99])?);
            restore_fails("regular-files", spoil, &["data", "99"])
        }),
    ];
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGKILL] {
        cases.push(Case::new(format!("failures: {signal} during a restore leaves nothing"), move || {
            interrupted_restores(signal)
        }));
    }
    cases
}
