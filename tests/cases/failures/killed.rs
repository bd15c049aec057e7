//! Dumps that are interrupted or killed: the target goes on as it was.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use rcriu_tests::cycle::{compare, unchanged};
use rcriu_tests::events::{PATIENCE, PidFd, wait_file};
use rcriu_tests::state::processes;
use rcriu_tests::{Case, Engine, Images, Program};

use super::{Running, settled};
use crate::options::freezer;

/// Dumps are interrupted by `signal` as soon as page data is being written.
fn interrupted_dump(signal: Signal) -> Result<()> {
    let program = Program::start("random-memory", &["200"])?;
    let images = Images::new()?;
    let before = program.state()?;
    let dump = Running::dump(&program, &images, &[])?;
    let writing = || images.names().is_ok_and(|n| n.iter().any(|n| n.starts_with("pages-")));
    ensure!(
        wait_file(images.path(), Some(&dump.pidfd), PATIENCE, writing)?,
        "the dump ended before it wrote pages"
    );
    dump.pidfd.kill(signal);
    let code = dump.end()?;
    if signal == Signal::SIGKILL {
        ensure!(code.is_none(), "the killed dump ended with {code:?}");
    } else {
        ensure!(code.is_some_and(|c| c != 0), "the interrupted dump ended with {code:?}");
        ensure!(!images.file("inventory.img").exists(), "an interrupted dump left an inventory.img");
    }
    let now = if signal == Signal::SIGKILL { settled(&program, &before)? } else { program.state()? };
    compare(&before, &now).context("the interrupted dump changed the tree")?;
    program.verify()
}

/// Waits until no guardian of a killed dump is left.
fn guardians_end() -> Result<()> {
    for process in processes()? {
        let comm = fs::read_to_string(format!("/proc/{}/comm", process.pid)).unwrap_or_default();
        if comm.trim() == "rcriu-guardian"
            && let Ok(fd) = PidFd::open(Pid::from_raw(process.pid))
        {
            fd.wait_dead(Duration::from_secs(5)).context("a guardian stays")?;
        }
    }
    Ok(())
}

/// SIGKILL of dumps at moments spread over their duration: RCRIU_KILLS of them, or 40.
fn killed_dumps(program: &Program, options: &[&str]) -> Result<()> {
    let kills: u64 = std::env::var("RCRIU_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(40);
    let before = program.state()?;
    let options = [&["--leave-running"], options].concat();
    let mut whole = None;
    for turn in 0..=kills {
        let images = Images::new()?;
        let start = std::time::Instant::now();
        let dump = Running::dump(program, &images, &options)?;
        match whole {
            None => {
                ensure!(dump.end()? == Some(0), "a dump that nobody disturbs fails");
                whole = Some(start.elapsed().as_micros() as u64);
            }
            Some(whole) => {
                dump.for_a_while(whole * turn / kills)?;
                dump.pidfd.kill(Signal::SIGKILL);
                dump.end()?;
            }
        }
        compare(&before, &settled(program, &before)?)
            .with_context(|| format!("after dump {turn} was killed"))?;
    }
    guardians_end()?;
    program.verify()
}

/// The same with a control group that is frozen for the dump.
fn killed_dumps_of_a_group() -> Result<()> {
    let cgroup = freezer()?;
    let run = || -> Result<()> {
        let program = Program::start("tree", &["2", "3"])?;
        for task in program.tree()? {
            fs::write(cgroup.join("cgroup.procs"), task.pid().to_string()).context("moving to the cgroup")?;
        }
        killed_dumps(&program, &["--freeze-cgroup", cgroup.to_str().context("name")?])?;
        let state = ["cgroup.freeze", "freezer.state"].map(|f| fs::read_to_string(cgroup.join(f)));
        let thawed = state.iter().flatten().all(|s| ["0", "THAWED"].contains(&s.trim()));
        ensure!(thawed, "the group was left frozen: {state:?}");
        Ok(())
    };
    let result = run();
    fs::remove_dir(&cgroup).context("removing the cgroup")?;
    result
}

/// A guardian that is killed with its dump: the next dump removes what they leave.
fn killed_guardian() -> Result<()> {
    let program = Program::start("threads", &["2"])?;
    let before = program.state()?;
    let pid = program.pid().to_string();
    let mut left = 0;
    for turn in 0..400 {
        let images = Images::new()?;
        let dump = Running::dump(&program, &images, &["--leave-running"])?;
        dump.for_a_while(turn * 997 % 40_000)?;
        let mine = dump.child.id() as i32;
        let guardian = processes()?.into_iter().find(|p| p.ppid == mine);
        if let Some(guardian) = guardian {
            let _ = nix::sys::signal::kill(Pid::from_raw(guardian.pid), Signal::SIGKILL);
        }
        dump.pidfd.kill(Signal::SIGKILL);
        dump.end()?;
        std::thread::sleep(Duration::from_millis(20));
        if !before.differences(&program.state()?).is_empty() {
            left += 1;
            let images = Images::new()?;
            Engine::rcriu()?
                .run(&["dump", "-t", &pid, "-D", images.as_str()?, "-R", "-v4", "-o", "dump.log"])?
                .ok()?;
            unchanged(&before, || program.state()).context("what was left is still there")?;
            if left == 2 {
                break;
            }
        }
    }
    program.verify()
}

pub fn cases() -> Vec<Case> {
    let mut cases = vec![
        Case::new("failures: dumps killed at any moment leave a thread as it was", || {
            killed_dumps(&Program::start("threads", &["1"])?, &[])
        }),
        Case::new("failures: dumps killed at any moment leave six threads as they were", || {
            killed_dumps(&Program::start("threads", &["6"])?, &[])
        }),
        Case::new("failures: dumps killed at any moment leave no group frozen", killed_dumps_of_a_group),
        Case::new("failures: what a dump and its guardian leave the next removes", killed_guardian),
    ];
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGKILL] {
        cases.push(Case::new(
            format!("failures: {signal} during a dump leaves the program running"),
            move || interrupted_dump(signal),
        ));
    }
    cases
}
