//! `restore --background`: the server of late memory is a child of the restore.

use std::{
    collections::HashSet,
    os::fd::{AsFd, OwnedFd},
};

use nix::sys::{
    signal::{Signal, kill},
    wait::{WaitStatus, waitpid},
};
use nix::unistd::Pid;
use rcriu_images::ImageDir;

use super::{
    Giver, Late, Source,
    serve::serve_guarded,
    spare::{self, Spares},
};
use crate::{
    error::{Error, Result, SysContext},
    process::{self, Forked},
    procfs::ProcDir,
    pstree::RealPid,
    restore::Snapshot,
    sys::pidfd,
};

/// The child. Dropped before [`Filler::keep`], it is ended.
#[derive(Debug)]
pub struct Filler {
    child: Option<RealPid>,
    spares: Option<Spares>,
    tasks: Vec<(RealPid, OwnedFd)>,
}

/// The child of a restore that has succeeded.
#[derive(Debug)]
pub struct Kept {
    child: RealPid,
    spares: Spares,
    tasks: Vec<(RealPid, OwnedFd)>,
}

impl Filler {
    /// Forks it; the giver's connection leads to it. The caller must have one thread. `keep` brings descriptors to
    /// where they are not in the way of the tasks'.
    pub fn start(snapshot: &Snapshot, keep: impl Fn(OwnedFd) -> Result<OwnedFd>) -> Result<(Giver, Filler)> {
        let (giver, socket) = Giver::pair(Late::all(snapshot))?;
        let (sender, ours) = spare::pair()?;
        match process::fork()? {
            Forked::Parent(pid) => {
                drop(sender);
                let mut filler = Filler { child: Some(pid), spares: None, tasks: Vec::new() };
                filler.spares = Some(Spares::new(keep(ours)?));
                Ok((giver.moved(keep)?, filler))
            }
            Forked::Child => {
                drop(ours);
                let late = giver.into_late();
                process::leave(match fill(socket, sender, snapshot, &late) {
                    Ok(()) => 0,
                    Err(e) => {
                        log::error!("{e}");
                        1
                    }
                })
            }
        }
    }

    /// Prepares for the end of the child: holds what it holds, and knows the `leaders` of the tasks.
    ///
    /// Precondition: no task runs yet, and all have given what they lack.
    pub fn arm(&mut self, giver: &Giver, leaders: impl Iterator<Item = RealPid>) -> Result<()> {
        giver.arm()?;
        self.tasks = leaders.map(|pid| Ok((pid, pidfd::open(pid, 0)?))).collect::<Result<_>>()?;
        self.spares.as_mut().map_or(Ok(()), Spares::wait_armed)
    }

    /// The tasks run: from now on it is theirs.
    pub fn keep(mut self) -> Option<Kept> {
        let spares = self.spares.take()?;
        Some(Kept { child: self.child.take()?, spares, tasks: std::mem::take(&mut self.tasks) })
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        if let Some(pid) = self.child {
            process::end(pid);
        }
    }
}

fn fill(socket: OwnedFd, sender: spare::Sender, snapshot: &Snapshot, late: &Late) -> Result<()> {
    // What a terminal sends to the restore is not for us.
    nix::unistd::setsid().call("setsid")?;
    let images: ImageDir = snapshot.dir.clone();
    serve_guarded(socket, snapshot, late, Source::new(images, None), Some(sender)).map(drop)
}

impl Kept {
    /// Waits until all memory is in place.
    ///
    /// # Errors
    /// It could not be read: touching what is lacking is SIGBUS. The child was killed: the tasks and their
    /// descendants are ended then, for what they lack would read as zeroes.
    pub fn wait(mut self) -> Result<()> {
        self.spares.wait_end()?;
        match waitpid(Pid::from_raw(self.child.0), None).call("waitpid")? {
            WaitStatus::Exited(_, 0) => Ok(()),
            WaitStatus::Exited(_, 1) => {
                Err(Error::host("memory could not be filled").remedy("the log says why"))
            }
            other => {
                let ended = self.end_all();
                let e = format!(
                    "the process that fills memory was killed ({other:?}): {ended} processes that lacked some were ended"
                );
                Err(Error::host(e).remedy("restore again"))
            }
        }
    }

    /// Ends the tasks and all that descend from them; what one of them lacks is not there for its children either,
    /// and a fork of one that lacks memory waits for the child that is gone.
    fn end_all(&self) -> usize {
        let mut all: Vec<RealPid> = self.tasks.iter().map(|task| task.0).collect();
        let mut known: HashSet<i32> = all.iter().map(|pid| pid.0).collect();
        let mut at = 0;
        while let Some(pid) = all.get(at).copied() {
            at += 1;
            let Ok(dir) = ProcDir::open(pid) else { continue };
            let threads = dir.threads().unwrap_or_default();
            let children = threads.into_iter().flat_map(|tid| dir.children(tid).unwrap_or_default());
            all.extend(children.filter(|child| known.insert(child.0)));
        }
        let tasks = self.tasks.iter();
        let ended = tasks.filter(|(_, fd)| pidfd::send_signal(fd.as_fd(), libc::SIGKILL).is_ok()).count();
        let others = all[self.tasks.len()..].iter();
        ended + others.filter(|pid| kill(Pid::from_raw(pid.0), Signal::SIGKILL).is_ok()).count()
    }
}
