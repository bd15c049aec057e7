//! Every mount made for itself, in a place where none is in the way of another.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    ops::Range,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
};

use nix::{
    fcntl::{OFlag, openat},
    mount::{MntFlags, umount2},
    sys::{
        stat::{Mode, mkdirat},
        statvfs::fstatvfs,
    },
    unistd::{UnlinkatFlags, unlinkat},
};
use rcriu_images::{ImageDir, ImageKind};

use super::{
    beside::Beside,
    content, flags,
    fstypes::Again,
    mount::Mount,
    paths::below,
    plan,
    prepare::{Given, Prepared},
    spaces::Spaces,
    spot::Spot,
    terminals::{self, Masters},
    tree::{Source, Tree},
    walk,
};
use crate::{
    error::{Context, Error, Result, SysContext},
    sys::mount::{self as calls, Calls, Mounting},
};

/// Folders of the host that may be covered: first those in which no source of a mount is.
const COVERED: [&[u8]; 6] = [b"/sys", b"/mnt", b"/proc", b"/tmp", b"/var", b"/dev"];

/// Something that was made for the moment: the folder it is in, its name, whether it is a folder.
#[derive(Debug)]
struct Moment(OwnedFd, Vec<u8>, bool);

/// All mounts, each in a place of its own.
#[derive(Debug)]
pub(super) struct Plain<'a> {
    pub(super) tree: &'a Tree,
    pub(super) calls: Calls,
    beside: Beside<'a>,
    /// Where the scratch file system is.
    yard: &'static [u8],
    /// By position in the tree, once made.
    roots: Vec<Option<OwnedFd>>,
    /// Mount points of those that are files, once they are in the tree.
    pub(super) spots: BTreeMap<usize, Spot>,
    moments: Vec<Moment>,
    pub(super) spaces: Spaces,
    /// Masters of terminals that are mounted on files.
    pub(super) masters: Masters,
}

impl<'a> Plain<'a> {
    /// Makes them. In the new namespace, which has copies of the host's mounts.
    pub(super) fn make(
        tree: &'a Tree,
        (prepared, beside): (&Prepared, Beside<'a>),
        images: &ImageDir,
    ) -> Result<Plain<'a>> {
        // Before anything is covered.
        let mut paths = BTreeMap::new();
        for (at, given) in &prepared.given {
            if let Given::Path(path, file) = given {
                paths.insert(*at, tree.context(*at, Spot::of(path, file))?);
            }
        }
        let mut plain = Plain {
            tree,
            calls: prepared.calls,
            beside,
            spaces: Spaces::new(tree.spaces.len())?,
            yard: yard()?,
            roots: tree.mounts.iter().map(|_| None).collect(),
            spots: BTreeMap::new(),
            moments: Vec::new(),
            masters: Masters::default(),
        };
        let of = |at: &usize| matches!(tree.sources.get(*at), Some(Source::Of(_)));
        let gone = |at: &usize| tree.mounts.get(*at).is_some_and(|m| m.deleted);
        let (late, early): (Vec<usize>, Vec<usize>) = tree.order.iter().copied().partition(of);
        let (last, late): (Vec<usize>, Vec<usize>) = late.into_iter().partition(gone);
        for at in early.into_iter().chain(late).chain(last) {
            let made = plain.one(at, prepared, paths.get(&at), images);
            tree.context(at, made)?;
        }
        Ok(plain)
    }

    /// Where a mount is before it is put into the tree.
    pub(super) fn path(&self, at: usize) -> Vec<u8> {
        [self.yard, format!("/{at}").as_bytes()].concat()
    }

    /// The root of a mount, wherever it is.
    pub(super) fn root(&self, at: usize) -> Result<&OwnedFd> {
        self.roots.get(at).and_then(Option::as_ref).ok_or_else(|| Error::bug("a mount that is not made"))
    }

