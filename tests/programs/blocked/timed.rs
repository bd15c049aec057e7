//! Calls that the kernel restarts through a restart block or not at all.
//!
//! # Safety
//!
//! As in the module above: structures outlive the calls they are given to.

use std::os::fd::AsRawFd;

use anyhow::Context;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, pipe, write};

use super::{Caller, caller, futex, raw, returned, still_in};
use crate::kit::crew::member;
use crate::kit::{Check, mem, proc_line, rest, same};

/// Far away.
const FAR: libc::timespec = libc::timespec { tv_sec: 3000, tv_nsec: 0 };

fn sleep() -> Result<(), Errno> {
    // SAFETY: the request outlives the call; no remainder is asked for.
    raw(unsafe { libc::syscall(libc::SYS_nanosleep, &FAR, 0) })
}

fn sleep_with_rest() -> Result<(), Errno> {
    let mut rest = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: both outlive the call.
    raw(unsafe { libc::clock_nanosleep(libc::CLOCK_BOOTTIME, 0, &FAR, &mut rest) }.into())
}

fn poll(fd: i32, timeout: i32) -> Result<(), Errno> {
    let mut fd = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one structure that outlives the call.
    raw(unsafe { libc::poll(&mut fd, 1, timeout) }.into())
}

fn select(fd: i32) -> Result<(), Errno> {
    // SAFETY: an all-zero set is an empty set.
    let mut set: libc::fd_set = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is below FD_SETSIZE.
    unsafe { libc::FD_SET(fd, &mut set) };
    let mut timeout = libc::timeval { tv_sec: 3000, tv_usec: 0 };
    let none = std::ptr::null_mut();
    // SAFETY: set and timeout outlive the call.
    raw(unsafe { libc::select(fd + 1, &mut set, none, none, &mut timeout) }.into())
}

/// Sleepers, who cannot be woken, and calls that one byte and one word end.
fn callers(fd: i32, at: usize) -> anyhow::Result<(Vec<Caller>, Vec<Caller>)> {
    let sleepers = vec![
        caller("nanosleep", sleep)?,
        caller("clock_nanosleep that asks for the rest", sleep_with_rest)?,
        caller("poll of nothing", || {
            // SAFETY: no structure at all.
            raw(unsafe { libc::poll(std::ptr::null_mut(), 0, 3_000_000) }.into())
        })?,
    ];
    let others = vec![
        caller("poll without timeout", move || poll(fd, -1))?,
        caller("poll with a timeout", move || poll(fd, 3_000_000))?,
        caller("futex with a timeout", move || futex(at, libc::FUTEX_WAIT, 0, Some(&FAR)))?,
    ];
    Ok((sleepers, others))
}

/// nanosleep, poll, select, futex and epoll_wait with a timeout far away, poll without.
pub fn run(_: &[String]) -> Check {
    let (from, to) = pipe().context("pipe")?;
    let fd = from.as_raw_fd();
    let word = mem::shared(mem::PAGE)?;
    let at = word.at;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("epoll")?;
    epoll.add(&from, EpollEvent::new(EpollFlags::EPOLLIN, 1)).context("epoll_ctl")?;
    let (sleepers, mut others) = callers(fd, at)?;
    others.push(caller("select with a timeout", move || select(fd))?);
    others.push(caller("epoll_wait with a timeout", move || {
        let timeout = EpollTimeout::try_from(3_000_000).unwrap_or(EpollTimeout::NONE);
        epoll.wait(&mut [EpollEvent::empty()], timeout).map(drop)
    })?);
    rest()?;
    still_in(&sleepers)?;
    still_in(&others)?;
    write(&to, b"x").context("write")?;
    word.atomic(0).store(1, std::sync::atomic::Ordering::SeqCst);
    futex(at, libc::FUTEX_WAKE, 1, None).context("FUTEX_WAKE")?;
    returned(others)
}

/// The same calls, interrupted before: the process was stopped and continued.
pub fn resumed(_: &[String]) -> Check {
    let me = Pid::this();
    let stopper = member(move || {
        rest()?;
        kill(me, Signal::SIGSTOP).context("SIGSTOP")?;
        while !proc_line(&format!("/proc/{me}/status"), "State")?.starts_with('T') {
            std::thread::yield_now();
        }
        kill(me, Signal::SIGCONT).context("SIGCONT")
    })?;
    let (from, to) = pipe().context("pipe")?;
    let word = mem::shared(mem::PAGE)?;
    let at = word.at;
    let (sleepers, others) = callers(from.as_raw_fd(), at)?;
    stopper.ask()?;
    for caller in sleepers.iter().chain(&others) {
        // First word: the number of the call it is in.
        let file = format!("/proc/self/task/{}/syscall", caller.tid);
        loop {
            let text = std::fs::read_to_string(&file).context("syscall")?;
            if text.starts_with(&format!("{} ", libc::SYS_restart_syscall)) {
                break;
            }
            std::thread::yield_now();
        }
    }
    rest()?;
    still_in(&sleepers)?;
    still_in(&others)?;
    write(&to, b"x").context("write")?;
    word.atomic(0).store(1, std::sync::atomic::Ordering::SeqCst);
    futex(at, libc::FUTEX_WAKE, 1, None).context("FUTEX_WAKE")?;
    returned(others)
}

/// From here on restart_syscall(2) kills the whole process.
fn forbid_restart() -> Result<(), Errno> {
    const RETURN: u16 = 0x06;
    let op = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut list = [
        op(0x20, 0, 0, 0),
        op(0x15, 0, 1, libc::SYS_restart_syscall as u32),
        op(RETURN, 0, 0, 0x8000_0000),
        op(RETURN, 0, 0, 0x7fff_0000),
    ];
    let filter = libc::sock_fprog { len: list.len() as u16, filter: list.as_mut_ptr() };
    // SAFETY: the program outlives the calls.
    unsafe {
        raw(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into())?;
        raw(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &filter).into())
    }
}

/// Threads whose filter kills for restart_syscall(2).
pub fn filtered(_: &[String]) -> Check {
    let (from, to) = pipe().context("pipe")?;
    let fd = from.as_raw_fd();
    let word = mem::shared(mem::PAGE)?;
    let at = word.at;
    let under = |call: fn() -> Result<(), Errno>| move || forbid_restart().and_then(|()| call());
    let sleepers = [caller("nanosleep", under(sleep))?, caller("clock_nanosleep", under(sleep_with_rest))?];
    let others = vec![
        caller("poll", move || forbid_restart().and_then(|()| poll(fd, 3_000_000)))?,
        caller("futex", move || forbid_restart().and_then(|()| futex(at, libc::FUTEX_WAIT, 0, Some(&FAR))))?,
    ];
    rest()?;
    still_in(&sleepers)?;
    still_in(&others)?;
    write(&to, b"x").context("write")?;
    word.atomic(0).store(1, std::sync::atomic::Ordering::SeqCst);
    futex(at, libc::FUTEX_WAKE, 1, None).context("FUTEX_WAKE")?;
    same(
        "filters",
        proc_line(&format!("/proc/self/task/{}/status", sleepers[0].tid), "Seccomp")?.as_str(),
        "2",
    )?;
    returned(others)
}
