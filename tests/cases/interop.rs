//! Images pass between rcriu and CRIU 4.2 in both directions, and CRIU's own reader takes every image of
//! ours. Needs CRIU_BIN; what CRIU refuses or loses is left out (`Kind::beyond_criu`).

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use rcriu_tests::{Case, Cycle, Engine, Images, Program, skip};

use crate::{confined, files, memory, real_programs, sockets, tasks};

/// Reads each image named with the library that crit stands on, and says which ones it cannot.
const READER: &str = r#"
import sys, pycriu.images
failed = 0
for name in sys.argv[1:]:
    try:
        with open(name, "rb") as f:
            pycriu.images.load(f, pretty=True)
    except Exception as e:
        print(name, type(e).__name__, e)
        failed = 1
sys.exit(failed)
"#;

/// crit's reader from the tree that CRIU_BIN stands in.
fn crit() -> Result<Command> {
    let criu = Engine::criu()?;
    let root = criu.path().parent().and_then(|p| p.parent()).map(PathBuf::from).unwrap_or_default();
    let library = root.join("lib");
    if !library.join("pycriu").is_dir() {
        return Err(skip("CRIU_BIN is not inside a CRIU source tree with crit"));
    }
    let mut python = Command::new("python3");
    python.args(["-c", "import pycriu.images"]).env("PYTHONPATH", &library);
    if !python.output().is_ok_and(|o| o.status.success()) {
        return Err(skip("crit needs python3 with protobuf"));
    }
    let mut python = Command::new("python3");
    python.args(["-c", READER]).env("PYTHONPATH", &library);
    Ok(python)
}

fn crit_reads_program(program: &str) -> Result<()> {
    let program = Program::start(program, &[])?;
    Cycle::new()?.checking(crit_reads).dump(&program, &Images::new()?)
}

/// crit's reader takes every image of the set.
pub fn crit_reads(images: &Images) -> Result<()> {
    let mut crit = crit()?;
    let names = images.names()?;
    ensure!(names.len() > 5, "a dump of {} images", names.len());
    // Pages have no entries; an image that CRIU does not know is marked as such by its name.
    let known = |n: &&String| !n.starts_with("pages-") && !n.starts_with("rcriu-");
    crit.args(names.iter().filter(known).map(|n| images.file(n)));
    let output = crit.output().context("running crit")?;
    let (said, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "crit cannot read: {said}{error}");
    Ok(())
}

pub fn cases() -> Vec<Case> {
    let kinds = [tasks::KINDS, confined::KINDS, memory::KINDS, files::KINDS, sockets::KINDS].concat();
    let mut cases: Vec<Case> = kinds.iter().filter(|k| k.in_criu).flat_map(|k| k.interchange()).collect();
    cases.extend(real_programs::interchange());
    cases.extend(sockets::interchange());
    for program in ["threads", "sessions", "file-memory", "shared-memory", "regular-files", "pipes", "epoll"]
    {
        cases.push(Case::new(format!("interop: crit reads every image of {program}"), move || {
            crit_reads_program(program)
        }));
    }
    cases
}
