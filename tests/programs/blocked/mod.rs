//! Threads that sit in a system call while they are dumped: the call must go on, not fail with EINTR, which
//! a stop and continue would never have shown them.
//!
//! # Safety
//!
//! The calls are made raw, on words of mappings that stay and on structures of the calling thread.

mod ends;
mod files;
mod kinds;
mod locks;
mod queues;
mod sockets;
mod timed;

pub use ends::run as ends;
pub use files::{lock_of_another, run as files};
pub use kinds::run as kinds;
pub use locks::run as locks;
pub use queues::{requests, run as queues};
pub use sockets::{connecting, run as sockets};
pub use timed::{filtered, resumed, run as timed};

use std::os::fd::OwnedFd;
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

/// A call that ends with EINTR once a signal was handled.
fn until_handled(result: Result<(), Errno>) -> Result<(), Errno> {
    match result {
        Err(Errno::EINTR) => Ok(()),
        Ok(()) => Err(Errno::UnknownErrno),
        other => other,
    }
}

/// Sends a signal to a caller's thread alone.
fn tell_thread(caller: &Caller, signal: i32) -> Check {
    // SAFETY: a signal to a thread of this process.
    raw(unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), caller.tid, signal) }).context("tgkill")
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
