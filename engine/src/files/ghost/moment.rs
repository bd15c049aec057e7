//! A mount that is read-only, while its file system is not, made writable for the moment in which a file without a name
//! is made on it: nothing else of the file system may be mounted.

use nix::sched::CloneFlags;

use crate::{
    error::{Context, Result},
    files::{Root, root::Place},
    ns::{enter, mnt::flags},
    sys::mount::{Mounting, mount},
};

/// Ends by [`Writable::end`], or when dropped.
#[derive(Debug)]
pub(super) struct Writable<'a> {
    root: &'a Root,
    point: &'a [u8],
    flags: u32,
    ended: bool,
}

impl<'a> Writable<'a> {
    /// Makes it writable; `None` if the namespace of `root` is not one of the tree's own.
    ///
    /// Precondition: no task runs in the namespace yet; nothing is mounted over the place.
    ///
    /// # Errors
    /// EPERM where a user namespace above has locked it.
    pub(super) fn begin(root: &'a Root, place: &'a Place) -> Result<Option<Writable<'a>>> {
        if root.namespace().is_none() {
            return Ok(None);
        }
        let mounts = root.mounts()?;
        let on = mounts.iter().rev().find(|mount| mount.point == place.point);
        let Some(on) = on else { return Ok(None) };
        let writable =
            Writable { root, point: &place.point, flags: flags::of_mount(&on.options).0, ended: false };
        writable.remount(writable.flags & !flags::RDONLY)?;
        Ok(Some(writable))
    }

    /// Makes it read-only again.
    ///
    /// # Errors
    /// It stays writable: the restore must fail.
    pub(super) fn end(mut self) -> Result<()> {
        self.ended = true;
        self.remount(self.flags)
    }

    fn remount(&self, flags: u32) -> Result<()> {
        let Some(namespace) = self.root.namespace() else { return Ok(()) };
        let flags = flags::REMOUNT | flags::BIND | flags;
        let remount = || mount(Mounting { target: self.point, flags, ..Mounting::default() });
        enter::inside_of(&[(CloneFlags::CLONE_NEWNS, namespace)], remount)
            .during(|| format!("the mount on {}", self.point.escape_ascii()))
    }
}

impl Drop for Writable<'_> {
    fn drop(&mut self) {
        if !self.ended
            && let Err(e) = self.remount(self.flags)
        {
            log::error!("Can't make it read-only again: {e}");
        }
    }
}
