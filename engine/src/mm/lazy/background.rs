//! `restore --background`: the server of late memory is a child of the restore.

use rcriu_images::ImageDir;

use super::{Giver, Late, Source, serve};
use crate::{
    error::{Error, Result, SysContext},
    process::{self, Forked},
    pstree::RealPid,
    restore::Snapshot,
};

/// The child. Dropped before [`Filler::keep`], it is ended.
#[derive(Debug)]
pub struct Filler(Option<RealPid>);

impl Filler {
    /// Forks it; the giver's connection leads to it. The caller must have one thread.
    pub fn start(snapshot: &Snapshot) -> Result<(Giver, Filler)> {
        let (giver, socket) = Giver::pair(Late::all(snapshot))?;
        match process::fork()? {
            Forked::Parent(pid) => Ok((giver, Filler(Some(pid)))),
            Forked::Child => {
                let late = giver.into_late();
                process::leave(match fill(socket, snapshot, &late) {
                    Ok(()) => 0,
                    Err(e) => {
                        log::error!("{e}");
                        1
                    }
                })
            }
        }
    }

    /// The tasks run: from now on it is theirs.
    pub fn keep(mut self) -> Option<RealPid> {
        self.0.take()
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            process::end(pid);
        }
    }
}

fn fill(socket: std::os::fd::OwnedFd, snapshot: &Snapshot, late: &Late) -> Result<()> {
    // What a terminal sends to the restore is not for us.
    nix::unistd::setsid().call("setsid")?;
    let images: ImageDir = snapshot.dir.clone();
    serve(socket, snapshot, late, Source::new(images, None)).map(drop)
}

/// Waits until all memory is in place.
///
/// # Errors
/// It could not be read; touching what is lacking is SIGBUS.
pub fn wait(filler: RealPid) -> Result<()> {
    use nix::sys::wait::{WaitStatus, waitpid};
    match waitpid(nix::unistd::Pid::from_raw(filler.0), None).call("waitpid")? {
        WaitStatus::Exited(_, 0) => Ok(()),
        other => {
            Err(Error::host(format!("memory could not be filled: {other:?}")).remedy("the log says why"))
        }
    }
}
