//! Ways through a file system that nothing leads astray: component by component, never through a symbolic link.
//!
//! Paths of images say where something was when links had been followed, so a link on the way is not what was there;
//! and where a restore runs, it could lead to files of the host.

use std::{
    ffi::OsStr,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
};

use nix::{
    fcntl::{OFlag, openat},
    sys::stat::{Mode, SFlag, fstat},
};

use super::paths::{parts, shown};
use crate::error::{Context, Error, Result, SysContext};

/// `name` in `folder`, not followed, as O_PATH.
pub(super) fn open(folder: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(folder, OsStr::from_bytes(name), flags, Mode::empty()).call("openat").during(|| shown(name))
}

/// What lies at the relative path `rest` below `folder`; the folder itself if that is empty.
///
/// # Errors
/// ENOENT; ENOTDIR also for a symbolic link on the way. A component that leads up.
pub(super) fn to(folder: BorrowedFd<'_>, rest: &[u8]) -> Result<OwnedFd> {
    let mut at = folder.try_clone_to_owned().call("dup")?;
    for part in parts(rest).filter(|part| !part.is_empty() && *part != b".") {
        if part == b".." {
            return Err(Error::image(format!("{} leads up", shown(rest))));
        }
        at = open(at.as_fd(), part)?;
    }
    Ok(at)
}

/// The folder that `rest` is in, and its name there.
pub(super) fn split(rest: &[u8]) -> (&[u8], &[u8]) {
    match rest.iter().rposition(|c| *c == b'/') {
        Some(at) => (rest.get(..at).unwrap_or_default(), rest.get(at + 1..).unwrap_or_default()),
        None => (b"", rest),
    }
}

/// Whether an open file is a folder.
pub(super) fn is_folder(file: impl AsFd) -> Result<bool> {
    let stat = fstat(file).call("fstat")?;
    Ok(stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFDIR.bits())
}

/// The folder at an absolute path, as O_PATH.
pub(super) fn open_folder(path: &[u8]) -> Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    nix::fcntl::open(OsStr::from_bytes(path), flags, Mode::empty()).call("open").during(|| shown(path))
}
