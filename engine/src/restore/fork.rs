//! Forking a task with the pid it had.
//!
//! The engine forks from a single thread, so a child finds every lock free. A child never returns from the
//! function that forked it further than to [`super::task::run`], which ends by the restorer or by [`leave`]:
//! no guard of the parent's drops in it.
//!
//! # Safety
//! Forks are made by clone(2) without shared memory, from a process with one thread. The signal functions get
//! constants only.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, sigaction, sigprocmask};

use crate::error::{Context, Error, Kind, Result, SysContext};
use crate::kernel::Kernel;
use crate::pstree::{RealPid, VirtPid};
use crate::restore::read::TaskIx;
use crate::restore::stages::Area;
use crate::restore::tree::{Make, Node};
use crate::sys::arena;
use crate::sys::clone3::{Side, clone3};
use crate::sys::errno;

/// The kernel gives the next process this number plus one.
pub const LAST_PID: &str = "/proc/sys/kernel/ns_last_pid";
/// How often a number may be snatched away by somebody else before we give up.
const TRIES: u32 = 64;
/// How long somebody else may keep a number that was free before.
const PATIENCE: Duration = Duration::from_secs(2);

/// Forks `node`, which is that of `make`, with its pid, and tells its number in the shared area. `new` are the flags of
/// namespaces that are made with it; tasks that are `apart` have numbers of their own.
///
/// # Errors
/// In the parent only: the number is taken (by whom), the kernel refuses.
pub fn fork_node(
    make: &Make,
    node: &Node,
    area: &Area,
    kernel: &Kernel,
    (new, apart): (u64, bool),
) -> Result<Side> {
    let mut flags = new;
    for (on, flag) in [
        (make.sibling, libc::CLONE_PARENT),
        (make.share_files, libc::CLONE_FILES),
        (make.share_fs, libc::CLONE_FS),
    ] {
        flags |= if on { flag as u64 } else { 0 };
    }
    let side = fork(flags, node.pid, area, node.parent, kernel)?;
    match side {
        // Where tasks have numbers of their own, only the child knows which it has for the engine.
        Side::Parent(real) if !apart => {
            area.slot(make.task)?.pid.store(real.0, Ordering::Release);
        }
        Side::Parent(_) => {}
        Side::Child => arena::own_room(),
    }
    Ok(side)
}

/// Forks with clone flags and a pid. `parent` is the node that becomes the parent with CLONE_PARENT.
///
/// Precondition: [`check_single_threaded`].
pub fn fork(flags: u64, pid: VirtPid, area: &Area, parent: Option<TaskIx>, kernel: &Kernel) -> Result<Side> {
    log::info!("Forking task with {pid} pid (flags {flags:#x})");
    let side = if kernel.clone3_set_tid {
        // With CLONE_PARENT the child gets the signal of the caller, and clone3 wants none given.
        let signal = if flags & libc::CLONE_PARENT as u64 != 0 { 0 } else { libc::SIGCHLD };
        let deadline = Instant::now() + PATIENCE;
        loop {
            // SAFETY: this process has one thread.
            match unsafe { clone3(flags, signal, &[pid.0]) } {
                // Nobody has it any more: a process that was just reaped keeps its number for a moment.
                Err(e) if is_taken(&e) && super::preflight::is_free(pid) && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                other => break other.map_err(|e| named(e, pid)),
            }
        }
    } else {
        fork_by_last_pid(flags, pid, area, parent)
    };
    side.during(|| format!("fork of task {pid}"))
}

