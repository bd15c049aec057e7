//! Options of dump and restore that change what happens around the tree.
//!
//! # Safety
//!
//! dup2(2) between fork and exec, and an ioctl(2) with an integer argument.

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::pty::{OpenptyResult, openpty};
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use rcriu_images::{ImageDir, ImageKind, pb};
use rcriu_tests::cycle::unchanged;
use rcriu_tests::events::{PATIENCE, PidFd};
use rcriu_tests::program::wait_gone;
use rcriu_tests::{Case, Cycle, Engine, Images, Program, Scratch, skip};

fn state_of(pid: i32) -> Result<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()).context("stat")
}

fn leave_stopped() -> Result<()> {
    let program = Program::start("tree", &["2", "2"])?;
    let (images, before) = (Images::new()?, program.state()?);
    Cycle::new()?.try_dump(program.pid(), &images, &["--leave-stopped"])?.ok()?;
    let tree = program.tree()?;
    for task in &tree {
        ensure!(state_of(task.pid().as_raw())? == 'T', "pid {} is not stopped", task.pid());
    }
    tree.iter().for_each(|t| t.kill(Signal::SIGCONT));
    unchanged(&before, || program.state())?;
    program.verify()
}

fn restore_stopped() -> Result<()> {
    let program = Program::start("sleeper", &[])?;
    let (images, cycle) = (Images::new()?, Cycle::new()?);
    cycle.dump(&program, &images)?;
    cycle.try_restore(&images, &["--leave-stopped"])?.ok()?;
    // The stop is on its way when the command ends; the task is our child by then.
    let flags = WaitPidFlag::WSTOPPED | WaitPidFlag::WNOWAIT;
    waitid(Id::Pid(Pid::from_raw(program.pid())), flags).context("waiting for the task to stop")?;
    ensure!(state_of(program.pid())? == 'T', "the restored task is not stopped");
    program.tree()?.iter().for_each(|t| t.kill(Signal::SIGCONT));
    program.verify()
}

fn work_folder_and_pidfile() -> Result<()> {
    let program = Program::start("sleeper", &[])?;
    let (images, work) = (Images::new()?, Scratch::new()?);
    let dir = work.path().to_str().context("name")?;
    let cycle = Cycle::new()?.with(&["-W", dir]);
    cycle.dump(&program, &images)?;
    ensure!(
        work.path().join("dump.log").exists() && !images.file("dump.log").exists(),
        "dump.log is not below -W"
    );
    cycle.try_restore(&images, &["--pidfile", "pid"])?.ok()?;
    ensure!(work.path().join("restore.log").exists(), "restore.log is not below -W");
    let pid = fs::read_to_string(work.path().join("pid")).context("reading the pidfile")?;
    ensure!(pid.trim() == program.pid().to_string(), "the pidfile says {pid:?}");
    program.verify()
}

/// Without -d the command stays the parent and ends with the tree's status.
fn attached() -> Result<()> {
    let program = Program::start("sleeper", &[])?;
    let images = Images::new()?;
    Cycle::new()?.dump(&program, &images)?;
    let args = ["restore", "-D", images.as_str()?, "-v4", "-o", "restore.log", "--pidfile", "pid"];
    let mut child = Engine::rcriu()?.command(&args).spawn()?;
    let command = PidFd::open(Pid::from_raw(child.id() as i32))?;
    let log = images.file("restore.log");
    let resumed = || fs::read_to_string(&log).is_ok_and(|l| l.contains("Tasks resumed"));
    ensure!(
        rcriu_tests::events::wait_file(images.path(), Some(&command), PATIENCE, resumed)?,
        "the restore ended: {}",
        fs::read_to_string(&log).unwrap_or_default()
    );
    let task = PidFd::open(Pid::from_raw(program.pid())).context("the restored task")?;
    ensure!(!command.is_dead(), "the command did not wait for its tree");
    task.kill(Signal::SIGTERM);
    command.wait_dead(PATIENCE)?;
    let status = child.wait()?;
    ensure!(program.output().ends_with("PASS\n"), "the program said {:?}", program.output());
    ensure!(status.success(), "the command ended with {status}");
    Ok(())
}

