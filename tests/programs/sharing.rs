//! Who shares what: descriptors by fork and dup, a descriptor table by CLONE_FILES; folders by CLONE_FS.
//!
//! # Safety
//!
//! clone(2) without CLONE_VM forks like fork(2), from a process of one thread.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;

use anyhow::{Context, bail};
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;

use crate::kit::crew::{Member, member, wait};
use crate::kit::{Check, rest, same, sys, wait_term, write};

/// A member made by clone(2) with these flags; it waits for SIGTERM, runs `after`, and ends.
fn sharing(flags: i32, after: impl FnOnce() -> Check) -> anyhow::Result<Pid> {
    living(flags, || wait_term().and_then(|()| after()))
}

/// A member made by clone(2) with these flags, that ends after `life`.
fn living(flags: i32, life: impl FnOnce() -> Check) -> anyhow::Result<Pid> {
    // SAFETY: one thread, own copy of the memory; the child ends by _exit.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags | libc::SIGCHLD, 0, 0, 0, 0) };
    if sys("clone", pid)? == 0 {
        let ok = life();
        if let Err(e) = &ok {
            println!("FAIL in pid {}: {e:#}", Pid::this());
        }
        // SAFETY: ends the process.
        unsafe { libc::_exit(i32::from(ok.is_err())) }
    }
    Ok(Pid::from_raw(pid as i32))
}

fn finish(pid: Pid) -> Check {
    Member { pid }.ask()?;
    match wait(pid)? {
        WaitStatus::Exited(_, 0) => Ok(()),
        other => bail!("member {pid} ended with {other:?}"),
    }
}

/// Descriptors and tables of them.
pub fn run(_: &[String]) -> Check {
    write("data", b"0123456789abcdef")?;
    let mut by_fork = File::open("data").context("open")?;
    by_fork.seek(SeekFrom::Start(1)).context("seek")?;
    let mut by_dup = by_fork.try_clone().context("dup")?;
    let forked = {
        let mut inherited = by_fork.try_clone().context("dup")?;
        member(move || {
            rest()?;
            let mut two = [0; 2];
            inherited.read_exact(&mut two).context("read")?;
            same("read by the forked member", &two, b"12")
        })?
    };
    let in_table = sharing(libc::CLONE_FILES, || {
        let opened = File::open("data").context("open")?;
        // SAFETY: two descriptor numbers; 77 is free.
        sys("dup2", unsafe { libc::dup2(opened.as_raw_fd(), 77) }).map(drop)
    })?;
    let alone = sharing(0, || nix::unistd::chdir("/").context("chdir"))?;
    rest()?;
    forked.verify()?;
    let mut two = [0; 2];
    by_dup.read_exact(&mut two).context("read")?;
    same("read by the dup, after the member", &two, b"34")?;
    same("position seen by all", by_fork.stream_position().context("seek")?, 5)?;
    finish(in_table)?;
    // SAFETY: an integer; asks for flags.
    sys("fcntl", unsafe { libc::fcntl(77, libc::F_GETFD) })
        .context("descriptor opened in the shared table")?;
    finish(alone)
}

/// A descriptor table shared with a child of a child, which itself has one of its own by now.
pub fn grandchild(_: &[String]) -> Check {
    let (from, to) = nix::unistd::pipe().context("pipe")?;
    let between = living(libc::CLONE_FILES, || {
        let below = sharing(libc::CLONE_FILES, || Ok(()))?;
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FILES).context("unshare")?;
        nix::unistd::write(&to, b"x").context("write")?;
        wait_term()?;
        finish(below)
    })?;
    nix::unistd::read(&from, &mut [0]).context("read")?;
    rest()?;
    finish(between)
}

/// Working folder, root and umask shared by CLONE_FS.
pub fn folders(_: &[String]) -> Check {
    std::fs::create_dir("below").context("mkdir")?;
    let sharer = sharing(libc::CLONE_FS, || {
        nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o011));
        nix::unistd::chdir("below").context("chdir")
    })?;
    rest()?;
    finish(sharer)?;
    same(
        "folder changed by the sharer",
        std::env::current_dir().context("getcwd")?.ends_with("below"),
        true,
    )?;
    let mask = nix::sys::stat::umask(nix::sys::stat::Mode::empty());
    same("umask changed by the sharer", mask.bits(), 0o011)
}
