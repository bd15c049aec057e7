//! Images pass between rcriu and CRIU 4.2 in both directions, and CRIU's own reader takes every image of
//! ours. Needs CRIU_BIN; what CRIU refuses or loses is left out (`Kind::beyond_criu`).

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use rcriu_tests::{Case, Cycle, Engine, Images, Program, skip};

use crate::{files, memory, real_programs, tasks};

/// crit of the tree that CRIU_BIN stands in, run as a module.
fn crit() -> Result<Command> {
    let criu = Engine::criu()?;
    let root = criu.path().parent().and_then(|p| p.parent()).map(PathBuf::from).unwrap_or_default();
    if !root.join("crit/crit").is_dir() || !root.join("lib/pycriu").is_dir() {
        return Err(skip("CRIU_BIN is not inside a CRIU source tree with crit"));
    }
    let mut python = Command::new("python3");
    python.args(["-m", "crit", "decode", "-i"]);
    python.env("PYTHONPATH", format!("{}:{}", root.join("lib").display(), root.join("crit").display()));
    let works = Command::new("python3")
        .args(["-c", "import google.protobuf, pycriu.images"])
        .env("PYTHONPATH", root.join("lib"))
        .output();
    if !works.is_ok_and(|o| o.status.success()) {
        return Err(skip("crit needs python3 with protobuf"));
    }
    Ok(python)
}

fn crit_reads(program: &str) -> Result<()> {
    crit()?;
    let program = Program::start(program, &[])?;
    let images = Images::new()?;
    Cycle::new()?.dump(&program, &images)?;
    let names = images.names()?;
    ensure!(names.len() > 5, "a dump of {} images", names.len());
    for name in names.iter().filter(|n| !n.starts_with("pages-")) {
        // An image of ours that CRIU does not know is marked as such by its name.
        if name.starts_with("rcriu-") {
            continue;
        }
        let output = crit()?.arg(images.file(name)).output().context("running crit")?;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "crit cannot read {name}: {}", error.trim());
    }
    Ok(())
}

pub fn cases() -> Vec<Case> {
    let kinds = [tasks::KINDS, memory::KINDS, files::KINDS].concat();
    let mut cases: Vec<Case> = kinds.iter().filter(|k| k.in_criu).flat_map(|k| k.interchange()).collect();
    cases.extend(real_programs::interchange());
    for program in ["threads", "sessions", "file-memory", "shared-memory", "regular-files", "pipes", "epoll"]
    {
        cases.push(Case::new(format!("interop: crit reads every image of {program}"), move || {
            crit_reads(program)
        }));
    }
    cases
}
