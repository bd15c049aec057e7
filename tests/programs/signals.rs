//! Signals that are pending when the dump comes: for the process, for one thread, with values, in order;
//! and tasks that were stopped.
//!
//! # Safety
//!
//! sigqueue-like calls get siginfo structures of the kernel's size; sigtimedwait(2) fills one.

use std::sync::mpsc;

use anyhow::{Context, anyhow, bail};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, gettid};

use crate::kit::crew::member;
use crate::kit::{Check, rest, same, sys};

/// Number, code, value, sender.
type Taken = (i32, i32, usize, i32);

fn queue(tid: Option<Pid>, signal: i32, value: usize) -> Check {
    // SAFETY: an all-zero siginfo is a valid value.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    info.si_signo = signal;
    info.si_code = libc::SI_QUEUE;
    // SAFETY: for SI_QUEUE the kernel reads pid, uid and value at these places of the union.
    unsafe {
        let fields = (&raw mut info).cast::<i32>();
        fields.add(4).write(std::process::id() as i32);
        (&raw mut info).cast::<usize>().add(3).write(value);
    }
    let pid = std::process::id() as i32;
    // SAFETY: integers and a siginfo that outlives the call.
    let r = unsafe {
        match tid {
            Some(tid) => libc::syscall(libc::SYS_rt_tgsigqueueinfo, pid, tid.as_raw(), signal, &info),
            None => libc::syscall(libc::SYS_rt_sigqueueinfo, pid, signal, &info),
        }
    };
    sys("rt_sigqueueinfo", r).map(drop)
}

/// Takes pending signals until there are none.
fn take_all() -> anyhow::Result<Vec<Taken>> {
    // SAFETY: an empty set filled by sigfillset; SIGTERM taken out.
    let set = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut set);
        libc::sigdelset(&mut set, libc::SIGTERM);
        set
    };
    let mut taken = Vec::new();
    loop {
        // SAFETY: an all-zero siginfo is a valid value, filled by the call.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: all three outlive the call.
        if unsafe { libc::sigtimedwait(&set, &mut info, &now) } < 0 {
            return Ok(taken);
        }
        // SAFETY: every signal sent here carries a sender; a value is read as whatever the union holds.
        let (pid, value) = unsafe { (info.si_pid(), info.si_value().sival_ptr as usize) };
        let value = if info.si_code == libc::SI_QUEUE { value } else { 0 };
        taken.push((info.si_signo, info.si_code, value, pid));
    }
}

/// Pending for the process and for each of two threads.
pub fn run(_: &[String]) -> Check {
    // Real-time signals too: nix's set of all blocks what the kernel has.
    let mut old = SigSet::empty();
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), Some(&mut old)).context("sigprocmask")?;
    let me = std::process::id() as i32;
    let rt = libc::SIGRTMIN();

    let (ready, is_ready) = mpsc::channel();
    let (go, going) = mpsc::channel::<()>();
    let thread = std::thread::spawn(move || -> Check {
        let tid = gettid();
        queue(Some(tid), libc::SIGUSR1, 41)?;
        queue(Some(tid), rt + 2, 42)?;
        queue(Some(tid), rt + 2, 43)?;
        ready.send(()).map_err(|e| anyhow!("{e}"))?;
        going.recv().map_err(|e| anyhow!("{e}"))?;
        let own: Vec<Taken> = take_all()?.into_iter().filter(|t| (41..=43).contains(&t.2)).collect();
        let q = libc::SI_QUEUE;
        let sent = [(libc::SIGUSR1, q, 41, me), (rt + 2, q, 42, me), (rt + 2, q, 43, me)];
        same("signals pending for a thread", own, sent.to_vec())
    });
    is_ready.recv().map_err(|e| anyhow!("{e}"))?;
    kill(Pid::this(), Signal::SIGHUP).context("kill")?;
    kill(Pid::this(), Signal::SIGCHLD).context("kill")?;
    queue(None, rt + 1, 0xdead_beef_cafe)?;
    queue(None, rt + 1, 2)?;
    queue(None, rt + 1, 1)?;
    queue(None, libc::SIGUSR2, 7)?;
    queue(Some(gettid()), libc::SIGWINCH, 8)?;
    rest()?;

    let mut taken = take_all()?;
    taken.sort_by_key(|t| (t.0, usize::MAX - t.2.min(3)));
    let q = libc::SI_QUEUE;
    let u = libc::SI_USER;
    let mut sent = vec![
        (libc::SIGHUP, u, 0, me),
        (libc::SIGUSR2, q, 7, me),
        (libc::SIGCHLD, u, 0, me),
        (libc::SIGWINCH, q, 8, me),
        (rt + 1, q, 0xdead_beef_cafe, me),
        (rt + 1, q, 2, me),
        (rt + 1, q, 1, me),
    ];
    sent.sort_by_key(|t| (t.0, usize::MAX - t.2.min(3)));
    same("signals pending for the process", taken, sent)?;
    let _ = go.send(());
    thread.join().map_err(|_| anyhow!("the thread panicked"))?
}

/// A member that is stopped stays stopped, and its stop is still there to be waited for.
pub fn stopped(_: &[String]) -> Check {
    let reported = member(rest)?;
    let unreported = member(rest)?;
    for one in [&reported, &unreported] {
        kill(one.pid, Signal::SIGSTOP).context("kill")?;
        let flags = nix::sys::wait::WaitPidFlag::WSTOPPED | WaitPidFlag::WNOWAIT;
        nix::sys::wait::waitid(nix::sys::wait::Id::Pid(one.pid), flags).context("waitid")?;
    }
    waitpid(reported.pid, Some(WaitPidFlag::WUNTRACED)).context("waitpid")?;
    rest()?;
    for one in [&reported, &unreported] {
        let state = crate::kit::proc_line(&format!("/proc/{}/status", one.pid), "State")?;
        if !state.starts_with('T') {
            bail!("a stopped member is in state {state}");
        }
    }
    match waitpid(unreported.pid, Some(WaitPidFlag::WUNTRACED | WaitPidFlag::WNOHANG)).context("waitpid")? {
        WaitStatus::Stopped(_, Signal::SIGSTOP) => {}
        other => bail!("the stop that nobody had waited for is now {other:?}"),
    }
    for one in [reported, unreported] {
        kill(one.pid, Signal::SIGCONT).context("kill")?;
        one.verify()?;
    }
    Ok(())
}