fn restore_sibling() -> Result<()> {
    let program = Program::start("sleeper", &[])?;
    let (images, cycle) = (Images::new()?, Cycle::new()?);
    cycle.dump(&program, &images)?;
    cycle.try_restore(&images, &["--restore-sibling"])?.ok()?;
    let stat = fs::read_to_string(format!("/proc/{}/stat", program.pid()))?;
    let parent: u32 =
        stat.rsplit_once(") ").and_then(|(_, r)| r.split(' ').nth(1)?.parse().ok()).context("stat")?;
    ensure!(parent == std::process::id(), "the restored task's parent is {parent}, not the caller");
    program.verify()
}

fn exec_command() -> Result<()> {
    let program = Program::start("sleeper", &[])?;
    let (images, cycle) = (Images::new()?, Cycle::new()?);
    cycle.dump(&program, &images)?;
    let args =
        ["restore", "-D", images.as_str()?, "-o", "restore.log", "--exec-cmd", "--", "/bin/echo", "executed"];
    let finished = Engine::rcriu()?.run(&args)?.ok()?;
    ensure!(finished.stdout == "executed\n", "the command printed {:?}", finished.stdout);
    program.verify()
}

fn display_stats() -> Result<()> {
    let program = Program::start("sleeper", &[])?;
    let (images, cycle) = (Images::new()?, Cycle::new()?);
    let finished = cycle.try_dump(program.pid(), &images, &["-R", "--display-stats"])?.ok()?;
    let said = format!("{}{}{}", finished.stdout, finished.stderr, finished.log).to_lowercase();
    ensure!(said.contains("pages written"), "--display-stats shows no page counts");
    program.verify()
}

/// Restores with `fd[5]` given as `resource`, asks for the verdict and gives what the program wrote to 5.
fn restored_onto(program: &Program, images: &Images, resource: &str) -> Result<String> {
    let elsewhere = program.dir().join("elsewhere");
    let file = OpenOptions::new().append(true).create(true).open(&elsewhere)?;
    let option = format!("fd[5]:{resource}");
    let dir = images.as_str()?;
    let args = ["restore", "-d", "-D", dir, "-v4", "-o", "restore.log", "--inherit-fd", &option];
    let mut command = Engine::rcriu()?.command(&args);
    with_fd(&mut command, file.into(), 5);
    Engine::rcriu()?.finish(command)?.ok()?;
    let task = PidFd::open(Pid::from_raw(program.pid())).context("the restored task")?;
    task.kill(Signal::SIGTERM);
    task.wait_dead(PATIENCE)?;
    task.reap();
    Ok(fs::read_to_string(&elsewhere)?)
}

/// A file given from outside takes the place of one that was open, by its path.
fn inherited_file() -> Result<()> {
    let program = Program::start("sleeper", &[])?;
    let images = Images::new()?;
    let out = program.dir().join("out");
    Cycle::new()?.dump(&program, &images)?;
    let said = restored_onto(&program, &images, out.to_str().context("name")?.trim_start_matches('/'))?;
    ensure!(said == "PASS\n", "the inherited file holds {said:?}, the old one {:?}", program.output());
    Ok(())
}

/// A file that the dump was told to leave to the outside.
fn external_file() -> Result<()> {
    let program = Program::start("sleeper", &[])?;
    let images = Images::new()?;
    let info = fs::read_to_string(format!("/proc/{}/fdinfo/1", program.pid()))?;
    let mount = info.lines().find_map(|l| l.strip_prefix("mnt_id:")).context("mnt_id")?.trim();
    let mount: u32 = mount.parse().context("mnt_id")?;
    let inode = fs::metadata(program.dir().join("out"))?.ino();
    let resource = format!("file[{mount:x}:{inode:x}]");
    Cycle::new()?.with_dump(&["--external", &resource]).dump(&program, &images)?;
    let said = restored_onto(&program, &images, &resource)?;
    ensure!(said == "PASS\n", "the external file holds {said:?}, the old one {:?}", program.output());
    Ok(())
}