    fn one(&mut self, at: usize, prepared: &Prepared, path: Option<&Spot>, images: &ImageDir) -> Result<()> {
        let mount = self.tree.at(at)?;
        match self.tree.sources.get(at) {
            Some(Source::New) => {
                let source = prepared.sources.get(&at).map_or(&mount.source, |source| source);
                self.new_file_system(at, mount, source, images)
            }
            Some(Source::Of(base)) => self.of(at, *base),
            _ => {
                match (prepared.given.get(&at), path) {
                    (Some(Given::Clone(clone)), _) => self.attach(at, clone)?,
                    (_, Some(spot)) => self.bind(at, spot)?,
                    _ => return Err(Error::bug("nothing was prepared for it")),
                }
                // Whatever it shares outside, the tree must not have; being a slave may be asked for.
                let led = self.tree.is_led_outside(at);
                self.change(at, if led { flags::SLAVE } else { flags::PRIVATE })
            }
        }
    }

    fn new_file_system(&mut self, at: usize, mount: &Mount, source: &[u8], images: &ImageDir) -> Result<()> {
        let path = self.node(at, true)?;
        let own = flags::to_set(mount.flags).map_err(|_| Error::bug("flags that were checked"))?;
        let content = mount.kind.is_some_and(|kind| kind.again == Again::Content);
        let both = own & mount.sb_flags & flags::RDONLY;
        let mut given = (own | mount.sb_flags) & !flags::RDONLY | if content { 0 } else { both };
        if !content {
            given |= mount.sb_flags & flags::RDONLY;
        }
        self.beside.enter(self.tree.space_of(at), mount)?;
        calls::mount(Mounting {
            source: if source.is_empty() { b"none" } else { source },
            target: &path,
            kind: mount.type_name(),
            flags: given,
            options: &flags::to_give(&mount.options),
        })
        .during(|| format!("type {}", super::paths::shown(mount.type_name())))?;
        self.opened(at)?;
        if content && let Some(archive) = plan::content_of(mount, images)? {
            let root = walk::to(self.root(at)?.as_fd(), b"")?;
            let name = || ImageKind::TmpfsDev.file_name(mount.dev.into());
            content::unpack(root, archive).during(name)?;
        }
        Ok(())
    }

    /// A mount of a part of what `base` shows.
    fn of(&mut self, at: usize, base: usize) -> Result<()> {
        let (mount, of) = (self.tree.at(at)?, self.tree.at(base)?);
        let rest = mount.root.as_deref().zip(of.root.as_deref()).and_then(|(all, base)| below(all, base));
        let rest = rest.ok_or_else(|| Error::bug("a source that does not show it"))?;
        if mount.deleted {
            self.for_a_moment(at, base, rest)?;
        }
        if let Some(number) = terminals::number(self.tree, at) {
            let folder = self.root(base)?.try_clone().call("dup")?;
            self.masters.make(folder.as_fd(), mount.dev, number)?;
        }
        self.from(at, base, rest)?;
        let keeps = self.tree.groups.iter().any(|g| g.is_led_outside() && g.members.contains(&at));
        if keeps { Ok(()) } else { self.change(at, flags::PRIVATE) }
    }

    /// Mounts what is at `rest` below the root of `base`.
    fn from(&mut self, at: usize, base: usize, rest: &[u8]) -> Result<()> {
        if self.calls.detached {
            let file = walk::to(self.root(base)?.as_fd(), rest)?;
            let clone = calls::clone_of(file.as_fd())?;
            return self.attach(at, &clone);
        }
        let spot = Spot::below(self.root(base)?, rest)?;
        self.bind(at, &spot)
    }

    /// Makes it once more, from another mount of the same file system.
    pub(super) fn again(&mut self, at: usize, base: usize) -> Result<()> {
        let (mount, of) = (self.tree.at(at)?, self.tree.at(base)?);
        let rest = mount.root.as_deref().zip(of.root.as_deref()).and_then(|(all, base)| below(all, base));
        let rest = rest.ok_or_else(|| Error::bug("a source that does not show it"))?.to_vec();
        let path = self.path(at);
        // A clone keeps the file system, which may have no other mount.
        let old = self.roots.get_mut(at).and_then(Option::take);
        let old = old.ok_or_else(|| Error::bug("a mount that is not made"))?;
        umount2(OsStr::from_bytes(&path), MntFlags::MNT_DETACH).call("umount2")?;
        match walk::is_folder(&old)? {
            true => std::fs::remove_dir(OsStr::from_bytes(&path)).call("rmdir")?,
            false => std::fs::remove_file(OsStr::from_bytes(&path)).call("unlink")?,
        }
        self.from(at, base, &rest)?;
        self.set_flags_of(at)
    }

