//! Chains of dumps: each writes what changed since the one before, and the last restores the whole.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use rcriu_tests::events::{PATIENCE, PidFd};
use rcriu_tests::program::wait_gone;
use rcriu_tests::state::processes;
use rcriu_tests::{Case, Engine, Program, Scratch, skip};

use crate::chain::{Chain, step};

/// Keepers that live in our pid namespace.
fn keepers() -> Result<Vec<PidFd>> {
    let is = |pid: i32| fs::read(format!("/proc/{pid}/comm")).is_ok_and(|c| c == b"rcriu-keeper\n");
    let all = processes()?.into_iter().map(|p| p.pid).filter(|pid| is(*pid));
    Ok(all.filter_map(|pid| PidFd::open(Pid::from_raw(pid)).ok()).filter(|k| !k.is_dead()).collect())
}

/// Waits until all keepers have ended, and takes their ends from the kernel.
fn keepers_end(keepers: &[PidFd]) -> Result<()> {
    for keeper in keepers {
        keeper.wait_dead(PATIENCE).context("a keeper has nobody to keep and lives on")?;
    }
    Ok(())
}

fn three_pre_dumps(modes: [&str; 3]) -> Result<()> {
    let (program, chain) = (Program::start("changing-memory", &[])?, Chain::new()?);
    let mut kept = Vec::new();
    for n in 1..=3 {
        chain.pre_dump(&program, n, &["--pre-dump-mode", modes[n - 1]])?;
        kept.extend(keepers()?);
        step(&program, n)?;
    }
    let log = chain.dump(&program, 4, &["--track-mem"])?.log;
    ensure!(!log.contains("Warn"), "warnings: {log}");
    (2..=4).try_for_each(|n| chain.is_small(n))?;
    keepers_end(&kept)?;
    chain.restore(4, &[])?;
    step(&program, 4)?;
    program.verify()
}

/// CRIU restores what was dumped in pieces.
fn restored_by_criu() -> Result<()> {
    let criu = Engine::criu()?;
    let (program, chain) = (Program::start("changing-memory", &[])?, Chain::new()?);
    for n in 1..=3 {
        chain.pre_dump(&program, n, &[])?;
        step(&program, n)?;
    }
    chain.dump(&program, 4, &["--track-mem"])?;
    let dir = chain.dir(4);
    criu.run(&["restore", "-d", "-D", dir.to_str().context("name")?, "-v4", "-o", "restore.log"])?.ok()?;
    step(&program, 4)?;
    program.verify()
}

/// Whole dumps on top of each other, the tree left running.
fn snapshots() -> Result<()> {
    let (program, chain) = (Program::start("changing-memory", &[])?, Chain::new()?);
    for n in 1..=3 {
        let on = (n > 1).then_some(n - 1);
        chain.run("dump", &program, (n, on), &["-R", "--track-mem"], &[])?.ok()?;
        step(&program, n)?;
    }
    chain.dump(&program, 4, &[])?;
    (2..=4).try_for_each(|n| chain.is_small(n))?;
    chain.restore(4, &[])?;
    program.verify()
}

/// After a restore nothing is followed; a new chain begins there.
fn chain_after_chain() -> Result<()> {
    let (program, chain) = (Program::start("changing-memory", &[])?, Chain::new()?);
    chain.pre_dump(&program, 1, &[])?;
    step(&program, 1)?;
    chain.dump(&program, 2, &[])?;
    chain.restore(2, &[])?;
    step(&program, 2)?;
    let log = chain.run("pre-dump", &program, (3, Some(2)), &[], &[])?.ok()?.log;
    ensure!(log.contains("All pages are written"), "a warning is missing: {log}");
    chain.is_whole(3)?;
    step(&program, 3)?;
    chain.dump(&program, 4, &[])?;
    chain.is_small(4)?;
    chain.restore(4, &[])?;
    program.verify()
}

/// A dump that does not belong to the chain is as good as any, and does not disturb the chain.
fn another_dump_between() -> Result<()> {
    let (program, chain) = (Program::start("changing-memory", &[])?, Chain::new()?);
    chain.pre_dump(&program, 1, &[])?;
    step(&program, 1)?;
    chain.run("dump", &program, (7, None), &["-R"], &[])?.ok()?;
    chain.is_whole(7)?;
    step(&program, 2)?;
    chain.dump(&program, 2, &[])?;
    chain.is_small(2)?;
    chain.restore(2, &[])?;
    program.verify()
}

/// The kernel remembers changes since one dump only.
fn another_chain_between() -> Result<()> {
    let (program, chain) = (Program::start("changing-memory", &[])?, Chain::new()?);
    chain.pre_dump(&program, 1, &[])?;
    step(&program, 1)?;
    chain.run("pre-dump", &program, (7, None), &[], &[])?.ok()?;
    step(&program, 2)?;
    let log = chain.dump(&program, 2, &[])?.log;
    ensure!(log.contains("All pages are written"), "a warning is missing: {log}");
    chain.is_whole(2)?;
    chain.restore(2, &[])?;
    program.verify()
}

