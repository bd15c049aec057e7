//! A process that outlives a dump that is killed, and takes away what the dump would have taken away itself: the
//! parasite, the frozen state of a control group, and the locks of networks that are not tables of the dump's own, which the
//! kernel removes.
//!
//! Nobody can catch SIGKILL, and the kernel only lets go of what was traced. So before anything is changed the
//! dump forks a guardian that waits for its end, with all that has to be undone in memory that both share. A dump
//! that ends by itself has undone everything and ends its guardian.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::CloneFlags;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::freezer::Freezer;
use crate::error::Result;
use crate::infect::{self, Ledger};
use crate::kernel::Kernel;
use crate::netlock::{Method, unlock_all};
use crate::ns::enter::here;
use crate::options::NetworkLock;
use crate::procfs::ProcDir;
use crate::pstree::RealPid;
use crate::restore::fork;
use crate::sys::clone3::{Side, fork_alone};
use crate::sys::shared::SharedWords;
use crate::sys::{pidfd, wait};

/// Its name in /proc.
pub const NAME: &std::ffi::CStr = c"rcriu-guardian";

/// How long a program that the dump had started may go on after it.
const LATE: Duration = Duration::from_millis(300);

/// What is to become of the control group, in the shared word.
const LEAVE: u32 = 0;
const THAW: u32 = 1;
const FREEZE: u32 = 2;

/// The guardian of this dump; dropped, it ends.
#[derive(Debug)]
pub struct Guardian {
    ledger: Ledger,
    group: SharedWords,
    child: Option<RealPid>,
}

impl Guardian {
    /// Its process, if there is one.
    pub fn pid(&self) -> Option<RealPid> {
        self.child
    }

    /// Forks it. A process with several threads, which cannot fork, goes without: only its own death by SIGKILL
    /// makes a difference.
    ///
    /// Precondition: nothing is changed yet; `freezer` is the control group that will be frozen.
    pub fn start(freezer: Option<PathBuf>, kernel: &Kernel) -> Result<Guardian> {
        let mut guardian = Guardian { ledger: Ledger::new()?, group: SharedWords::new(1)?, child: None };
        let Ok(engine) = pidfd::open(RealPid(std::process::id().cast_signed()), 0) else {
            return Ok(guardian);
        };
        match fork_alone() {
            Ok(Side::Child) => {
                guardian.watch(&engine, freezer, kernel);
                fork::leave(0)
            }
            Ok(Side::Parent(pid)) => guardian.child = Some(pid),
            Err(e) => log::debug!("No guardian: {e}"),
        }
        Ok(guardian)
    }

    /// Where infected processes are to be entered.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// The control group is about to change from a state, frozen or not, which it will have to get back.
    pub fn group_changes(&self, was_frozen: bool) {
        self.group[0].store(if was_frozen { FREEZE } else { THAW }, Ordering::Release);
    }

    /// The guardian's life.
    fn watch(&self, engine: &OwnedFd, freezer: Option<PathBuf>, kernel: &Kernel) {
        // Signals for the group of the terminal are not for us.
        let _ = fork::block_all_signals();
        let _ = nix::unistd::setsid();
        let _ = nix::sys::prctl::set_name(NAME);
        loop {
            match poll(&mut [PollFd::new(engine.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE) {
                Ok(1) => break,
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => return,
            }
        }
        // What is frozen cannot be cured, and what was frozen must not run longer than for that.
        let group = self.group[0].load(Ordering::Acquire);
        let freezer = freezer.filter(|_| group != LEAVE).and_then(|folder| Freezer::open(&folder).ok());
        let told = |what: &str, result: Result<()>| {
            if let Err(e) = result {
                log::error!("The dump was killed; {what}: {e}");
            }
        };
        let guests = self.ledger.guests();
        let mut freezer = freezer;
        if let Some(freezer) = freezer.as_mut().filter(|_| group == THAW || !guests.is_empty()) {
            told("its control group", freezer.force(false));
        }
        let locked = self.ledger.locked_networks();
        for pid in &locked {
            told("the lock of its network", unlock(*pid));
        }
        for guest in guests {
            told("its parasite", infect::cure_leftover(&guest, kernel));
        }
        if let Some(freezer) = freezer.as_mut().filter(|_| group == FREEZE) {
            told("its control group", freezer.force(true));
        }
        if !locked.is_empty() {
            // A program that was still setting rules has done so by then.
            std::thread::sleep(LATE);
            for pid in locked {
                told("the lock of its network", unlock(pid));
            }
        }
    }
}

/// Takes the rules of iptables away that keep packets from the network namespace of a task.
fn unlock(pid: RealPid) -> Result<()> {
    let namespace = ProcDir::open(pid)?.file("ns/net", OFlag::O_RDONLY)?;
    let method = Method::of_dump(NetworkLock::Iptables);
    here(namespace.as_fd(), CloneFlags::CLONE_NEWNET, || unlock_all(&method))
}

impl Drop for Guardian {
    fn drop(&mut self) {
        if let Some(pid) = self.child.take() {
            let _ = kill(Pid::from_raw(pid.0), Signal::SIGKILL);
            wait::end(pid);
        }
    }
}