/// A terminal of which only the slave is in the tree: named as external, given again at restore.
fn external_terminal() -> Result<()> {
    let pty = terminal_pair()?;
    let terminal = File::from(pty.slave);
    let status = terminal.metadata()?;
    let resource = format!("tty[{:x}:{:x}]", status.rdev(), status.dev());
    let program = Program::start_with(&terminal, "sleeper", &[])?;
    let images = Images::new()?;
    Cycle::new()?.with_dump(&["--external", &resource]).dump(&program, &images)?;
    let other = terminal_pair()?;
    let option = format!("fd[5]:{resource}");
    let dir = images.as_str()?;
    let args = ["restore", "-d", "-D", dir, "-v4", "-o", "restore.log", "--inherit-fd", &option];
    let mut command = Engine::rcriu()?.command(&args);
    let given = File::from(other.slave);
    let expected = given.metadata()?.rdev();
    with_fd(&mut command, given.into(), 5);
    Engine::rcriu()?.finish(command)?.ok()?;
    let now = fs::metadata(format!("/proc/{}/fd/0", program.pid()))?.rdev();
    ensure!(now == expected, "standard input is device {now:x}, not the terminal given ({expected:x})");
    program.verify()
}

/// A terminal whose ends do not reach programs by themselves.
fn terminal_pair() -> Result<OpenptyResult> {
    let pair = openpty(None, None).context("openpty")?;
    for end in [&pair.master, &pair.slave] {
        fcntl(end, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).context("F_SETFD")?;
    }
    Ok(pair)
}

/// Gives a command a descriptor under a number.
fn with_fd(command: &mut std::process::Command, fd: OwnedFd, number: i32) {
    use std::os::unix::process::CommandExt;
    // SAFETY: dup2 is async-signal-safe; the descriptor lives in the closure.
    unsafe {
        command.pre_exec(move || match libc::dup2(fd.as_raw_fd(), number) {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        })
    };
}

/// A job of a shell: the terminal's session is led from outside the tree.
fn shell_job() -> Result<()> {
    // This process plays the shell: a session leader with a terminal.
    let pty = terminal_pair()?;
    let terminal = File::from(pty.slave);
    // Closing it would hang the terminal up, and with it this process, which leads the session.
    std::mem::forget(pty.master);
    // SAFETY: an integer argument; this process leads a session without terminal.
    if unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) } != 0 {
        return Err(skip(format!("TIOCSCTTY: {}", std::io::Error::last_os_error())));
    }
    let program = Program::start_on(&terminal, "terminal", &[])?;
    let images = Images::new()?;
    let pid = program.pid().to_string();
    let engine = Engine::rcriu()?;
    // Without the option it is refused, with a hint.
    engine
        .run(&["dump", "-t", &pid, "-D", images.as_str()?, "-o", "dump.log"])?
        .refused()?
        .says(&["--shell-job"])?;
    let images = Images::new()?;
    let tree = program.tree()?;
    let before = program.state()?;
    engine
        .run(&["dump", "-t", &pid, "-D", images.as_str()?, "-v4", "-o", "dump.log", "--shell-job"])?
        .ok()?;
    wait_gone(&tree)?;
    let args = ["restore", "-d", "-D", images.as_str()?, "-v4", "-o", "restore.log", "--shell-job"];
    let mut command = engine.command(&args);
    command.stdin(terminal.try_clone()?);
    engine.finish(command)?.ok()?;
    unchanged(&before, || program.state())?;
    program.verify()
}

/// A cgroup below the first freezer that can be written; its path.
pub fn freezer() -> Result<std::path::PathBuf> {
    let name = format!("rcriu-test-{}", std::process::id());
    for (root, file) in [("/sys/fs/cgroup", "cgroup.freeze"), ("/sys/fs/cgroup/freezer", "freezer.state")] {
        let dir = std::path::Path::new(root).join(&name);
        if fs::create_dir(&dir).is_ok() {
            if dir.join(file).exists() {
                return Ok(dir);
            }
            let _ = fs::remove_dir(&dir);
        }
    }
    Err(skip("no cgroup freezer can be used here"))
}

fn freeze_cgroup() -> Result<()> {
    let cgroup = freezer()?;
    let run = || -> Result<()> {
        let program = Program::start("tree", &["2", "3"])?;
        for task in program.tree()? {
            fs::write(cgroup.join("cgroup.procs"), task.pid().to_string()).context("moving to the cgroup")?;
        }
        let before = program.state()?;
        let images = Images::new()?;
        let option = ["-R", "--freeze-cgroup", cgroup.to_str().context("name")?];
        Cycle::new()?.try_dump(program.pid(), &images, &option)?.ok()?;
        unchanged(&before, || program.state())?;
        program.verify()
    };
    let result = run();
    fs::remove_dir(&cgroup).context("removing the cgroup")?;
    result
}

