//! The monotonic clocks of a tree go on from the moment of the dump, whatever they show on the host.

use std::fs;

use anyhow::{Context, Result, ensure};
use nix::time::{ClockId, clock_gettime};
use rcriu_tests::{Case, Cycle, Engine, Images, Program, skip};

/// Offsets of the time namespace of a process, in nanoseconds: monotonic, since boot.
fn offsets(pid: i32) -> Result<[i128; 2]> {
    let path = format!("/proc/{pid}/timens_offsets");
    let text = fs::read_to_string(&path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => skip("this kernel has no time namespaces"),
        _ => e.into(),
    })?;
    let mut offsets = [0; 2];
    for (line, offset) in text.lines().zip(&mut offsets) {
        let words: Vec<&str> = line.split_whitespace().collect();
        ensure!(words.len() == 3, "{path}: {line}");
        *offset = words[1].parse::<i128>()? * 1_000_000_000 + words[2].parse::<i128>()?;
    }
    Ok(offsets)
}

fn now() -> Result<i128> {
    let t = clock_gettime(ClockId::CLOCK_BOOTTIME).context("clock_gettime")?;
    Ok(i128::from(t.tv_sec()) * 1_000_000_000 + i128::from(t.tv_nsec()))
}

/// Each turn moves the clocks back by the time between dump and restore, no less and no more.
fn go_on(between: impl Fn(usize) -> Result<Cycle>) -> Result<()> {
    let program = Program::start("sleeper", &[])?;
    for turn in 1..=3 {
        let cycle = between(turn)?;
        let images = Images::new()?;
        let before = offsets(program.pid())?;
        let start = now()?;
        cycle.dump(&program, &images)?;
        let dumped = now()?;
        // Nobody is in a hurry: the time that passes here must not be seen.
        std::thread::sleep(std::time::Duration::from_millis(50));
        let restoring = now()?;
        cycle.restore(&images)?;
        let end = now()?;
        for (clock, after) in offsets(program.pid())?.iter().enumerate() {
            let back = before[clock] - after;
            let (least, most) = (restoring - dumped, end - start);
            ensure!(
                (least..=most).contains(&back),
                "turn {turn}: clock {clock} went back by {back} ns, expected {least} to {most}"
            );
        }
    }
    program.verify()
}

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("tasks: monotonic clocks go on from the dump (three turns)", || go_on(|_| Cycle::new())),
        Case::new("interop: monotonic clocks go on from the dump, turns of rcriu and CRIU", || {
            go_on(|turn| {
                let (ours, criu) = (Engine::rcriu()?, Engine::criu()?);
                Ok(if turn % 2 == 0 { Cycle::between(criu, ours) } else { Cycle::between(ours, criu) })
            })
        }),
    ]
}
