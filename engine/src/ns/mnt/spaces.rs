//! Several namespaces made in one: each that is not the first begins as a copy of the builder's, in which its own mounts
//! are put together and all else goes away.
//!
//! ```text
//! builder's   every mount of every namespace, each alone          Plain
//!   with MOVE_MOUNT_SET_GROUP: clones that stand nowhere  ------> put together in the copy; propagation in the end,
//!                                                                 from one namespace to the other by descriptor
//!   without: put together here, with their propagation    ------> copied with it
//! ```

use std::{cell::Cell, os::fd::OwnedFd};

use nix::{
    fcntl::{OFlag, openat},
    sched::{CloneFlags, setns, unshare},
    sys::stat::Mode,
};

use super::walk;
use crate::error::{Error, Result, SysContext};

/// Namespaces of a tree while they are made. What changes a mount must be called in the one it is in.
#[derive(Debug, Default)]
pub(super) struct Spaces {
    /// Files of namespaces of this thread, whichever /proc is mounted.
    own: Option<OwnedFd>,
    /// By position; none for those whose mounts still stand in the first.
    files: Vec<Option<OwnedFd>>,
    here: Cell<usize>,
}

impl Spaces {
    /// This process is in the first of `count` namespaces.
    ///
    /// Precondition: /proc is there.
    pub(super) fn new(count: usize) -> Result<Spaces> {
        if count < 2 {
            return Ok(Spaces::default());
        }
        let own = walk::open_folder(b"/proc/thread-self/ns")?;
        let mut files = vec![Some(here(&own)?)];
        files.resize_with(count, || None);
        Ok(Spaces { own: Some(own), files, here: Cell::new(0) })
    }

    /// Goes into a new namespace, a copy of the first. With `apart` mounts of namespace `space` are in it from now on.
    ///
    /// Precondition: this process is in the first.
    pub(super) fn make(&mut self, space: usize, apart: bool) -> Result<()> {
        unshare(CloneFlags::CLONE_NEWNS).call("unshare(CLONE_NEWNS)")?;
        self.here.set(usize::MAX);
        let own = self.own.as_ref().ok_or_else(|| Error::bug("a namespace too many"))?;
        if apart {
            let file = here(own)?;
            let slot = self.files.get_mut(space).ok_or_else(|| Error::bug("a namespace too many"))?;
            *slot = Some(file);
            self.here.set(space);
        }
        Ok(())
    }

    /// Goes to where mounts of namespace `space` are. Root and working folder are its root then, if this process was
    /// elsewhere.
    pub(super) fn enter(&self, space: usize) -> Result<()> {
        let space = if self.files.get(space).is_some_and(Option::is_some) { space } else { 0 };
        if self.here.get() == space {
            return Ok(());
        }
        let file = self.files.get(space).and_then(Option::as_ref);
        let file = file.ok_or_else(|| Error::bug("a namespace that is not made"))?;
        setns(file, CloneFlags::CLONE_NEWNS).call("setns(CLONE_NEWNS)")?;
        self.here.set(space);
        Ok(())
    }
}

/// The namespace that the thread is in whose folder of namespaces is `own`.
fn here(own: &OwnedFd) -> Result<OwnedFd> {
    openat(own, "mnt", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).call("open(ns/mnt)")
}
