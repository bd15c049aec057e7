//! A restore that fails leaves groups as they were.

use std::{
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    unistd::{UnlinkatFlags, unlinkat},
};
use rcriu_images::pb;

use super::{Groups, Place, path, programs, show, values};
use crate::error::{Context, Result, SysContext};

/// How long groups that a failed restore has made may stay busy.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a failed restore takes back.
#[derive(Debug)]
pub(super) enum Undo {
    /// A folder was made.
    Made(Place),
    /// A folder that was there had these permissions.
    Perms(Place, pb::CgroupPerms),
    /// A property had this value.
    Value(Place, pb::CgroupPropEntry),
    /// A BPF program was attached for a kind of event.
    Attached(Place, OwnedFd, u32),
}

impl Groups {
    fn take_back(&self, undo: Undo) -> Result<()> {
        match undo {
            Undo::Made(place) => {
                let deadline = Instant::now() + PATIENCE;
                loop {
                    match unlinkat(self.root(&place), path(&place), UnlinkatFlags::RemoveDir) {
                        // Whoever was in it is just leaving.
                        Err(Errno::EBUSY) if Instant::now() < deadline => {
                            std::thread::sleep(Duration::from_millis(1));
                        }
                        other => return other.call("unlinkat").during(|| format!("group /{}", show(&place))),
                    }
                }
            }
            Undo::Attached(place, program, event) => {
                programs::detach(self.root(&place), &place.path, &program, event)
            }
            Undo::Perms(place, old) => self.set_perms(&place, &old),
            Undo::Value(place, old) => {
                values::set(&self.hierarchies[place.hierarchy].root, &place.path, &old)
            }
        }
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        while let Some(undo) = self.undo.pop() {
            if let Err(e) = self.take_back(undo) {
                log::error!("A control group was not put back: {e}");
            }
        }
    }
}
