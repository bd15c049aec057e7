//! Dumps and restores that fail or are interrupted: the target goes on as it was, nothing is left behind.

mod dumps;
mod killed;
mod restores;

use std::process::Child;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rcriu_tests::events::{PATIENCE, PidFd, readable};
use rcriu_tests::state::{State, descendants, processes};
use rcriu_tests::{Case, Cycle, Engine, Images, Program};

/// A command of the engine that runs while the case goes on.
pub struct Running {
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

    pub fn dump(program: &Program, images: &Images, more: &[&str]) -> Result<Running> {
        let pid = program.pid().to_string();
        let mut args = vec!["dump", "-t", &pid, "-D", images.as_str()?, "-v4", "-o", "dump.log"];
        args.extend(more);
        Running::start(&args)
    }

    fn restore(images: &Images) -> Result<Running> {
        Running::restore_with(images, &[])
    }

    pub fn restore_with(images: &Images, more: &[&str]) -> Result<Running> {
        let args = ["restore", "-d", "-D", images.as_str()?, "-v4", "-o", "restore.log"];
        Running::start(&[&args, more].concat())
    }

    pub fn kill(&self, signal: Signal) {
        self.pidfd.kill(signal);
    }

    /// Exit code; None when a signal ended it.
    pub fn end(mut self) -> Result<Option<i32>> {
        if self.pidfd.wait_dead(PATIENCE).is_err() {
            self.pidfd.kill(Signal::SIGKILL);
            self.child.wait()?;
            bail!("the command hangs");
        }
        Ok(self.child.wait()?.code())
    }

    /// Lets it run for a while, or to its end if that comes first.
    pub fn for_a_while(&self, microseconds: u64) -> Result<()> {
        use std::os::fd::AsFd;
        readable(&[self.pidfd.as_fd()], Duration::from_micros(microseconds)).map(drop)
    }
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

/// Takes the exit status of children that have ended: as the first process of its pid namespace a case inherits what a
/// killed command leaves, and a dead process keeps the pid namespace it is in from ending.
pub fn take_dead() {
    while waitpid(None, Some(WaitPidFlag::WNOHANG)).is_ok_and(|status| status != WaitStatus::StillAlive) {}
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
    // A process whose parent ends while /proc is walked may be overlooked: only a walk that finds nobody counts.
    loop {
        let left = below()?;
        for pid in &left {
            if let Ok(fd) = PidFd::open(Pid::from_raw(*pid)) {
                fd.wait_dead(Duration::from_secs(5))
                    .with_context(|| format!("{what} left pid {pid} behind"))?;
            }
        }
        take_dead();
        if left.is_empty() {
            return Ok(());
        }
    }
}

pub fn cases() -> Vec<Case> {
    let mut cases = dumps::cases();
    cases.extend(killed::cases());
    cases.extend(restores::cases());
    cases
}
