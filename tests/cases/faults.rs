//! Every named point of failure of the engine: with an error there, and with the process killed there, a
//! dump leaves its target as it was and a restore leaves nothing; both work right after.

use anyhow::{Context, Result, ensure};
use rcriu_engine::faults::{FAULT, POINTS};
use rcriu_tests::cycle::compare;
use rcriu_tests::{Case, Cycle, Engine, Images, Program};

use crate::failures::nothing_left;

/// A tree in which every point is met: several processes, threads, files and sessions.
fn start() -> Result<Program> {
    Program::start("sessions", &[])
}

/// Whether the command ended as a fault must end it.
fn ended(finished: &rcriu_tests::Finished, point: &str, fault: &str) -> Result<()> {
    // Killed at a point that only a task of the tree meets, the command itself lives and fails.
    let ok = match finished.code {
        None => fault.ends_with(":kill"),
        Some(code) => code != 0,
    };
    ensure!(ok, "with {FAULT}={fault} the command ended with {:?}: {}", finished.code, finished.stderr);
    if !fault.ends_with(":kill") {
        finished.says(&[point])?;
    }
    Ok(())
}

fn in_dump(point: &'static str, fault: &str) -> Result<()> {
    let program = start()?;
    let (images, before) = (Images::new()?, program.state()?);
    let pid = program.pid().to_string();
    let mut command =
        Engine::rcriu()?.command(&["dump", "-t", &pid, "-D", images.as_str()?, "-v4", "-o", "dump.log"]);
    command.env(FAULT, fault);
    ended(&Engine::rcriu()?.finish(command)?, point, fault)?;
    compare(&before, &crate::failures::settled(&program, &before)?)
        .context("the failed dump changed the tree")?;
    Cycle::new()?.turn(&program)?;
    program.verify()
}

fn in_restore(point: &'static str, fault: &str) -> Result<()> {
    let program = start()?;
    let (images, cycle) = (Images::new()?, Cycle::new()?);
    cycle.dump(&program, &images)?;
    let args = ["restore", "-d", "-D", images.as_str()?, "-v4", "-o", "restore.log"];
    let mut command = Engine::rcriu()?.command(&args);
    command.env(FAULT, fault);
    ended(&Engine::rcriu()?.finish(command)?, point, fault)?;
    nothing_left("the failed restore")?;
    cycle.restore(&images)?;
    program.verify()
}

/// A task that crashes while it is rebuilt stands still before its tracer: the restore fails, and says what it was.
fn crash() -> Result<()> {
    let program = start()?;
    let (images, cycle) = (Images::new()?, Cycle::new()?);
    cycle.dump(&program, &images)?;
    let args = ["restore", "-d", "-D", images.as_str()?, "-v4", "-o", "restore.log"];
    let mut command = Engine::rcriu()?.command(&args);
    command.env(FAULT, "restore-task-files:abort");
    let finished = Engine::rcriu()?.finish(command)?;
    ensure!(finished.code == Some(1), "a crash of a task ended the restore with {:?}", finished.code);
    finished.says(&["task", "signal 6", "while it was being restored"])?;
    nothing_left("the failed restore")?;
    cycle.restore(&images)?;
    program.verify()
}

pub fn cases() -> Vec<Case> {
    let both = |point: &'static str| {
        [("", "an error"), (":kill", "a kill")].map(|(how, words)| {
            Case::new(format!("faults: {words} at {point} does no harm"), move || {
                let fault = format!("{point}{how}");
                if point.starts_with("restore") { in_restore(point, &fault) } else { in_dump(point, &fault) }
            })
        })
    };
    let crash = Case::new("faults: a task that crashes while it is rebuilt fails the restore", crash);
    POINTS.iter().flat_map(|point| both(point)).chain([crash]).collect()
}
