//! A program that is taken through dump and restore, in its own session and scratch folder.
//!
//! # Safety
//!
//! pre_exec runs setsid(2) or close_range(2) between fork and exec; nothing there allocates or locks.

use std::cell::Cell;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::engine::build_folder;
use crate::events::{PATIENCE, PidFd, wait_file};
use crate::home::{Container, Home};
use crate::runner::skip;
use crate::state::{State, descendants, processes};

/// A started tree. Dropping it kills every process of it by pid and reaps them.
pub struct Program {
    /// Another after a restore if it has a pid namespace of its own.
    pid: Cell<Pid>,
    scratch: Scratch,
    /// Its working folder, if that is not the scratch folder.
    dir: Option<PathBuf>,
    /// The root of its mount namespace.
    root: Option<PathBuf>,
    home: Option<Home>,
    checks_itself: bool,
}

/// The binary of tests/programs: beside this one, unless RCRIU_TEST_PROGRAM names it.
pub(crate) fn programs() -> Result<PathBuf> {
    match std::env::var_os("RCRIU_TEST_PROGRAM") {
        Some(bin) => Ok(PathBuf::from(bin)),
        None => Ok(build_folder()?.join("rcriu-test-program")),
    }
}

/// Where a program starts: in a session of its own, or in our session and group, as a foreground job.
#[derive(Clone, Copy)]
enum Place {
    Session,
    Job,
}

/// A place for files in memory.
const MEMORY: &str = "/dev/shm";

/// A folder that is removed with the case.
pub struct Scratch {
    dir: tempfile::TempDir,
}

impl Scratch {
    pub fn new() -> Result<Scratch> {
        Scratch::below(&std::env::temp_dir())
    }

    /// In memory, where there is such a place.
    pub fn in_memory() -> Result<Scratch> {
        let tmpfs = nix::sys::statfs::statfs(MEMORY)
            .is_ok_and(|s| s.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC);
        if tmpfs { Scratch::below(Path::new(MEMORY)) } else { Scratch::new() }
    }

