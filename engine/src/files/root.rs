//! Where the paths of tasks begin: at our own root, or at that of the mount namespace the tree has for itself.
//!
//! Dump and restore stay in their own mount namespace, with their own /proc. A path of a task in another one is
//! found below a descriptor of that namespace's root, or from inside, with that as our root for a while.

use std::{
    borrow::Cow,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::Arc,
};

use nix::{
    fcntl::{AtFlags, OFlag, openat},
    sched::CloneFlags,
    sys::stat::{FileStat, Mode, fstatat},
    unistd::{chroot, fchdir},
};

use crate::{
    error::{Context, Error, Result, SysContext},
    netlock::{Method, Whole},
    ns::user::Ids,
    procfs::mountinfo::{self, Mount},
    pstree::Numbering,
};

/// Where a tree lives, as far as files are concerned.
#[derive(Debug)]
pub struct Where {
    /// How numbers of tasks read inside of it.
    pub numbering: Numbering,
    /// The same of users and groups.
    pub ids: Ids,
    /// Where paths begin.
    pub root: Root,
    /// Kinds of which the tree has a namespace of its own.
    pub own: CloneFlags,
    /// The lock of its own network namespace, and how it was made.
    pub(crate) lock: Option<(Method, Whole)>,
}

impl Default for Where {
    fn default() -> Self {
        let (numbering, ids, root) = Default::default();
        Where { numbering, ids, root, own: CloneFlags::empty(), lock: None }
    }
}

/// Root folder of a mount namespace.
#[derive(Clone, Debug, Default)]
pub struct Root(Option<Arc<Elsewhere>>);

#[derive(Debug)]
struct Elsewhere {
    folder: OwnedFd,
    mounts: Vec<Mount>,
    /// The namespace itself.
    namespace: Option<OwnedFd>,
}

impl Root {
    /// The root of another namespace, opened with O_PATH; `mountinfo` is the file of that name of a process at that
    /// root.
    ///
    /// # Errors
    /// A file that is not understood.
    pub fn of(folder: OwnedFd, mountinfo: &[u8]) -> Result<Root> {
        Root::of_namespace(folder, mountinfo, None)
    }

    /// The same of one whose tasks may open `namespace` as a file while they are not in it yet.
    pub fn of_namespace(folder: OwnedFd, mountinfo: &[u8], namespace: Option<OwnedFd>) -> Result<Root> {
        let mounts =
            mountinfo::parse(mountinfo).ok_or_else(|| Error::host("its mountinfo is not understood"))?;
        Ok(Root(Some(Arc::new(Elsewhere { folder, mounts, namespace }))))
    }

    /// Mounts of the namespace, in order of mounting; their points are paths of tasks.
    pub fn mounts(&self) -> Result<Cow<'_, [Mount]>> {
        match &self.0 {
            Some(elsewhere) => Ok(Cow::Borrowed(&elsewhere.mounts)),
            None => Ok(Cow::Owned(mountinfo::own()?)),
        }
    }

    /// Whether it is that of another namespace than ours.
    pub fn is_elsewhere(&self) -> bool {
        self.0.is_some()
    }

    /// What to call `path`, as an absolute path of a task, with any system call that takes a path: for as long as this
    /// is there, and /proc is ours. A link on the way must not be absolute, as none is in paths that the kernel tells.
    pub fn path<'p>(&self, path: &'p [u8]) -> Cow<'p, [u8]> {
        match &self.0 {
            Some(root) if path.starts_with(b"/") => {
                let mut whole = format!("/proc/self/fd/{}", root.folder.as_raw_fd()).into_bytes();
                whole.extend_from_slice(path);
                Cow::Owned(whole)
            }
            _ => Cow::Borrowed(path),
        }
    }

    /// What is at `path`, without following a link at its end.
    pub fn lstat(&self, path: &[u8]) -> nix::Result<FileStat> {
        fstatat(nix::fcntl::AT_FDCWD, self.path(path).as_ref(), AtFlags::AT_SYMLINK_NOFOLLOW)
    }

    /// Acts with this as root folder of the calling process, where the name itself matters.
    ///
    /// Preconditions: the process has a single thread; `act` needs nothing of /proc.
    ///
    /// # Errors
    /// What `act` returns; EPERM without CAP_SYS_CHROOT.
    pub fn within<T>(&self, act: impl FnOnce() -> Result<T>) -> Result<T> {
        let Some(root) = &self.0 else { return act() };
        let folder = |name: &str| {
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            openat(nix::fcntl::AT_FDCWD, name, flags, Mode::empty()).call("open").during(|| name.to_owned())
        };
        let (ours, here) = (folder("/")?, folder(".")?);
        let enter = |folder: &OwnedFd| {
            fchdir(folder.as_fd()).call("fchdir")?;
            chroot(".").call("chroot")
        };
        enter(&root.folder)?;
        let done = act();
        enter(&ours).and_then(|()| fchdir(here.as_fd()).call("fchdir"))?;
        done
    }

    /// The namespace, if tasks are not in it yet.
    pub fn namespace(&self) -> Option<&OwnedFd> {
        self.0.as_deref().and_then(|root| root.namespace.as_ref())
    }

    /// The folder itself.
    ///
    /// # Errors
    /// It is our own.
    pub fn folder(&self) -> Result<&OwnedFd> {
        self.0.as_deref().map(|root| &root.folder).ok_or_else(|| Error::bug("no other root"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_begin_at_the_root() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("file"), "x").unwrap();
        let ours = Root::default();
        assert_eq!(ours.path(b"/file").as_ref(), b"/file");
        let root = Root::of(std::fs::File::open(folder.path()).unwrap().into(), b"").unwrap();
        assert_eq!(root.lstat(b"/file").unwrap().st_size, 1);
        assert_eq!(root.path(b"file").as_ref(), b"file");
        assert!(ours.lstat(b"/file").is_err());
    }
}
