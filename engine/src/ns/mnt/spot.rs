//! A place in the file system held open, for calls that take paths only.

use std::os::{
    fd::{AsFd, OwnedFd},
    unix::ffi::OsStrExt,
};

use nix::{
    sys::stat::{fstat, stat},
    unistd::fchdir,
};

use super::walk;
use crate::error::{Context, Result, SysContext};

/// A folder, or a file in one: kernels without calls for descriptors mount from and to it through the working folder.
#[derive(Debug)]
pub(super) struct Spot {
    folder: OwnedFd,
    name: Vec<u8>,
}

impl Spot {
    /// What is at `rest` below `base`; no symbolic link is followed.
    pub(super) fn below(base: &OwnedFd, rest: &[u8]) -> Result<Spot> {
        let file = walk::to(base.as_fd(), rest)?;
        if walk::is_folder(&file)? {
            return Ok(Spot { folder: file, name: b".".to_vec() });
        }
        let (folder, name) = walk::split(rest);
        Ok(Spot { folder: walk::to(base.as_fd(), folder)?, name: name.to_vec() })
    }

    /// What is at a path of the host, links followed.
    pub(super) fn at(path: &std::path::Path) -> Result<Spot> {
        let whole = std::fs::canonicalize(path).call("realpath").during(|| path.display().to_string())?;
        let root = walk::open_folder(b"/")?;
        let bytes = whole.as_os_str().as_bytes();
        Self::below(&root, bytes.strip_prefix(b"/").unwrap_or(bytes))
    }

    /// What is at a path of the host, which `file` is in another mount namespace: the working folder if it is that.
    pub(super) fn of(path: &std::path::Path, file: &OwnedFd) -> Result<Spot> {
        let (here, there) = (stat(".").call("stat(.)")?, fstat(file).call("fstat")?);
        if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino) {
            return Ok(Spot { folder: walk::open_folder(b".")?, name: b".".to_vec() });
        }
        Self::at(path).map_err(|e| match e.errno() {
            Some(libc::EACCES) => e.remedy("let the users of the tree's user namespace come there"),
            _ => e,
        })
    }

    pub(super) fn is_folder(&self) -> bool {
        self.name == b"."
    }

    /// Makes its folder the working folder, and gives the path from there.
    ///
    /// Precondition: nobody else uses the working folder of this thread.
    pub(super) fn go(&self) -> Result<&[u8]> {
        fchdir(&self.folder).call("fchdir")?;
        Ok(&self.name)
    }
}
