//! Threads that sit in a system call while they are dumped: the call must go on, not fail with EINTR, which
//! a stop and continue would never have shown them.
//!
//! # Safety
//!
//! The calls are made raw, on words of mappings that stay and on structures of the calling thread.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use nix::errno::Errno;
use nix::sys::wait::waitpid;
use nix::unistd::{pipe, read, write};

use crate::kit::crew::member;
use crate::kit::{Check, mem, proc_line, rest, same};

/// A thread in a call, and where its result arrives.
struct Caller {
    name: &'static str,
    tid: i32,
    result: Receiver<Result<(), Errno>>,
}

fn caller(
    name: &'static str,
    call: impl FnOnce() -> Result<(), Errno> + Send + 'static,
) -> anyhow::Result<Caller> {
    let ((tell, tid), (done, result)) = (channel(), channel());
    std::thread::spawn(move || {
        let _ = tell.send(nix::unistd::gettid().as_raw());
        let _ = done.send(call());
    });
    let tid = tid.recv().context("a caller died")?;
    // It is in the call once it sleeps: /proc shows it.
    loop {
        let state = proc_line(&format!("/proc/self/task/{tid}/status"), "State")?;
        if state.starts_with('S') {
            break;
        }
        std::thread::yield_now();
    }
    Ok(Caller { name, tid, result })
}

fn still_in(callers: &[Caller]) -> Check {
    for caller in callers {
        match caller.result.try_recv() {
            Err(std::sync::mpsc::TryRecvError::Empty) => {}
            Ok(r) => {
                bail!("{} (thread {}) returned {r:?} although nothing happened", caller.name, caller.tid)
            }
            Err(e) => bail!("{}: {e}", caller.name),
        }
    }
    Ok(())
}

fn returned(callers: Vec<Caller>) -> Check {
    for caller in callers {
        let result = caller.result.recv_timeout(Duration::from_secs(30));
        let result = result.map_err(|_| anyhow!("{} never returned", caller.name))?;
        same(caller.name, result, Ok(()))?;
    }
    Ok(())
}

fn raw(r: i64) -> Result<(), Errno> {
    Errno::result(r).map(drop)
}

fn futex(at: usize, op: i32, value: u32, timeout: Option<&libc::timespec>) -> Result<(), Errno> {
    let timeout = timeout.map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: `at` is a word of a mapping that stays; the timeout outlives the call.
    raw(unsafe { libc::syscall(libc::SYS_futex, at, op, value, timeout, 0, 0) })
}

fn read_one(from: &OwnedFd) -> Result<(), Errno> {
    read(from, &mut [0]).map(drop)
}

/// Calls without an end of their own: read, write, futex, wait4.
pub fn run(_: &[String]) -> Check {
    // A member must be forked before there are threads.
    let child = member(rest)?;
    let pid = child.pid;
    let (a_from, a_to) = pipe().context("pipe")?;
    let (c_from, c_to) = pipe().context("pipe")?;
    nix::fcntl::fcntl(&c_to, nix::fcntl::FcntlArg::F_SETPIPE_SZ(4096)).context("F_SETPIPE_SZ")?;
    write(&c_to, &[7; 4096]).context("write")?;
    let word = mem::shared(mem::PAGE)?;
    let at = word.at;
    let callers = vec![
        caller("read of an empty pipe", move || read_one(&a_from))?,
        caller("write to a full pipe", move || write(&c_to, b"x").map(drop))?,
        caller("futex without timeout", move || futex(at, libc::FUTEX_WAIT, 0, None))?,
        caller("wait4", move || waitpid(pid, Some(nix::sys::wait::WaitPidFlag::__WALL)).map(drop))?,
    ];
    rest()?;
    still_in(&callers)?;
    write(&a_to, b"a").context("write")?;
    // The pipe takes more once a whole page of it is free.
    let mut page = [0; 4096];
    let n = read(&c_from, &mut page).context("read")?;
    same("what was in the full pipe", (n, page), (4096, [7; 4096]))?;
    word.atomic(0).store(1, std::sync::atomic::Ordering::SeqCst);
    futex(at, libc::FUTEX_WAKE, 1, None).context("FUTEX_WAKE")?;
    child.ask()?;
    returned(callers)
}

/// Calls that the kernel restarts through a restart block or not at all: nanosleep, poll, select, futex and
/// epoll_wait with a timeout far away, poll without.
pub fn timed(_: &[String]) -> Check {
    let (from, to) = pipe().context("pipe")?;
    let fd = from.as_raw_fd();
    let word = mem::shared(mem::PAGE)?;
    let at = word.at;
    let epoll =
        nix::sys::epoll::Epoll::new(nix::sys::epoll::EpollCreateFlags::EPOLL_CLOEXEC).context("epoll")?;
    let event = nix::sys::epoll::EpollEvent::new(nix::sys::epoll::EpollFlags::EPOLLIN, 1);
    epoll.add(&from, event).context("epoll_ctl")?;
    let far = libc::timespec { tv_sec: 3000, tv_nsec: 0 };
    let sleeper = caller("nanosleep", move || {
        // SAFETY: the request outlives the call; no remainder is asked for.
        raw(unsafe { libc::nanosleep(&far, std::ptr::null_mut()) }.into())
    })?;
    let callers = vec![
        caller("poll without timeout", move || {
            let mut fd = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
            // SAFETY: one structure that outlives the call.
            raw(unsafe { libc::poll(&mut fd, 1, -1) }.into())
        })?,
        caller("poll with a timeout", move || {
            let mut fd = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
            // SAFETY: one structure that outlives the call.
            raw(unsafe { libc::poll(&mut fd, 1, 3_000_000) }.into())
        })?,
        caller("select with a timeout", move || {
            // SAFETY: an all-zero set is an empty set.
            let mut set: libc::fd_set = unsafe { std::mem::zeroed() };
            // SAFETY: the descriptor is below FD_SETSIZE.
            unsafe { libc::FD_SET(fd, &mut set) };
            let mut timeout = libc::timeval { tv_sec: 3000, tv_usec: 0 };
            let none = std::ptr::null_mut();
            // SAFETY: set and timeout outlive the call.
            raw(unsafe { libc::select(fd + 1, &mut set, none, none, &mut timeout) }.into())
        })?,
        caller("futex with a timeout", move || futex(at, libc::FUTEX_WAIT, 0, Some(&far)))?,
        caller("epoll_wait with a timeout", move || {
            let mut events = [nix::sys::epoll::EpollEvent::empty()];
            epoll
                .wait(
                    &mut events,
                    nix::sys::epoll::EpollTimeout::try_from(3_000_000)
                        .unwrap_or(nix::sys::epoll::EpollTimeout::NONE),
                )
                .map(drop)
        })?,
    ];
    rest()?;
    still_in(std::slice::from_ref(&sleeper))?;
    still_in(&callers)?;
    write(&to, b"x").context("write")?;
    word.atomic(0).store(1, std::sync::atomic::Ordering::SeqCst);
    futex(at, libc::FUTEX_WAKE, 1, None).context("FUTEX_WAKE")?;
    returned(callers)
}
