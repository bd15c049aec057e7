//! A process that outlives a restore that is killed while it lets its tasks go: all of them live, or none.
//!
//! Tasks are let go one by one, and nobody can catch SIGKILL. So while they are, the kernel no longer kills them at
//! our end, but this process does, unless one word says that they may stay: written when all are ready.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::error::Result;
use crate::pstree::RealPid;
use crate::restore::fork;
use crate::sys::clone3::{Side, fork_alone};
use crate::sys::shared::SharedWords;
use crate::sys::{pidfd, wait};

/// The guardian of a tree; dropped, it ends.
#[derive(Debug)]
pub struct Guardian {
    /// 1 once the tasks stay.
    stay: SharedWords,
    child: Option<RealPid>,
}

impl Guardian {
    /// Forks one for the tasks with these leaders. A process that cannot fork goes without: then only the moment of
    /// letting go is not covered.
    pub fn start(leaders: &[RealPid]) -> Result<Guardian> {
        let mut guardian = Guardian { stay: SharedWords::new(1)?, child: None };
        let Ok(engine) = pidfd::open(RealPid(std::process::id().cast_signed()), 0) else {
            return Ok(guardian);
        };
        match fork_alone() {
            Ok(Side::Child) => {
                guardian.watch(&engine, leaders);
                fork::leave(0)
            }
            Ok(Side::Parent(pid)) => guardian.child = Some(pid),
            Err(e) => log::debug!("No guardian: {e}"),
        }
        Ok(guardian)
    }

    /// Whether the tasks are guarded.
    pub fn is_there(&self) -> bool {
        self.child.is_some()
    }

    /// From here on the tasks stay, whatever happens to us.
    pub fn keep(self) {
        self.stay[0].store(1, Ordering::Release);
    }

    /// The guardian's life.
    fn watch(&self, engine: &OwnedFd, leaders: &[RealPid]) {
        // Signals for the group of the terminal are not for us.
        let _ = fork::block_all_signals();
        let _ = nix::unistd::setsid();
        let _ = nix::sys::prctl::set_name(c"rcriu-guardian");
        loop {
            match poll(&mut [PollFd::new(engine.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE) {
                Ok(1) => break,
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => return,
            }
        }
        if self.stay[0].load(Ordering::Acquire) == 0 {
            leaders.iter().for_each(|pid| _ = kill(Pid::from_raw(pid.0), Signal::SIGKILL));
        }
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        if let Some(pid) = self.child.take() {
            let _ = kill(Pid::from_raw(pid.0), Signal::SIGKILL);
            wait::end(pid);
        }
    }
}
