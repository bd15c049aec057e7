//! Where the paths of tasks begin: at our own root, or at that of the mount namespace the tree has for itself.
//!
//! Dump and restore stay in their own mount namespace, with their own /proc. A path of a task in another one is
//! found below a descriptor of that namespace's root, or from inside, with that as our root for a while.

use std::{
    borrow::Cow,
    collections::HashMap,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::Arc,
};

use nix::{
    fcntl::{AtFlags, OFlag, openat},
    sched::CloneFlags,
    sys::stat::{FileStat, Mode, fstat, fstatat},
    unistd::{chroot, fchdir},
};

use super::Spaces;
use crate::{
    error::{Context, Error, Result, SysContext},
    netlock::Locks,
    ns::{mnt::paths as mounts, net, user::Ids},
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
    pub roots: Roots,
    /// Kinds of which the tree has a namespace of its own.
    pub own: CloneFlags,
    /// Namespaces of which it has several of a kind.
    pub spaces: Spaces,
    /// Its own network namespaces.
    pub networks: net::Networks,
    /// The locks of those, with their numbers, and how they were made.
    pub(crate) lock: Option<Locks>,
}

impl Default for Where {
    fn default() -> Self {
        let (numbering, ids, roots, spaces, networks) = Default::default();
        Where { numbering, ids, roots, own: CloneFlags::empty(), spaces, networks, lock: None }
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

    /// The same of one whose tasks may have `namespace` open as a file.
    pub fn of_namespace(folder: OwnedFd, mountinfo: &[u8], namespace: Option<OwnedFd>) -> Result<Root> {
        let mounts =
            mountinfo::parse(mountinfo).ok_or_else(|| Error::host("its mountinfo is not understood"))?;
        Ok(Root(Some(Arc::new(Elsewhere { folder, mounts, namespace }))))
    }

    /// Mounts of the namespace, in order of mounting; their points are paths of tasks.
    pub fn mounts(&self) -> Result<Mounts<'_>> {
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

    /// Opens what is at an absolute path of a task, also while another folder is our root.
    pub fn open(&self, path: &[u8], flags: OFlag) -> nix::Result<OwnedFd> {
        let rest = path.strip_prefix(b"/").unwrap_or(path);
        match &self.0 {
            Some(root) => {
                let rest = if rest.is_empty() { &b"."[..] } else { rest };
                openat(&root.folder, rest, flags, Mode::empty())
            }
            None => openat(nix::fcntl::AT_FDCWD, path, flags, Mode::empty()),
        }
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

    /// The namespace, if it is told.
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

/// Mounts of a namespace.
pub type Mounts<'a> = Cow<'a, [Mount]>;

/// Our own root.
static OURS: Root = Root(None);

/// A mount: which files of its file system are where.
#[derive(Clone, Debug)]
pub struct Place {
    /// Its number in images.
    pub id: i32,
    /// The file system's device: major << 20 | minor.
    pub dev: u32,
    /// Which folder of the file system is mounted.
    pub root: Vec<u8>,
    /// Where.
    pub point: Vec<u8>,
    pub writable: bool,
}

impl Place {
    /// A mount, as the kernel tells of it.
    pub fn of(mount: &Mount) -> Place {
        Place {
            id: mount.id,
            dev: mount.dev.0 << 20 | mount.dev.1,
            root: mount.root.clone(),
            point: mount.point.clone(),
            writable: !mount.has_option("ro") && !mount.options.split(|c| *c == b',').any(|o| o == b"ro"),
        }
    }
}

/// Roots of all mount namespaces of a tree, and which mount is in which.
#[derive(Clone, Debug, Default)]
pub struct Roots(Arc<Mounted>);

#[derive(Debug, Default)]
struct Mounted {
    /// With their numbers in images; that of the root task first.
    list: Vec<(u32, Root)>,
    places: Vec<Vec<Place>>,
    /// Mount -> position of its namespace and among the places there.
    by_id: HashMap<i32, (usize, usize)>,
}

/// A file: the mount it is on, and its path in the namespace of that.
pub type Path<'a> = (Option<i32>, &'a [u8]);

impl Roots {
    /// A single root; the numbers of its mounts are not known.
    pub fn of(root: Root) -> Roots {
        Roots(Arc::new(Mounted { list: vec![(0, root)], ..Mounted::default() }))
    }

    /// Those of several namespaces, with their mounts.
    pub fn new(list: Vec<(u32, Root)>, places: Vec<Vec<Place>>) -> Roots {
        let numbered = places.iter().enumerate().flat_map(|(space, places)| {
            places.iter().enumerate().map(move |(at, place)| (place.id, (space, at)))
        });
        let by_id = numbered.collect();
        Roots(Arc::new(Mounted { list, places, by_id }))
    }

    /// That of the root task.
    pub fn main(&self) -> &Root {
        self.0.list.first().map_or(&OURS, |(_, root)| root)
    }

    /// Position of the namespace that a mount is in.
    pub(super) fn position(&self, mount: Option<i32>) -> usize {
        mount.and_then(|mount| self.0.by_id.get(&mount)).map_or(0, |(space, _)| *space)
    }

    /// That of the namespace that a mount is in; for one that is not known, that of the root task.
    pub fn of_mount(&self, mount: Option<i32>) -> &Root {
        self.0.list.get(self.position(mount)).map_or(&OURS, |(_, root)| root)
    }

    /// That of the namespace with this number in images.
    pub fn of_namespace(&self, id: u32) -> Option<&Root> {
        self.0.list.iter().find(|(known, _)| *known == id).map(|(_, root)| root)
    }

    /// Number in images of the namespace that a file is, if it is one of these.
    pub(super) fn number_of(&self, file: &FileStat) -> Option<u32> {
        let is = |root: &Root| {
            let stat = root.namespace().and_then(|namespace| fstat(namespace).ok());
            stat.is_some_and(|stat| (stat.st_dev, stat.st_ino) == (file.st_dev, file.st_ino))
        };
        self.0.list.iter().find(|(_, root)| is(root)).map(|(id, _)| *id)
    }

    /// All of them, that of the root task first.
    pub fn each(&self) -> impl Iterator<Item = &Root> {
        let none = self.0.list.is_empty().then_some(&OURS);
        none.into_iter().chain(self.0.list.iter().map(|(_, root)| root))
    }

    /// All mounts, with their namespaces.
    pub fn mounts(&self) -> Result<Vec<(&Root, Mounts<'_>)>> {
        self.each().map(|root| Ok((root, root.mounts()?))).collect()
    }

    /// One mount through which all these names of one file can be made, as names cannot be linked from one mount to
    /// another: its namespace, the names there, and the mount if it is read-only, as all of them are. Without such a
    /// mount, the root of the first and the names as they are.
    pub(super) fn together(&self, files: &[Path<'_>]) -> (&Root, Vec<Vec<u8>>, Option<&Place>) {
        let spaces = &*self.0;
        let as_is = || {
            let root = self.of_mount(files.first().and_then(|(mount, _)| *mount));
            (root, files.iter().map(|(_, path)| path.to_vec()).collect(), None)
        };
        let of = |mount: Option<i32>| {
            let (space, at) = *spaces.by_id.get(&mount?)?;
            Some((space, spaces.places.get(space)?.get(at)?))
        };
        let inner = |(mount, path): &Path<'_>| {
            let (_, place) = of(*mount)?;
            Some((place.dev, mounts::join(&place.root, mounts::below(path, &place.point)?)))
        };
        let Some(inner) = files.iter().map(inner).collect::<Option<Vec<_>>>() else { return as_is() };
        let Some(dev) = inner.first().map(|(dev, _)| *dev) else { return as_is() };
        let names = |place: &Place| {
            let name = |(of, path): &(u32, Vec<u8>)| {
                let rest = mounts::below(path, &place.root).filter(|_| *of == dev && place.dev == dev)?;
                Some(mounts::join(&place.point, rest))
            };
            inner.iter().map(name).collect::<Option<Vec<_>>>()
        };
        // Their own first: it is known not to be hidden.
        let candidates = |writable: bool| {
            let own = files.iter().filter_map(move |(mount, _)| of(*mount));
            let all = spaces.places.iter().enumerate();
            let all = all.flat_map(|(space, places)| places.iter().map(move |place| (space, place)));
            own.chain(all).filter(move |(_, place)| place.writable == writable)
        };
        let found = candidates(true).chain(candidates(false)).find_map(|(space, place)| {
            // A name that leads to another mount is none of this one.
            let leads = |path: &Vec<u8>| spaces.leads_to(space, path) == Some(place.id);
            Some((space, place, names(place).filter(|names| names.iter().all(leads))?))
        });
        match found.and_then(|(space, place, names)| Some((&spaces.list.get(space)?.1, place, names))) {
            Some((root, place, names)) => (root, names, Some(place).filter(|place| !place.writable)),
            None => as_is(),
        }
    }
}

impl Mounted {
    /// The mount that a path of a namespace leads to: that of the longest point, of several the last.
    fn leads_to(&self, space: usize, path: &[u8]) -> Option<i32> {
        let places = self.places.get(space)?.iter();
        let on = places.filter(|place| mounts::below(path, &place.point).is_some());
        on.max_by_key(|place| place.point.len()).map(|place| place.id)
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