    /// Has clones of these mounts, which stand nowhere, in their place.
    pub(super) fn detach(&mut self, mounts: Range<usize>) -> Result<()> {
        for at in mounts {
            let clone = calls::clone_of(self.root(at)?.as_fd());
            let clone = self.tree.context(at, clone)?;
            if let Some(place) = self.roots.get_mut(at) {
                *place = Some(clone);
            }
        }
        Ok(())
    }

    /// Goes to the namespace that a mount is in.
    pub(super) fn enter(&self, at: usize) -> Result<()> {
        self.spaces.enter(self.tree.space_of(at))
    }

    fn attach(&mut self, at: usize, clone: &OwnedFd) -> Result<()> {
        let path = self.node(at, walk::is_folder(clone)?)?;
        let target = self.no_follow(&path)?;
        calls::attach(clone.as_fd(), target.as_fd())?;
        self.opened(at)
    }

    fn bind(&mut self, at: usize, spot: &Spot) -> Result<()> {
        let target = self.node(at, spot.is_folder())?;
        let source = spot.go()?;
        let bound =
            calls::mount(Mounting { source, target: &target, flags: flags::BIND, ..Mounting::default() });
        bound.map_err(|e| match e.errno() {
            Some(libc::EINVAL) => e.remedy("a user namespace needs open_tree(2), Linux 5.2, for this"),
            _ => e,
        })?;
        self.opened(at)
    }

    /// An empty folder or file to mount on.
    fn node(&self, at: usize, folder: bool) -> Result<Vec<u8>> {
        let path = self.path(at);
        let os = OsStr::from_bytes(&path);
        match folder {
            true => std::fs::create_dir(os).call("mkdir")?,
            false => std::fs::File::create_new(os).call("open").map(drop)?,
        }
        Ok(path)
    }

    fn no_follow(&self, path: &[u8]) -> Result<OwnedFd> {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        nix::fcntl::open(OsStr::from_bytes(path), flags, Mode::empty()).call("open")
    }

    fn opened(&mut self, at: usize) -> Result<()> {
        let root = self.no_follow(&self.path(at))?;
        if let Some(place) = self.roots.get_mut(at) {
            *place = Some(root);
        }
        Ok(())
    }

    /// Makes what was removed, at `rest` below the root of `base`, to be removed again.
    fn for_a_moment(&mut self, at: usize, base: usize, rest: &[u8]) -> Result<()> {
        let parent = self.tree.parents.get(at).copied().flatten().ok_or_else(|| Error::bug("a root"))?;
        let place = below(&self.tree.at(at)?.point, &self.tree.at(parent)?.point).unwrap_or_default();
        let folder = walk::is_folder(walk::to(self.root(parent)?.as_fd(), place)?)?;
        // Through a mount of its own where there can be one: this one may be read-only when it is removed.
        let root = self.root(base)?;
        let mut at = if self.calls.detached {
            calls::clone_of(root.as_fd())?
        } else {
            root.try_clone().call("dup")?
        };
        let parts: Vec<&[u8]> = super::paths::parts(rest).collect();
        for (number, part) in parts.iter().enumerate() {
            let is_last = number + 1 == parts.len();
            let name = OsStr::from_bytes(part);
            let made = if is_last && !folder {
                let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
                openat(&at, name, flags, Mode::from_bits_truncate(0o600)).map(drop)
            } else {
                mkdirat(&at, name, Mode::from_bits_truncate(if is_last { 0o600 } else { 0o755 }))
            };
            match made {
                Err(nix::errno::Errno::EEXIST) if !is_last => {}
                Err(e) => {
                    return Err(Error::sys("mkdir or open", e as i32)
                        .during("making for the moment what was removed")
                        .during(super::paths::shown(rest)));
                }
                Ok(()) => {
                    let keep = at.try_clone().call("dup")?;
                    self.moments.push(Moment(keep, part.to_vec(), !is_last || folder));
                }
            }
            at = walk::open(at.as_fd(), part)?;
        }
        Ok(())
    }

