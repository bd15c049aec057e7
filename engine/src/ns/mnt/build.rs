//! Putting the mounts together, and going there.

use std::{
    ffi::OsStr,
    ops::Range,
    os::{fd::AsFd, unix::ffi::OsStrExt},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, umount2},
    unistd::{chdir, chroot, fchdir, pivot_root},
};
use rcriu_images::ImageDir;

use super::{
    beside::Beside, flags, paths::below, plain::Plain, prepare::Prepared, sharing, spot::Spot,
    terminals::Masters, tree::Tree, walk,
};
use crate::{
    error::{Error, Result, SysContext},
    sys::mount::{self as calls, Mounting},
};

/// Makes the namespaces what `tree` says: this one the first. In the process that has it for itself: in all its other
/// namespaces already, just after unshare(CLONE_NEWNS). In each of them `made` is called with its position once it is
/// complete but for propagation. Afterwards `/` and the working folder are the restored root, and nothing of the host is
/// mounted. Terminals that are mounted on files are there for as long as their masters, which are returned.
///
/// Precondition: this process has one thread, and no descriptor below is in the way of ones to come.
///
/// # Errors
/// What the kernel refuses, with the mount. The namespace is of no use then.
pub fn build(
    tree: &Tree,
    (prepared, beside): (&Prepared, Beside<'_>),
    images: &ImageDir,
    mut made: impl FnMut(usize) -> Result<()>,
) -> Result<Masters> {
    // Nothing may reach the host's namespace.
    calls::mount(Mounting { target: b"/", flags: flags::REC | flags::PRIVATE, ..Mounting::default() })?;
    let mut plain = Plain::make(tree, (prepared, beside), images)?;
    plain.set_flags()?;
    if plain.calls.set_group {
        for space in (0..tree.spaces.len()).rev() {
            together(&mut plain, space)?;
            made(space)?;
        }
        sharing::set(&plain)?;
        plain.remove_moments()?;
        plain.set_read_only()?;
        plain.spaces.enter(0)?;
    } else {
        cover_roots(&plain)?;
        sharing::clone_joint(&mut plain)?;
        put_all(&mut plain, 0..tree.mounts.len())?;
        sharing::finish_old(&plain)?;
        plain.remove_moments()?;
        plain.set_read_only()?;
        for space in (0..tree.spaces.len()).rev() {
            if let (1.., Some(of)) = (space, tree.spaces.get(space)) {
                // The copy has us where its own mount of that is.
                fchdir(plain.root(of.root)?).call("fchdir")?;
                plain.spaces.make(space, false)?;
            }
            pivot(&plain, space)?;
            if space != 0 {
                sharing::unbindable_again(tree, space)?;
            }
            made(space)?;
            plain.spaces.enter(0)?;
        }
    }
    chdir("/").call("chdir(/)")?;
    Ok(std::mem::take(&mut plain.masters))
}

/// Puts mounts of a namespace together that stand alone in the first, and leaves nothing else there. The first comes
/// last.
fn together(plain: &mut Plain<'_>, space: usize) -> Result<()> {
    let tree = plain.tree;
    let of = tree.spaces.get(space).ok_or_else(|| Error::bug("a namespace too many"))?;
    plain.spaces.enter(0)?;
    if space != 0 {
        // Where they stand no other namespace can take them from.
        plain.detach(of.mounts.clone())?;
        plain.spaces.make(space, true)?;
        let place = walk::open_folder(&plain.path(of.root))?;
        tree.context(of.root, calls::attach(plain.root(of.root)?.as_fd(), place.as_fd()))?;
    }
    put_all(plain, of.mounts.clone())?;
    pivot(plain, space)
}

/// Moves all of these mounts to their places.
fn put_all(plain: &mut Plain<'_>, mounts: Range<usize>) -> Result<()> {
    let tree = plain.tree;
    for at in tree.order.iter().copied().filter(|at| mounts.contains(at) && !tree.is_root(*at)) {
        let put = put(plain, at);
        tree.context(at, put)?;
    }
    Ok(())
}

/// Moves a mount to its place.
fn put(plain: &mut Plain<'_>, at: usize) -> Result<()> {
    let tree = plain.tree;
    let parent = tree.parents.get(at).copied().flatten().ok_or_else(|| Error::bug("a second root"))?;
    let rest = below(&tree.at(at)?.point, &tree.at(parent)?.point);
    let rest = rest.ok_or_else(|| Error::bug("a mount outside of its parent"))?;
    if plain.calls.detached {
        let target = walk::to(plain.root(parent)?.as_fd(), rest)?;
        calls::attach(plain.root(at)?.as_fd(), target.as_fd())?;
    } else {
        let spot = Spot::below(plain.root(parent)?, rest)?;
        let source = plain.path(at);
        let target = spot.go()?;
        calls::mount(Mounting { source: &source, target, flags: flags::MOVE, ..Mounting::default() })?;
    }
    if !plain.calls.setattr && !walk::is_folder(plain.root(at)?)? {
        let spot = Spot::below(plain.root(parent)?, rest)?;
        plain.spots.insert(at, spot);
    }
    Ok(())
}

/// pivot_root(2) takes no shared mount to put the old root on: one of ours goes between, while the new root is still
/// alone.
fn cover_roots(plain: &Plain<'_>) -> Result<()> {
    plain.tree.spaces.iter().try_for_each(|space| {
        let target = &plain.path(space.root)[..];
        calls::mount(Mounting { source: b"rcriu", target, kind: b"tmpfs", flags: 0, options: b"mode=700" })?;
        calls::mount(Mounting { target, flags: flags::PRIVATE, ..Mounting::default() })
    })
}

/// Makes the root of a namespace the root, and detaches the old one with all that is on it. In a copy that has mounts
/// put together before, the working folder is the root.
fn pivot(plain: &Plain<'_>, space: usize) -> Result<()> {
    let root = plain.tree.spaces.get(space).map(|space| space.root);
    let root = root.ok_or_else(|| Error::bug("a namespace too many"))?;
    let cover = !plain.calls.set_group;
    if space == 0 || !cover {
        fchdir(plain.root(root)?).call("fchdir")?;
    }
    let shares = cover && plain.tree.spaces.len() > 1;
    let folders = if shares { Some((walk::open_folder(b"/")?, walk::open_folder(b".")?)) } else { None };
    let over = plain.path(root);
    let old = if cover { OsStr::from_bytes(&over) } else { OsStr::new(".") };
    match pivot_root(OsStr::new("."), old) {
        Ok(()) => {
            if let Some((outside, new)) = folders {
                // Mounts of other namespaces go with it, but not those that they share with.
                fchdir(outside).call("fchdir")?;
                let flags = flags::REC | flags::PRIVATE;
                calls::mount(Mounting { target: b".", flags, ..Mounting::default() })?;
                fchdir(new).call("fchdir")?;
            }
            // It is on top of the new root now.
            umount2(".", MntFlags::MNT_DETACH).call("umount2(old root)")?;
            if cover {
                umount2(".", MntFlags::MNT_DETACH).call("umount2")?;
            }
        }
        // A root that is on nothing, as that of an initramfs, can only be covered.
        Err(Errno::EINVAL) => {
            if cover {
                umount2(&*over, MntFlags::MNT_DETACH).call("umount2")?;
            }
            calls::mount(Mounting { source: b".", target: b"/", flags: flags::MOVE, ..Mounting::default() })?;
            chroot(".").call("chroot")?;
        }
        Err(e) => return Err(Error::sys("pivot_root", e as i32)),
    }
    chdir("/").call("chdir(/)")
}