fn keeper_killed() -> Result<()> {
    let (program, chain) = (Program::start("changing-memory", &[])?, Chain::new()?);
    chain.pre_dump(&program, 1, &[])?;
    let all = keepers()?;
    if all.is_empty() {
        return Err(skip("this kernel has soft-dirty bits: there is no keeper"));
    }
    all.iter().for_each(|k| k.kill(Signal::SIGKILL));
    keepers_end(&all)?;
    step(&program, 1)?;
    let log = chain.dump(&program, 2, &[])?.log;
    ensure!(
        log.contains("keeper of the tracking") && log.contains("has gone"),
        "a warning is missing: {log}"
    );
    chain.is_whole(2)?;
    chain.restore(2, &[])?;
    program.verify()
}

fn kernel_cannot() -> Result<()> {
    let off = [("RCRIU_WITHOUT", "uffd_wp_async,soft_dirty")];
    let (program, chain) = (Program::start("changing-memory", &[])?, Chain::new()?);
    chain
        .run("pre-dump", &program, (8, None), &[], &off)?
        .refused()?
        .says(&["Tracking memory is not available"])?;
    ensure!(!chain.dir(8).join("inventory.img").exists(), "a failed pre-dump left images");
    chain.pre_dump(&program, 1, &[])?;
    step(&program, 1)?;
    let tree = program.tree()?;
    let log = chain.run("dump", &program, (2, Some(1)), &[], &off);
    // Memory registered by one who is not known any more: not without the feature that knows it.
    log?.ok()?;
    wait_gone(&tree)?;
    chain.is_whole(2)?;
    chain.restore(2, &[])?;
    program.verify()
}

fn parent_missing() -> Result<()> {
    let (program, chain) = (Program::start("changing-memory", &[])?, Chain::new()?);
    for verb in ["pre-dump", "dump"] {
        let words = ["--prev-images-dir", "../5", "No such file"];
        chain.run(verb, &program, (6, Some(5)), &[], &[])?.refused()?.says(&words)?;
    }
    let left: Vec<_> = fs::read_dir(chain.dir(6))?.flatten().map(|e| e.file_name()).collect();
    ensure!(left.iter().all(|n| n == "dump.log"), "left behind: {left:?}");
    // A parent that goes away later is noticed by the restore.
    chain.pre_dump(&program, 1, &[])?;
    step(&program, 1)?;
    chain.dump(&program, 2, &[])?;
    let away = chain.scratch.path().join("away");
    fs::rename(chain.dir(1), &away)?;
    let dir = chain.dir(2);
    let args = ["restore", "-d", "-D", dir.to_str().context("name")?, "-o", "restore.log"];
    chain.engine.run(&args)?.refused()?.says(&["../1", "open image folder"])?;
    fs::rename(&away, chain.dir(1))?;
    chain.restore(2, &[])?;
    program.verify()
}

/// A process that got the pid of a task that was dumped.
fn pid_reused() -> Result<()> {
    let chain = Chain::new()?;
    let pid = {
        let program = Program::start("changing-memory", &[])?;
        chain.pre_dump(&program, 1, &[])?;
        let kept = keepers()?;
        let pid = program.pid();
        drop(program);
        keepers_end(&kept)?;
        pid
    };
    fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).context("ns_last_pid")?;
    let program = Program::start("changing-memory", &[])?;
    ensure!(program.pid() == pid, "the pid is {} instead of {pid}", program.pid());
    let log = chain.dump(&program, 2, &["--track-mem"])?.log;
    ensure!(log.contains(&format!("Pid reuse detected for pid {pid}")), "a warning is missing: {log}");
    chain.is_whole(2)?;
    chain.restore(2, &[])?;
    program.verify()
}

fn another_program() -> Result<()> {
    let (program, chain) = (Program::start("changing-program", &[])?, Chain::new()?);
    for n in 1..=3 {
        chain.pre_dump(&program, n, &[])?;
        step(&program, n)?;
    }
    chain.pre_dump(&program, 4, &[])?;
    chain.dump(&program, 5, &[])?;
    chain.is_whole(4)?;
    chain.is_small(5)?;
    chain.restore(5, &[])?;
    program.verify()
}

fn freed_by_dumps() -> Result<()> {
    let (program, chain) = (Program::start("changing-memory", &[])?, Chain::new()?);
    for n in 1..=3 {
        chain.pre_dump(&program, n, &["--auto-dedup"])?;
        step(&program, n)?;
    }
    let before = chain.pages(3)?;
    chain.dump(&program, 4, &["--auto-dedup", "--track-mem"])?;
    let after = chain.pages(3)?;
    ensure!(before.0 == after.0 && after.1 < before.1, "nothing was freed: {before:?}, {after:?}");
    chain.restore(4, &["--auto-dedup"])?;
    // What was restored is gone.
    for n in 1..=4 {
        let (length, space) = chain.pages(n)?;
        ensure!(space < length / 4, "images {n} still hold {space} of {length} bytes");
    }
    program.verify()
}