    /// Removes what was made for the moment.
    pub(super) fn remove_moments(&mut self) -> Result<()> {
        while let Some(Moment(folder, name, is_folder)) = self.moments.pop() {
            let how = if is_folder { UnlinkatFlags::RemoveDir } else { UnlinkatFlags::NoRemoveDir };
            unlinkat(&folder, OsStr::from_bytes(&name), how).call("unlinkat")?;
        }
        Ok(())
    }

    /// Gives a mount another propagation: one of the flags for that.
    pub(super) fn change(&self, at: usize, kind: u32) -> Result<()> {
        self.enter(at)?;
        let root = self.root(at)?;
        if self.calls.setattr {
            return calls::set_propagation(root, kind);
        }
        let path;
        let target = match self.spots.get(&at) {
            Some(spot) => spot.go()?,
            None if walk::is_folder(root)? => {
                nix::unistd::fchdir(root).call("fchdir")?;
                b"."
            }
            None => {
                path = self.path(at);
                &path[..]
            }
        };
        calls::mount(Mounting { target, flags: kind, ..Mounting::default() })
    }

    /// Sets what a mount has for itself, read-only for one.
    pub(super) fn set_flags(&self) -> Result<()> {
        for at in 0..self.tree.mounts.len() {
            self.tree.context(at, self.set_flags_of(at))?;
        }
        Ok(())
    }

    /// Makes file systems read-only that had to be filled first. When nothing is to be changed in them any more.
    pub(super) fn set_read_only(&self) -> Result<()> {
        for (at, mount) in self.tree.mounts.iter().enumerate() {
            let content = mount.kind.is_some_and(|kind| kind.again == Again::Content);
            let new = self.tree.sources.get(at) == Some(&Source::New);
            if new && content && mount.sb_flags & flags::RDONLY != 0 {
                let own = flags::to_set(mount.flags).map_err(|_| Error::bug("flags that were checked"))?;
                self.enter(at)?;
                nix::unistd::fchdir(self.root(at)?).call("fchdir")?;
                let flags = flags::REMOUNT | mount.sb_flags | own;
                let set = calls::mount(Mounting { target: b".", flags, ..Mounting::default() });
                self.tree.context(at, set)?;
            }
        }
        Ok(())
    }

    fn set_flags_of(&self, at: usize) -> Result<()> {
        let mount = self.tree.at(at)?;
        let own = flags::to_set(mount.flags).map_err(|_| Error::bug("flags that were checked"))?;
        let target = &self.path(at)[..];
        let has = fstatvfs(self.root(at)?).call("fstatvfs")?.flags();
        if own & flags::RDONLY != 0 || flags::of_statvfs(has) != own {
            let flags = flags::BIND | flags::REMOUNT | own;
            calls::mount(Mounting { target, flags, ..Mounting::default() })?;
        }
        Ok(())
    }
}

impl Drop for Plain<'_> {
    fn drop(&mut self) {
        if let Err(e) = self.remove_moments() {
            log::error!("What was made for the moment stays: {e}");
        }
    }
}

/// Covers a folder of our copy of the host with an empty file system.
fn yard() -> Result<&'static [u8]> {
    let is_folder = |path: &&&[u8]| std::fs::metadata(OsStr::from_bytes(path)).is_ok_and(|m| m.is_dir());
    let place = COVERED.iter().find(is_folder).copied();
    let place = place.ok_or_else(|| Error::host("the host has none of its usual folders to mount on"))?;
    let target = place;
    calls::mount(Mounting { source: b"rcriu", target, kind: b"tmpfs", flags: 0, options: b"mode=700" })?;
    calls::mount(Mounting { target, flags: flags::PRIVATE, ..Mounting::default() })?;
    Ok(place)
}
