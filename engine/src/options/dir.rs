//! A folder given by the user, held open: what is done in it later cannot be redirected by a rename, and it
//! stays reachable from other mount namespaces.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcriu_images::dir::ImageDir;

use crate::error::SysContext;

/// An open folder and the path it was opened by. The path is for messages only.
#[derive(Clone, Debug)]
pub struct Dir {
    fd: Arc<OwnedFd>,
    path: PathBuf,
}

impl Dir {
    /// Opens an existing folder (O_DIRECTORY, close-on-exec).
    pub fn open(path: impl Into<PathBuf>) -> io::Result<Dir> {
        let path = path.into();
        let file = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(&path)?;
        Ok(Dir { fd: Arc::new(file.into()), path })
    }

    /// Takes a folder that is open already; `path` names it in messages.
    pub fn from_fd(fd: OwnedFd, path: impl Into<PathBuf>) -> Dir {
        Dir { fd: Arc::new(fd), path: path.into() }
    }

    /// How the user called it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The same folder as a set of images.
    pub fn images(&self) -> crate::Result<ImageDir> {
        let fd = self.fd.try_clone().call("fcntl(F_DUPFD_CLOEXEC)")?;
        Ok(ImageDir::from_fd(fd, &self.path))
    }

    /// The descriptor by number, for tables of descriptors that must not be overwritten.
    pub fn raw_fd(&self) -> std::os::fd::RawFd {
        use std::os::fd::AsRawFd;
        self.fd.as_raw_fd()
    }
}

impl AsFd for Dir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
