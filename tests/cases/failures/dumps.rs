//! Dumps that fail by themselves: in words, and the target goes on as it was.

use std::fs;

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use rcriu_tests::cycle::unchanged;
use rcriu_tests::program::wait_gone;
use rcriu_tests::{Case, Cycle, Engine, Images, Program, Scratch};

use super::Running;
use crate::refusals::refused;

/// A tmpfs of this many KiB, unmounted at the end.
struct SmallDisk(Scratch);

impl SmallDisk {
    fn new(kib: usize, flags: MsFlags) -> Result<SmallDisk> {
        let at = Scratch::new()?;
        let size = format!("size={kib}k");
        mount(Some("tmpfs"), at.path(), Some("tmpfs"), flags, Some(size.as_str()))
            .context("mounting a tmpfs")?;
        Ok(SmallDisk(at))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

/// Dumps into `dir`, which must fail in words, and leave the program as it was.
fn dump_fails(program: &Program, pid: i32, dir: &str, words: &[&str]) -> Result<()> {
    let before = program.state()?;
    let args = ["dump", "-t", &pid.to_string(), "-D", dir, "-v4", "-o", "dump.log"];
    Engine::rcriu()?.run(&args)?.refused()?.says(words)?;
    unchanged(&before, || program.state()).context("the failed dump changed the tree")?;
    program.verify()
}

fn full_disk() -> Result<()> {
    let disk = SmallDisk::new(600, MsFlags::empty())?;
    let program = Program::start("random-memory", &["16"])?;
    let dir = disk.0.path().to_str().context("name")?;
    dump_fails(&program, program.pid(), dir, &["No space left on device"])
}

fn unwritable() -> Result<()> {
    let disk = SmallDisk::new(600, MsFlags::MS_RDONLY)?;
    let program = Program::start("sleeper", &[])?;
    let dir = disk.0.path().to_str().context("name")?;
    dump_fails(&program, program.pid(), dir, &["Read-only file system"])
}

fn no_folder() -> Result<()> {
    let scratch = Scratch::new()?;
    let dir = scratch.path().join("missing");
    let program = Program::start("sleeper", &[])?;
    dump_fails(
        &program,
        program.pid(),
        dir.to_str().context("name")?,
        &["missing", "No such file or directory"],
    )
}

fn no_such_pid() -> Result<()> {
    let mut child = std::process::Command::new("true").spawn()?;
    let gone = child.id().to_string();
    child.wait()?;
    let images = Images::new()?;
    let finished = Engine::rcriu()?.run(&["dump", "-t", &gone, "-D", images.as_str()?, "-o", "dump.log"])?;
    finished.refused()?.says(&[&gone])
}

fn own_parent() -> Result<()> {
    // We are the parent of the command.
    let program = Program::start("sleeper", &[])?;
    let images = Images::new()?;
    let me = std::process::id().to_string();
    let finished = Engine::rcriu()?.run(&["dump", "-t", &me, "-D", images.as_str()?, "-o", "dump.log"])?;
    finished.refused()?.says(&[&me])?;
    program.verify()
}

fn already_traced() -> Result<()> {
    let program = Program::start("tree", &["2", "2"])?;
    let traced = *program.state()?.pids().last().context("an empty tree")?;
    nix::sys::ptrace::seize(Pid::from_raw(traced), nix::sys::ptrace::Options::empty())
        .context("PTRACE_SEIZE")?;
    let images = Images::new()?;
    let before = program.state()?;
    let finished = Cycle::new()?.try_dump(program.pid(), &images, &[])?.refused()?;
    finished.says(&[&traced.to_string(), "traced"])?;
    unchanged(&before, || program.state()).context("the refused dump changed the tree")?;
    nix::sys::ptrace::interrupt(Pid::from_raw(traced)).context("PTRACE_INTERRUPT")?;
    nix::sys::wait::waitpid(Pid::from_raw(traced), Some(nix::sys::wait::WaitPidFlag::__WALL))
        .context("waitpid")?;
    nix::sys::ptrace::detach(Pid::from_raw(traced), None).context("PTRACE_DETACH")?;
    program.verify()
}

fn timeout_ends_the_dump() -> Result<()> {
    // A task in a vfork that never ends cannot be frozen: its parent waits in the kernel.
    let program = Program::start("vfork", &[])?;
    refused(&program, &["--timeout", "2"], &[])
}

/// Without a limit of one's own the dump waits for a while, then says what it has waited for.
fn vfork_is_named() -> Result<()> {
    refused(&Program::start("vfork", &[])?, &[], &["vfork"])
}

/// The target is killed while it is dumped: the dump fails or was done already; it never hangs.
fn target_dies() -> Result<()> {
    for turn in 0..12u64 {
        let program = Program::start("tree", &["2", "3"])?;
        let images = Images::new()?;
        let tree = program.tree()?;
        let victim = &tree[turn as usize % tree.len()];
        let dump = Running::dump(&program, &images, &[])?;
        dump.for_a_while(turn * 2500)?;
        victim.kill(Signal::SIGKILL);
        let code = dump.end()?;
        match code {
            Some(0) => {}
            Some(_) => {
                let log = fs::read_to_string(images.file("dump.log")).unwrap_or_default();
                ensure!(log.contains("Error"), "a failed dump without an Error in its log");
            }
            None => bail!("the dump died of a signal"),
        }
        // Children of a victim that died before the tree was collected are not part of it any more.
        tree.iter().for_each(|task| task.kill(Signal::SIGKILL));
        wait_gone(&tree)?;
    }
    Ok(())
}

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("failures: a full disk fails the dump and leaves the program", full_disk),
        Case::new("failures: a read-only folder fails the dump and leaves the program", unwritable),
        Case::new("failures: a folder that is not there fails the dump", no_folder),
        Case::new("failures: a pid that is not there is named", no_such_pid),
        Case::new("failures: the parent of the command cannot be dumped", own_parent),
        Case::new("failures: a task that is traced is named and left to its tracer", already_traced),
        Case::new("failures: a target that dies fails the dump", target_dies),
        Case::new("failures: a dump that cannot freeze its target ends in time", timeout_ends_the_dump),
        Case::new("failures: a vfork that does not end is waited for, then named", vfork_is_named),
    ]
}