/// Before Linux 5.5: tell the kernel the last pid it gave, and fork at once. Somebody else may fork in between and
/// take the number, perhaps for a short life only.
fn fork_by_last_pid(flags: u64, pid: VirtPid, area: &Area, parent: Option<TaskIx>) -> Result<Side> {
    let knob = OpenOptions::new().write(true).open(LAST_PID).call(format!("open({LAST_PID})"))?;
    let deadline = Instant::now() + PATIENCE;
    for _ in 0..TRIES {
        area.shared().lock_last_pid();
        let side = try_last_pid(&knob, flags, pid);
        if matches!(side, Ok(Side::Child)) {
            // The lock is the parent's to give back.
            return side;
        }
        area.shared().unlock_last_pid();
        let real = match side? {
            Side::Parent(real) if real.0 != pid.0 => real,
            side => return Ok(side),
        };
        log::debug!("Got pid {real} instead of {pid}");
        // The child with the wrong number has left by itself; its parent must reap it.
        match parent {
            _ if flags & libc::CLONE_PARENT as u64 == 0 => reap(real)?,
            Some(parent) => area.add_stray(parent, real)?,
            None => log::warn!("{real} is left to our parent to be reaped"),
        }
        while !super::preflight::is_free(pid) {
            if Instant::now() >= deadline {
                return Err(named(Error::sys("clone", libc::EEXIST), pid));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    Err(Error::host(format!("others fork too fast to get pid {pid}")))
}

/// Reaps a child of ours that ends.
pub fn reap(pid: RealPid) -> Result<()> {
    use nix::sys::wait::{WaitPidFlag, waitpid};
    waitpid(nix::unistd::Pid::from_raw(pid.0), Some(WaitPidFlag::__WALL)).map(drop).call("waitpid")
}

fn try_last_pid(knob: &File, flags: u64, pid: VirtPid) -> Result<Side> {
    // At the start: what is written behind it is ignored (sysctl_writes_strict).
    knob.write_all_at((pid.0 - 1).to_string().as_bytes(), 0).call(format!("write({LAST_PID})"))?;
    let flags = flags | libc::SIGCHLD as u64;
    // SAFETY: this process has one thread; without CLONE_VM a null stack means a copy of ours.
    let ret = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    match ret {
        0 if std::process::id() == pid.0 as u32 => Ok(Side::Child),
        0 => leave(0),
        r if r > 0 => Ok(Side::Parent(RealPid(r as i32))),
        _ => Err(Error::sys("clone", errno::last())),
    }
}

/// Turns "this number is taken" into a message that says by whom.
fn named(e: Error, pid: VirtPid) -> Error {
    if is_taken(&e) { super::preflight::taken(pid) } else { e }
}

fn is_taken(e: &Error) -> bool {
    e.errno() == Some(libc::EEXIST) || matches!(e.kind(), Kind::Host(_))
}

/// Whether this process may fork: a fork copies only the calling thread, and whatever the others held would
/// stay held forever.
pub fn check_single_threaded() -> Result<()> {
    let tasks = std::fs::read_dir("/proc/self/task").call("open(/proc/self/task)")?;
    match tasks.count() {
        1 => Ok(()),
        n => Err(Error::bug(format!("a restore must run in a process with one thread, this one has {n}"))),
    }
}

/// Ends this process at once: no destructor, no exit handler of the parent's runs.
pub fn leave(code: i32) -> ! {
    // SAFETY: _exit touches no memory.
    unsafe { libc::_exit(code) }
}

/// Signals as a task being rebuilt needs them: all blocked until the restored mask takes over, but for SIGCHLD,
/// which must vanish unseen (blocked it would become pending, ignored it would take zombies away); no
/// handler of the engine's.
pub fn neutral_signals() -> Result<()> {
    for number in 1..=64 {
        let mut act: libc::sigaction = zeroed_action();
        act.sa_sigaction = libc::SIG_DFL;
        if ![libc::SIGKILL, libc::SIGSTOP].contains(&number) {
            // SAFETY: a valid action; glibc refuses its own two signals, which nobody here uses.
            unsafe { libc::sigaction(number, &act, std::ptr::null_mut()) };
        }
    }
    let mut mask = SigSet::all();
    mask.remove(Signal::SIGCHLD);
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&mask), None).call("sigprocmask")
}

fn zeroed_action() -> libc::sigaction {
    // SAFETY: all fields are integers, for which zero bytes are a value.
    unsafe { std::mem::zeroed() }
}

/// Ends this process by `signal`, or returns if the signal does not end it.
pub fn die_by(signal: i32) -> Result<()> {
    use nix::sys::resource::{Resource, setrlimit};
    setrlimit(Resource::RLIMIT_CORE, 0, 0).call("setrlimit(RLIMIT_CORE)")?;
    nix::sys::prctl::set_dumpable(false).call("prctl(PR_SET_DUMPABLE)")?;
    if let Ok(name) = Signal::try_from(signal)
        && ![Signal::SIGKILL, Signal::SIGSTOP].contains(&name)
    {
        let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
        // SAFETY: the default action runs no code of ours.
        unsafe { sigaction(name, &default) }.call("sigaction")?;
    }
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None).call("sigprocmask")?;
    // SAFETY: numbers only.
    match unsafe { libc::kill(std::process::id() as i32, signal) } {
        0 => Ok(()),
        _ => Err(Error::sys("kill", errno::last())),
    }
}

/// Blocks every signal that can be blocked.
pub fn block_all_signals() -> Result<()> {
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None).call("sigprocmask")
}

/// Waits for signals until one ends this process.
pub fn sleep_forever() -> ! {
    loop {
        nix::unistd::pause();
    }
}
