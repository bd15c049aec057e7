//! Dumps and restores that fail or are interrupted: the target goes on as it was, nothing is left behind.

use std::fs;
use std::process::Child;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use rcriu_tests::cycle::compare;
use rcriu_tests::events::{PATIENCE, PidFd, readable, wait_file};
use rcriu_tests::program::wait_gone;
use rcriu_tests::state::{State, descendants, processes};
use rcriu_tests::{Case, Cycle, Engine, Finished, Images, Program, Scratch};

use crate::options::freezer;
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
    compare(&before, &program.state()?).context("the failed dump changed the tree")?;
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
    compare(&before, &program.state()?).context("the refused dump changed the tree")?;
    nix::sys::ptrace::interrupt(Pid::from_raw(traced)).context("PTRACE_INTERRUPT")?;
    nix::sys::wait::waitpid(Pid::from_raw(traced), Some(nix::sys::wait::WaitPidFlag::__WALL))
        .context("waitpid")?;
    nix::sys::ptrace::detach(Pid::from_raw(traced), None).context("PTRACE_DETACH")?;
    program.verify()
}

/// A command of the engine that runs while the case goes on.
struct Running {
    child: Child,
    pidfd: PidFd,
}

impl Running {
    fn start(args: &[&str]) -> Result<Running> {
        let mut command = Engine::rcriu()?.command(args);
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        let child = command.spawn().context("starting the engine")?;
        let pidfd = PidFd::open(Pid::from_raw(child.id() as i32)).context("pidfd_open")?;
        Ok(Running { child, pidfd })
    }

    fn dump(program: &Program, images: &Images, more: &[&str]) -> Result<Running> {
        let pid = program.pid().to_string();
        let mut args = vec!["dump", "-t", &pid, "-D", images.as_str()?, "-v4", "-o", "dump.log"];
        args.extend(more);
        Running::start(&args)
    }

    fn restore(images: &Images) -> Result<Running> {
        Running::start(&["restore", "-d", "-D", images.as_str()?, "-v4", "-o", "restore.log"])
    }

    /// Exit code; None when a signal ended it.
    fn end(mut self) -> Result<Option<i32>> {
        if self.pidfd.wait_dead(PATIENCE).is_err() {
            self.pidfd.kill(Signal::SIGKILL);
            self.child.wait()?;
            bail!("the command hangs");
        }
        Ok(self.child.wait()?.code())
    }

    /// Lets it run for a while, or to its end if that comes first.
    fn for_a_while(&self, microseconds: u64) -> Result<()> {
        use std::os::fd::AsFd;
        readable(&[self.pidfd.as_fd()], Duration::from_micros(microseconds)).map(drop)
    }
}

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

/// The state of a tree whose dump was killed: its guardian takes away what the dump could not, which takes some
/// moments.
pub fn settled(program: &Program, before: &State) -> Result<State> {
    let look = || program.state();
    let mut now = look()?;
    let patience = std::time::Instant::now() + Duration::from_secs(5);
    while std::time::Instant::now() < patience {
        if before.differences(&now).is_empty() {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
        now = look()?;
    }
    Ok(now)
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
            compare(&before, &program.state()?).context("what was left is still there")?;
            if left == 2 {
                break;
            }
        }
    }
    program.verify()
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

/// Images of a program that was dumped and is gone.
fn dumped(kind: &str, args: &[&str]) -> Result<(Program, Images)> {
    let program = Program::start(kind, args)?;
    let images = Images::new()?;
    Cycle::new()?.dump(&program, &images)?;
    Ok((program, images))
}

/// Live processes below this one.
pub fn below() -> Result<Vec<i32>> {
    let all = processes()?;
    let me = std::process::id() as i32;
    let alive = |pid: &i32| all.iter().any(|p| p.pid == *pid && p.state != 'Z');
    Ok(descendants(&all, me).into_iter().filter(alive).collect())
}

/// Waits until nothing alive is below this process; what was killed takes a moment to be gone.
pub fn nothing_left(what: &str) -> Result<()> {
    for pid in below()? {
        if let Ok(fd) = PidFd::open(Pid::from_raw(pid)) {
            fd.wait_dead(Duration::from_secs(5)).with_context(|| format!("{what} left pid {pid} behind"))?;
        }
    }
    while nix::sys::wait::waitpid(None, Some(nix::sys::wait::WaitPidFlag::WNOHANG))
        .is_ok_and(|s| s != nix::sys::wait::WaitStatus::StillAlive)
    {}
    Ok(())
}

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
    compare(&before, &program.state()?).context("the failed restore changed the owner of the pid")?;
    program.verify()
}

fn timeout_ends_the_dump() -> Result<()> {
    // A task in a vfork that never ends cannot be frozen: its parent waits in the kernel.
    let program = Program::start("vfork", &[])?;
    refused(&program, &["--timeout", "2"], &[])
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
        Case::new("failures: a full disk fails the dump and leaves the program", full_disk),
        Case::new("failures: a read-only folder fails the dump and leaves the program", unwritable),
        Case::new("failures: a folder that is not there fails the dump", no_folder),
        Case::new("failures: a pid that is not there is named", no_such_pid),
        Case::new("failures: the parent of the command cannot be dumped", own_parent),
        Case::new("failures: a task that is traced is named and left to its tracer", already_traced),
        Case::new("failures: a target that dies fails the dump", target_dies),
        Case::new("failures: dumps killed at any moment leave a thread as it was", || {
            killed_dumps(&Program::start("threads", &["1"])?, &[])
        }),
        Case::new("failures: dumps killed at any moment leave six threads as they were", || {
            killed_dumps(&Program::start("threads", &["6"])?, &[])
        }),
        Case::new("failures: dumps killed at any moment leave no group frozen", killed_dumps_of_a_group),
        Case::new("failures: what a dump and its guardian leave the next removes", killed_guardian),
        Case::new("failures: a pid that is taken is named and its owner left alone", pid_taken),
        Case::new("failures: a dump that cannot freeze its target ends in time", timeout_ends_the_dump),
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
        cases.push(Case::new(
            format!("failures: {signal} during a dump leaves the program running"),
            move || interrupted_dump(signal),
        ));
        cases.push(Case::new(format!("failures: {signal} during a restore leaves nothing"), move || {
            interrupted_restores(signal)
        }));
    }
    cases
}
