//! What a failed restore has made goes away again: every process, by the numbers they told in the shared area.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::error::{Error, Kind, Result, SysContext};
use crate::kernel::Kernel;
use crate::procfs::{ProcDir, status::Status};
use crate::pstree::{RealPid, VirtPid};
use crate::restore::plan::Plan;
use crate::restore::read::{Snapshot, TaskIx};
use crate::restore::stages::Area;
use crate::restore::{fork, preflight};
use crate::sys::clone3::Side;
use crate::sys::wait;

/// How long killed processes may take to be gone.
const PATIENCE: Duration = Duration::from_secs(10);

/// Kills everything that was forked, unless [`Forked::keep`] is called.
///
/// While it lives this process is a subreaper: tasks whose parents are killed first come to us, so that their
/// numbers stay theirs until we have reaped them. Not so below a root that is our sibling.
#[derive(Debug)]
pub struct Forked<'a> {
    area: &'a Area,
    plan: &'a Plan,
    snapshot: &'a Snapshot,
    was_subreaper: bool,
    keep: bool,
}

impl<'a> Forked<'a> {
    /// To be made right before the first fork.
    pub fn new(area: &'a Area, plan: &'a Plan, snapshot: &'a Snapshot) -> Result<Self> {
        let was_subreaper = nix::sys::prctl::get_child_subreaper().call("prctl(PR_GET_CHILD_SUBREAPER)")?;
        nix::sys::prctl::set_child_subreaper(true).call("prctl(PR_SET_CHILD_SUBREAPER)")?;
        Ok(Forked { area, plan, snapshot, was_subreaper, keep: false })
    }

    /// What they share with us.
    pub fn area(&self) -> &'a Area {
        self.area
    }

    /// The tasks live on whatever happens to us.
    pub fn keep(mut self) {
        self.keep = true;
    }

    /// Whether all tasks that ought to live do so. To be asked while waiting for them, when none that is attached has a
    /// reason to stand still.
    pub fn watch(&self) -> Result<()> {
        for (ix, image) in self.snapshot.alive() {
            let Some(pid) = self.real(ix)? else { continue };
            let how = match preflight::death(pid)? {
                Some(Some(status)) => ended(status),
                Some(None) => "vanished".into(),
                // One that is attached stands still before a signal ends it.
                None => match wait::signal_before(pid)? {
                    Some(signal) => format!("got signal {signal}"),
                    None => continue,
                },
            };
            return Err(Error::host(format!("it {how} while it was being restored")).during(image.name()));
        }
        Ok(())
    }

    /// Pid of a node once it is forked.
    pub fn real(&self, ix: TaskIx) -> Result<Option<RealPid>> {
        let pid = self.area.slot(ix)?.pid.load(Ordering::Acquire);
        Ok((pid > 0).then_some(RealPid(pid)))
    }

    /// Leaders have told which numbers they have here: the area learns them.
    ///
    /// Precondition: all are forked.
    pub fn learn_leaders(&self) -> Result<()> {
        for (ix, task) in self.snapshot.alive() {
            let real =
                self.real(ix)?.ok_or_else(|| Error::bug("a task without a number").during(task.name()))?;
            self.area.learn([(task.pid, real)]);
        }
        Ok(())
    }

    /// The same for all other threads, as /proc tells.
    ///
    /// Precondition: all threads exist, and leaders are known.
    pub fn learn_threads(&self) -> Result<()> {
        for (_, task) in self.snapshot.alive().filter(|(_, task)| task.threads.len() > 1) {
            let dir = ProcDir::open(self.area.real(task.pid))?;
            for tid in dir.threads()? {
                let inner = Status::read_thread(&dir, tid)?.nspid.last().copied();
                self.area.learn(inner.map(|inner| (VirtPid(inner), tid)));
            }
        }
        Ok(())
    }

    /// Kills what lives; gives whether anything may still be there.
    fn kill_round(&self) -> bool {
        let mut left = false;
        for i in 0..self.plan.tree.len() {
            let ix = TaskIx(i);
            let Ok(Some(pid)) = self.real(ix) else { continue };
            // Dead threads that we trace keep their process from being reaped.
            let threads = self.snapshot.get(ix).map_or(&[][..], |t| &t.threads[1..]);
            for tid in threads.iter().map(|t| self.area.real(*t)).filter(|t| t.0 > 0).chain([pid]) {
                while let Ok(Some(_)) = wait::poll(tid) {}
            }
            if kill(Pid::from_raw(pid.0), Signal::SIGKILL) == Err(nix::errno::Errno::ESRCH) || is_left(pid) {
                if let Ok(slot) = self.area.slot(ix) {
                    slot.pid.store(0, Ordering::Release);
                }
            } else {
                left = true;
            }
        }
        left
    }
}

/// Processes that bear the numbers of dead ones while files below their /proc folders are opened. Dropping ends
/// them.
#[derive(Debug)]
pub struct Placeholders(Vec<Pid>);

impl Placeholders {
    /// Forks one for each number.
    pub fn fork(pids: &[VirtPid], area: &Area, kernel: &Kernel) -> Result<Placeholders> {
        let mut made = Placeholders(Vec::with_capacity(pids.len()));
        for pid in pids {
            match fork::fork(0, *pid, area, None, kernel)? {
                Side::Child => fork::sleep_forever(),
                Side::Parent(real) => made.0.push(Pid::from_raw(real.0)),
            }
        }
        Ok(made)
    }
}

impl Drop for Placeholders {
    fn drop(&mut self) {
        for pid in &self.0 {
            let _ = kill(*pid, Signal::SIGKILL);
            let _ = nix::sys::wait::waitpid(*pid, None);
        }
    }
}

/// Whether all that is left of a process is its status, for a parent that is not us: with `--restore-sibling` that is
/// ours for the root, and whoever reaps for that one for others.
fn is_left(pid: RealPid) -> bool {
    matches!(wait::poll(pid), Err(e) if matches!(e.kind(), Kind::TaskDied(_)))
        && matches!(preflight::death(pid), Ok(Some(Some(_))))
        && ProcDir::open(pid).and_then(|dir| dir.threads()).is_ok_and(|threads| threads.len() == 1)
}

/// `exited with status 3`, `was killed by signal 9`.
fn ended(status: i32) -> String {
    match status & 0x7f {
        0 => format!("exited with status {}", status >> 8 & 0xff),
        signal => format!("was killed by signal {signal}"),
    }
}

impl Drop for Forked<'_> {
    fn drop(&mut self) {
        if !self.keep {
            self.area.stop();
            let deadline = Instant::now() + PATIENCE;
            // A task may have been forked by one that was killed right afterwards: it tells its number itself
            // and then sees that all is over, so one more round than needed finds everybody.
            let mut quiet = 0;
            while quiet < 2 && Instant::now() < deadline {
                if self.kill_round() {
                    quiet = 0;
                    std::thread::sleep(Duration::from_millis(1));
                } else {
                    quiet += 1;
                }
            }
            if quiet < 2 {
                log::warn!("Some tasks did not end after SIGKILL");
            }
        }
        let _ = nix::sys::prctl::set_child_subreaper(self.was_subreaper);
    }
}
