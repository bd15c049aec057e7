//! `--pidfile`: the root task's pid, for whoever watches it.

use std::fs::File;
use std::io::Write;

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::error::{Context, Result, SysContext};
use crate::options::RestoreOptions;
use crate::pstree::RealPid;

/// A pidfile that was written; dropped without [`Pidfile::keep`] it goes away again.
#[derive(Debug)]
pub struct Pidfile<'a> {
    opts: &'a RestoreOptions,
    keep: bool,
}

impl<'a> Pidfile<'a> {
    /// Writes it, if one was asked for. The path is relative to the work folder.
    ///
    /// # Errors
    /// One that is there already: it may be that of a living daemon.
    pub fn write(opts: &'a RestoreOptions, root: RealPid) -> Result<Pidfile<'a>> {
        let Some(path) = &opts.pidfile else { return Ok(Pidfile { opts, keep: true }) };
        let during = || format!("pidfile {}", path.display());
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        let fd = openat(&opts.common.work_dir, path, flags, Mode::from_bits_truncate(0o600))
            .call("openat")
            .during(during)?;
        let guard = Pidfile { opts, keep: false };
        File::from(fd).write_all(root.to_string().as_bytes()).call("write").during(during)?;
        Ok(guard)
    }

    /// The task lives on.
    pub fn keep(mut self) {
        self.keep = true;
    }
}

impl Drop for Pidfile<'_> {
    fn drop(&mut self) {
        if let (false, Some(path)) = (self.keep, &self.opts.pidfile)
            && let Err(e) = unlinkat(&self.opts.common.work_dir, path, UnlinkatFlags::NoRemoveDir)
        {
            log::error!("unlink({}): {e}", path.display());
        }
    }
}
