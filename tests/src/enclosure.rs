//! Where a case runs.
//!
//! As root a case gets a pid namespace, a network namespace with a loopback device, a namespace of System V
//! objects and a mount namespace with a fresh /proc and ptys of its own: what a restore wants back under its old
//! name is free there whatever the machine does, and when the case ends the kernel ends everything it started.
//! Inside, the case is a child subreaper below a small init, so restored trees become its children. Where
//! namespaces are refused the case runs without them, as a subreaper that kills what is left by pid.
//! In both forms a case that leaves a process behind has failed.
//!
//! # Safety
//!
//! fork(2) is called before the process has a second thread, close_range(2) before it has opened anything; signals only
//! get their default actions; ioctl(2) gets a structure that outlives the call.

use std::fs;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::anyhow;
use nix::fcntl::OFlag;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigHandler, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, Uid, fork};

use crate::events::PidFd;
use crate::runner::{Case, SKIPPED, Skip};
use crate::state::processes;

/// The child's side: namespaces, init, subreaper, body, nothing left behind.
pub fn enclosed(case: &Case) -> ExitCode {
    let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
    // Programs end by signals that whoever started the tests may have had ignored (nohup, a shell's `&`).
    for signal in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT] {
        // SAFETY: no handler is set.
        let _ = unsafe { nix::sys::signal::signal(signal, SigHandler::SigDfl) };
    }
    // Descriptors of whoever started the tests would end up in the dumped programs, opened on mounts that
    // the case's namespace does not have.
    // SAFETY: nothing in this process has opened a descriptor yet.
    unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0) };
    let inside =
        Uid::effective().is_root() && unshare(CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS).is_ok();
    if !inside {
        return body(case);
    }
    // Ports, names, rules and System V ids of cases that run at the same time are none of each other's
    // business: a restore wants each of them back.
    let _ = unshare(CloneFlags::CLONE_NEWIPC);
    if unshare(CloneFlags::CLONE_NEWNET).is_ok()
        && let Err(e) = loopback_up()
    {
        return failed("the loopback device of the case", e);
    }
    // SAFETY: this process has one thread.
    match unsafe { fork() } {
        Ok(ForkResult::Parent { child }) => ExitCode::from(status_of(child)),
        Ok(ForkResult::Child) => {
            let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
            let none: Option<&str> = None;
            let private = mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none);
            let proc =
                private.and_then(|()| mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none));
            if let Err(e) = proc {
                eprintln!("mounting /proc for the case: {e}");
                return ExitCode::FAILURE;
            }
            terminals_of_its_own();
            // SAFETY: this process has one thread.
            match unsafe { fork() } {
                Ok(ForkResult::Parent { child }) => ExitCode::from(status_of(child)),
                Ok(ForkResult::Child) => body(case),
                Err(e) => failed("fork", e),
            }
        }
        Err(e) => failed("fork", e),
    }
}

/// Gives the case numbers of ptys that no other case can take meanwhile (an instance of devpts of its own).
/// Before Linux 4.7 /dev/ptmx belongs to the first instance whatever is mounted beside it, and that stays.
fn terminals_of_its_own() {
    const AT: &str = "/dev/pts";
    let options = Some("newinstance,ptmxmode=0666,mode=620,gid=5");
    if mount(Some("devpts"), AT, Some("devpts"), MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC, options).is_err() {
        return;
    }
    // The name is there for as long as the master is open.
    let seen = nix::pty::posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY)
        .is_ok_and(|master| nix::pty::ptsname_r(&master).is_ok_and(|name| fs::exists(name).unwrap_or(false)));
    if !seen {
        let _ = nix::mount::umount2(AT, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// Switches the loopback device of a new network namespace on.
pub(crate) fn loopback_up() -> nix::Result<()> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let through = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: integers and characters, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request outlives the call.
    let done = unsafe { libc::ioctl(through.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const request) };
    nix::errno::Errno::result(done).map(drop)
}

fn failed(what: &str, e: nix::Error) -> ExitCode {
    eprintln!("{what}: {e}");
    ExitCode::FAILURE
}

/// Waits for one child, reaping strays on the way (the caller may be an init).
fn status_of(child: Pid) -> u8 {
    loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, code)) if pid == child => return code as u8,
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == child => {
                eprintln!("the case died of {signal}");
                return 1;
            }
            Err(nix::errno::Errno::ECHILD) => return 1,
            _ => {}
        }
    }
}

fn body(case: &Case) -> ExitCode {
    let _ = nix::sys::prctl::set_child_subreaper(true);
    let _ = nix::unistd::setsid();
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(&case.body))
        .unwrap_or_else(|_| Err(anyhow!("the case panicked (message above)")));
    let left = leftovers();
    let result = match (result, left.is_empty()) {
        (Ok(()), false) => Err(anyhow!("processes were left behind: {}", left.join(", "))),
        (result, _) => result,
    };
    let _ = std::io::stdout().flush();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => match e.downcast_ref::<Skip>() {
            Some(why) => {
                println!("{why}");
                ExitCode::from(SKIPPED)
            }
            None => {
                println!("{e:#}");
                ExitCode::FAILURE
            }
        },
    }
}

/// Kills, reaps and names every descendant that the case did not stop itself. Zombies of trees that were
/// dumped are reaped silently.
fn leftovers() -> Vec<String> {
    let mut names = Vec::new();
    loop {
        while waitpid(None, Some(WaitPidFlag::WNOHANG)).is_ok_and(|s| s != WaitStatus::StillAlive) {}
        let me = std::process::id() as i32;
        let Ok(all) = processes() else { return names };
        let below = crate::state::descendants(&all, me);
        if below.is_empty() {
            return names;
        }
        for pid in below {
            let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            if let Ok(fd) = PidFd::open(Pid::from_raw(pid)) {
                let dead = fd.is_dead();
                fd.kill(Signal::SIGKILL);
                let _ = fd.wait_dead(Duration::from_secs(5));
                if !dead {
                    names.push(format!("{pid} ({})", comm.trim()));
                }
            }
        }
    }
}
