//! Restores whose memory comes late, served by the command lazy-pages.

use anyhow::{Result, ensure};
use rcriu_tests::cycle::unchanged;
use rcriu_tests::{Case, Cycle, Engine, Images, Program};

use super::Server;

/// Dumps, and restores with pages that `server` serves from the images.
fn from_images(server: &Engine, restorer: &Engine, program: &str, args: &[&str], touch: Touch) -> Result<()> {
    let program = Program::start(program, args)?;
    let (images, before) = (Images::new()?, program.state()?);
    let cycle = Cycle::between(Engine::rcriu()?, restorer.clone());
    cycle.dump(&program, &images)?;
    let serving = Server::start(server, "lazy-pages", &images, &[])?;
    cycle.try_restore(&images, &["--lazy-pages"])?.ok()?;
    if touch == Touch::AtOnce {
        let verified = program.verify();
        serving.ended_well()?;
        return verified;
    }
    // What is served can be told from outside; afterwards nothing can.
    serving.ended_well()?;
    unchanged(&before, || program.state())?;
    program.verify()
}

/// When the program is asked to touch its memory: while it comes, or when all of it is there.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Touch {
    AtOnce,
    Afterwards,
}

/// Without the server nothing is restored.
fn without_server() -> Result<()> {
    let program = Program::start("sleeper", &[])?;
    let images = Images::new()?;
    let cycle = Cycle::new()?;
    cycle.dump(&program, &images)?;
    let refused = cycle.try_restore(&images, &["--lazy-pages"])?.refused()?;
    refused.says(&["lazy-pages.socket", "start the command lazy-pages"])?;
    crate::failures::nothing_left("the failed restore")?;
    cycle.restore(&images)?;
    program.verify()
}

/// A restore that fails ends the server too.
fn failing_restore() -> Result<()> {
    let program = Program::start("sleeper", &[])?;
    let images = Images::new()?;
    let cycle = Cycle::new()?;
    cycle.dump(&program, &images)?;
    let serving = Server::start(&Engine::rcriu()?, "lazy-pages", &images, &[])?;
    let args = ["restore", "-d", "-D", images.as_str()?, "-v4", "-o", "restore.log", "--lazy-pages"];
    let mut command = Engine::rcriu()?.command(&args);
    command.env(rcriu_engine::faults::FAULT, "restore-rebuilt");
    Engine::rcriu()?.finish(command)?.refused()?.says(&["restore-rebuilt"])?;
    let (code, log) = serving.end()?;
    ensure!(code == Some(1) && log.contains("the restore ended"), "the server ended with {code:?}:\n{log}");
    crate::failures::nothing_left("the failed restore")?;
    cycle.restore(&images)?;
    program.verify()
}

pub fn cases() -> Vec<Case> {
    let rcriu = || Engine::rcriu();
    let mut cases = Vec::new();
    for (program, args) in [
        ("late-memory", &["128"][..]),
        ("random-memory", &["64"]),
        ("private-memory", &[]),
        ("stack", &[]),
        ("threads", &[]),
        ("sessions", &[]),
        ("zombies", &[]),
        ("rseq", &[]),
        ("shared-memory", &[]),
        ("many-mappings", &["2000"]),
    ] {
        cases.push(Case::new(format!("pages: {program} restored lazily"), move || {
            from_images(&rcriu()?, &rcriu()?, program, args, Touch::Afterwards)
        }));
        cases.push(Case::new(format!("pages: {program} restored lazily, touched at once"), move || {
            from_images(&rcriu()?, &rcriu()?, program, args, Touch::AtOnce)
        }));
    }
    for (program, args) in [("threads", &[][..]), ("random-memory", &["64"]), ("zombies", &[])] {
        cases.push(Case::new(
            format!("interop: {program} restored by rcriu, pages served by CRIU"),
            move || from_images(&Engine::criu()?, &rcriu()?, program, args, Touch::AtOnce),
        ));
        cases.push(Case::new(
            format!("interop: {program} restored by CRIU, pages served by rcriu"),
            move || from_images(&rcriu()?, &Engine::criu()?, program, args, Touch::AtOnce),
        ));
    }
    cases.extend([
        Case::new("pages: a lazy restore without its server", without_server),
        Case::new("pages: a lazy restore that fails ends its server", failing_restore),
    ]);
    cases
}