    fn below(parent: &Path) -> Result<Scratch> {
        let dir =
            tempfile::Builder::new().prefix("rcriu-test.").tempdir_in(parent).context("scratch folder")?;
        // Programs that give up root still work here.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).context("chmod")?;
        Ok(Scratch { dir })
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Program {
    /// Starts program `kind` of tests/programs and waits until its state is set up.
    pub fn start(kind: &str, args: &[&str]) -> Result<Program> {
        let null = File::open("/dev/null").context("/dev/null")?;
        Program::start_in(Place::Session, &null, kind, args)
    }

    /// Starts program `kind` as a job of this process's own session, its input on the terminal given.
    pub fn start_on(terminal: &File, kind: &str, args: &[&str]) -> Result<Program> {
        Program::start_in(Place::Job, terminal, kind, args)
    }

    /// Starts program `kind` in a session of its own, with this input.
    pub fn start_with(input: &File, kind: &str, args: &[&str]) -> Result<Program> {
        Program::start_in(Place::Session, input, kind, args)
    }

    fn start_in(place: Place, input: &File, kind: &str, args: &[&str]) -> Result<Program> {
        let mut command = Command::new(programs()?);
        command.arg(kind).args(args).stdin(input.try_clone()?);
        Program::ready(Program::spawn_in(command, place)?, kind)
    }

    /// Program `kind`, as `command` starts it, in a session of its own.
    pub fn start_by(mut command: Command, kind: &str) -> Result<Program> {
        command.stdin(File::open("/dev/null").map(Stdio::from)?);
        Program::ready(Program::spawn_in(command, Place::Session)?, kind)
    }

    fn ready(mut program: Program, kind: &str) -> Result<Program> {
        program.checks_itself = true;
        program.wait_line("READY").with_context(|| format!("setting up {kind}"))?;
        Ok(program)
    }

    /// Starts any command in a session of its own, its output going to a file.
    pub fn spawn(mut command: Command) -> Result<Program> {
        command.stdin(File::open("/dev/null").map(Stdio::from)?);
        Program::spawn_in(command, Place::Session)
    }

    fn spawn_in(mut command: Command, place: Place) -> Result<Program> {
        let scratch = Scratch::new()?;
        let out =
            OpenOptions::new().append(true).create(true).open(scratch.path().join("out")).context("out")?;
        // Programs that are not root's open it again when they are restored.
        out.set_permissions(fs::Permissions::from_mode(0o666)).context("out")?;
        command.current_dir(scratch.path()).stdout(out.try_clone()?).stderr(out);
        // SAFETY: setsid is async-signal-safe and touches no memory.
        unsafe {
            command.pre_exec(move || match place {
                Place::Session => nix::unistd::setsid().map(drop).map_err(Into::into),
                Place::Job => Ok(()),
            })
        };
        let child = command.spawn().with_context(|| format!("starting {:?}", command.get_program()))?;
        let pid = Cell::new(Pid::from_raw(child.id() as i32));
        Ok(Program { pid, scratch, dir: None, root: None, home: None, checks_itself: false })
    }

    /// Starts program `kind` in namespaces of its own.
    pub fn start_inside(home: Home, kind: &str, args: &[&str]) -> Result<Program> {
        Program::start_at_home(home, None, kind, args)
    }

    /// Starts program `kind` as a container.
    pub fn start_container(home: Home, container: &Container, kind: &str, args: &[&str]) -> Result<Program> {
        Program::start_at_home(home, Some(container), kind, args)
    }

    fn start_at_home(
        home: Home,
        container: Option<&Container>,
        kind: &str,
        args: &[&str],
    ) -> Result<Program> {
        let (scratch, program) = (Scratch::new()?, programs()?);
        let root = home.lay(scratch.path(), &program, container)?;
        let args = [&[kind], args].concat();
        let pid = home.launch(scratch.path(), root.as_deref(), (&program, &args), container)?;
        let dir = root.as_ref().map(|root| root.join("scratch"));
        let pid = Cell::new(pid);
        let program = Program { pid, scratch, dir, root, home: Some(home), checks_itself: true };
        program.wait_line("READY").with_context(|| format!("setting up {kind}"))?;
        Ok(program)
    }

    pub fn pid(&self) -> i32 {
        self.pid.get().as_raw()
    }

    /// Whether it has namespaces of its own.
    pub fn is_at_home(&self) -> bool {
        self.home.is_some()
    }

    /// A restore has given its root task this pid.
    pub fn moved(&self, pid: i32) {
        self.pid.set(Pid::from_raw(pid));
    }

    /// The root of its mount namespace, if it has one of its own.
    pub fn root(&self) -> Option<&Path> {
        self.root.as_deref()
    }

    /// The folder that it has on `/outside`.
    pub fn outside(&self) -> PathBuf {
        self.scratch.path().join("outside")
    }

    /// What dump and restore must be told of its namespaces.
    pub fn options(&self) -> Vec<String> {
        let root = self.root.iter().flat_map(|root| ["--root".into(), root.to_string_lossy().into_owned()]);
        root.collect()
    }

    pub fn dir(&self) -> &Path {
        self.dir.as_deref().unwrap_or(self.scratch.path())
    }

    /// Everything the program has printed.
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.out()).unwrap_or_default()).into()
    }

    fn out(&self) -> PathBuf {
        self.dir().join("out")
    }

    /// Waits until a line of the output starts with `start`. A program that says SKIP skips the case.
    pub fn wait_line(&self, start: &str) -> Result<()> {
        let pidfd = PidFd::open(self.pid.get()).context("pidfd_open of the program")?;
        let has = || self.output().lines().any(|l| l.starts_with(start));
        if wait_file(self.dir(), Some(&pidfd), PATIENCE, has)? {
            return Ok(());
        }
        let out = self.output();
        pidfd.reap();
        match out.lines().find_map(|l| l.strip_prefix("SKIP ")) {
            Some(why) => Err(skip(why)),
            None => bail!("the program ended early; it said: {}", out.trim()),
        }
    }

    /// The tree as seen from outside.
    pub fn state(&self) -> Result<State> {
        State::of(self.pid())
    }

    /// Has the program verify its state and end.
    pub fn verify(&self) -> Result<()> {
        let pidfd = PidFd::open(self.pid.get()).context("the program is gone before it could verify")?;
        if !self.checks_itself {
            bail!("only programs of tests/programs verify themselves");
        }
        pidfd.kill(Signal::SIGTERM);
        pidfd
            .wait_dead(PATIENCE)
            .with_context(|| format!("the program hangs; it said: {}", self.output().trim()))?;
        let ended = pidfd.reap();
        let out = self.output();
        let last = out.lines().last().unwrap_or("");
        match ended {
            _ if last.starts_with("SKIP ") => Err(skip(&last["SKIP ".len()..])),
            Some((true, 0)) if last == "PASS" => Ok(()),
            Some((true, code)) => bail!("the program found (exit code {code}):\n{}", out.trim()),
            Some((false, signal)) => bail!("the program died of signal {signal}; it said:\n{}", out.trim()),
            None => bail!("the program is not our child any more; it said:\n{}", out.trim()),
        }
    }

    /// Every live process of the tree, root first, held by descriptor.
    pub fn tree(&self) -> Result<Vec<PidFd>> {
        let mut pids = vec![self.pid()];
        pids.extend(descendants(&processes()?, self.pid()));
        Ok(pids.into_iter().filter_map(|pid| PidFd::open(Pid::from_raw(pid)).ok()).collect())
    }
}

/// Has what `command` starts begin without descriptors of whoever started the tests, which no dump could keep.
pub fn without_inherited(command: &mut Command) {
    const CLOEXEC: libc::c_uint = 4;
    // SAFETY: the call gets numbers only. Before Linux 5.11 it does nothing.
    unsafe {
        command.pre_exec(|| {
            libc::syscall(libc::SYS_close_range, 3, u32::MAX, CLOEXEC);
            Ok(())
        })
    };
}

/// Waits until all of a tree is dead and reaps what has become ours.
pub fn wait_gone(tree: &[PidFd]) -> Result<()> {
    for process in tree {
        process.wait_dead(PATIENCE)?;
    }
    // All are dead, so every orphan among them has been given to us, the subreaper.
    tree.iter().for_each(|process| _ = process.reap());
    Ok(())
}

impl Drop for Program {
    fn drop(&mut self) {
        // A tree that is killed from the top may fork while it dies: look until nothing is left.
        for _ in 0..100 {
            let Ok(tree) = self.tree() else { return };
            if tree.is_empty() {
                return;
            }
            tree.iter().for_each(|process| process.kill(Signal::SIGKILL));
            let _ = wait_gone(&tree);
        }
    }
}