fn dry_run() -> Result<()> {
    let program = Program::start("tree", &["2", "2"])?;
    let (images, cycle) = (Images::new()?, Cycle::new()?);
    cycle.try_dump(program.pid(), &images, &["-R"])?.ok()?;
    let dir = images.as_str()?;
    let taken = Engine::rcriu()?.run(&["restore", "--dry-run", "-D", dir])?;
    ensure!(taken.code.is_some_and(|c| c != 0), "a dry run with taken pids succeeds");
    let said = format!("{}{}", taken.stdout, taken.stderr);
    ensure!(said.contains(&program.pid().to_string()), "the dry run does not name the taken pid: {said}");
    let tree = program.tree()?;
    tree.iter().for_each(|t| t.kill(Signal::SIGKILL));
    wait_gone(&tree)?;
    Engine::rcriu()?.run(&["restore", "--dry-run", "-D", dir])?.ok()?;
    let json = Engine::rcriu()?.run(&["restore", "--dry-run", "--json", "-D", dir])?.ok()?;
    serde_json::from_str::<serde_json::Value>(&json.stdout).context("--json of the dry run")?;
    ensure!(program.tree()?.is_empty(), "a dry run restored something");
    Ok(())
}

/// Images of a processor that can do more than this one.
fn another_processor() -> Result<()> {
    let program = Program::start("sleeper", &[])?;
    let (images, cycle) = (Images::new()?, Cycle::new()?);
    cycle.try_dump(program.pid(), &images, &["--cpu-cap"])?.ok()?;
    let dir = ImageDir::open(images.path())?;
    let same: pb::CpuinfoEntry = dir.read_one(ImageKind::Cpuinfo, 0)?;
    let mut more = same.clone();
    let all = more.x86_entry.iter_mut().flat_map(|entry| entry.capability.iter_mut());
    all.for_each(|word| *word = u32::MAX);
    let write = |entry: &pb::CpuinfoEntry| -> Result<()> {
        let mut out = dir.writer(ImageKind::Cpuinfo, 0);
        out.write(entry)?;
        Ok(out.finish()?)
    };
    write(&more)?;
    let tree = program.tree()?;
    wait_gone(&tree)?;
    let words = ["this is", "without", "--cpu-cap"];
    cycle.try_restore(&images, &["--cpu-cap=ins"])?.refused()?.says(&words)?;
    let path = images.as_str()?;
    let check = |cap| Engine::rcriu()?.run(&["cpuinfo", "check", "-D", path, cap]);
    check("--cpu-cap=ins")?.refused()?.says(&words)?;
    Engine::rcriu()?.run(&["cpuinfo", "dump", "-D", path])?.ok()?;
    ensure!(same == dir.read_one(ImageKind::Cpuinfo, 0)?, "cpuinfo dump writes something else than dump");
    check("--cpu-cap=cpu")?.ok()?;
    cycle.try_restore(&images, &["--cpu-cap"])?.ok()?;
    program.verify()
}

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("options: --cpu-cap keeps images from a processor that lacks something", another_processor),
        Case::new("options: --leave-stopped stops the tree where it is", leave_stopped),
        Case::new("options: restore --leave-stopped stops the tree at its start", restore_stopped),
        Case::new("options: -W takes the logs, --pidfile the pid", work_folder_and_pidfile),
        Case::new("options: restore without -d waits for the tree", attached),
        Case::new("options: --restore-sibling makes the tree the caller's child", restore_sibling),
        Case::new("options: --exec-cmd runs a command as the tree's parent", exec_command),
        Case::new("options: --display-stats prints what was done", display_stats),
        Case::new("options: --inherit-fd puts a file in a file's place", inherited_file),
        Case::new("options: --external leaves a file to the outside", external_file),
        Case::new("options: --external leaves a terminal to the outside", external_terminal),
        Case::new("options: --shell-job keeps a program on its terminal", shell_job),
        Case::new("options: --freeze-cgroup freezes through the cgroup", freeze_cgroup),
        Case::new("options: restore --dry-run tells what would fail", dry_run),
    ]
}