fn freed_by_command() -> Result<()> {
    let (program, chain) = (Program::start("changing-memory", &[])?, Chain::new()?);
    for n in 1..=2 {
        chain.pre_dump(&program, n, &[])?;
        step(&program, n)?;
    }
    chain.dump(&program, 3, &[])?;
    let dir = |n| chain.dir(n).to_str().map(str::to_owned).context("name");
    let before = (chain.pages(1)?.1, chain.pages(2)?.1);
    for n in [3, 2] {
        let log = chain.engine.run(&["dedup", "-D", &dir(n)?, "-v4", "-o", "dedup.log"])?.ok()?.log;
        ensure!(log.contains("Deduplicated"), "the log says {log}");
    }
    let after = (chain.pages(1)?.1, chain.pages(2)?.1);
    ensure!(after.0 < before.0 && after.1 < before.1, "nothing was freed: {before:?}, {after:?}");
    chain.engine.run(&["dedup", "-D", &dir(1)?])?.refused()?.says(&["no parent"])?;
    chain.restore(3, &[])?;
    program.verify()
}

fn shown() -> Result<()> {
    let (program, chain) = (Program::start("changing-memory", &[])?, Chain::new()?);
    chain.pre_dump(&program, 1, &[])?;
    step(&program, 1)?;
    chain.dump(&program, 2, &[])?;
    let show = |n: usize, more: &[&str]| {
        let dir = chain.dir(n);
        let mut args = vec!["show"];
        args.extend(more);
        args.push(dir.to_str().context("name")?);
        chain.engine.run(&args)
    };
    let first = show(1, &[])?.ok()?.stdout;
    ensure!(first.contains("pre-dump"), "the pre-dump is shown as {first}");
    let second = show(2, &[])?.ok()?.stdout;
    ensure!(
        second.contains("complete together with its parent ../1") && second.contains("in parent"),
        "{second}"
    );
    for n in [1, 2] {
        show(n, &["--check"])?.ok()?;
    }
    truncate(&chain.dir(1))?;
    show(1, &["--check"])?.refused()?;
    program_is_gone(&program)
}

fn truncate(dir: &Path) -> Result<()> {
    let pages = fs::read_dir(dir)?.flatten().find(|e| e.file_name().to_string_lossy().starts_with("pages-"));
    let file = fs::OpenOptions::new().write(true).open(pages.context("a page file")?.path())?;
    file.set_len(file.metadata()?.len() - 4096).context("ftruncate")
}

fn program_is_gone(program: &Program) -> Result<()> {
    ensure!(program.tree()?.is_empty(), "the dump left the tree running");
    Ok(())
}

/// A pre-dump that fails, or is killed, leaves the target and the chain as they were.
fn failed_between() -> Result<()> {
    let (program, chain) = (Program::start("changing-memory", &[])?, Chain::new()?);
    chain.pre_dump(&program, 1, &[])?;
    step(&program, 1)?;
    // No room for the pages.
    let small = Scratch::new()?;
    let at = chain.dir(7);
    fs::create_dir(&at)?;
    nix::mount::mount(Some("t"), &at, Some("tmpfs"), nix::mount::MsFlags::empty(), Some("size=64k"))
        .context("mounting a tmpfs")?;
    let failed = chain.run("dump", &program, (7, Some(1)), &["-R"], &[("RCRIU_WITHOUT", "pagemap_scan")]);
    nix::mount::umount(&at).context("umount")?;
    drop(small);
    failed?.refused()?;
    step(&program, 2)?;
    chain.dump(&program, 2, &[])?;
    chain.is_small(2)?;
    chain.restore(2, &[])?;
    program.verify()
}

pub fn cases() -> Vec<Case> {
    let case = |name: &str, run: fn() -> Result<()>| Case::new(format!("incremental: {name}"), run);
    vec![
        case("three pre-dumps, a dump, a restore", || three_pre_dumps(["splice", "splice", "splice"])),
        case("three pre-dumps that read", || three_pre_dumps(["read", "read", "read"])),
        case("pre-dumps of both modes", || three_pre_dumps(["read", "splice", "read"])),
        case("dumps on top of each other, left running", snapshots),
        case("a chain after a restore", chain_after_chain),
        case("a dump of its own between the dumps of a chain", another_dump_between),
        case("a chain between the dumps of another", another_chain_between),
        case("the keeper is killed: all pages are written", keeper_killed),
        case("the kernel cannot tell what changed", kernel_cannot),
        case("the parent images are missing", parent_missing),
        case("a pid that was used again is noticed", pid_reused),
        case("the task executes another program", another_program),
        case("--auto-dedup frees what is stored again, and what is restored", freed_by_dumps),
        case("dedup frees what is stored again", freed_by_command),
        case("chains are shown and checked", shown),
        case("a dump that fails leaves the chain as it was", failed_between),
        Case::new("interop: a chain of dumps by rcriu, restored by CRIU", restored_by_criu),
    ]
}
