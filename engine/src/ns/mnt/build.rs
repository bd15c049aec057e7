//! Putting the mounts together, and going there.

use std::{
    ffi::OsStr,
    os::{fd::AsFd, unix::ffi::OsStrExt},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, umount2},
    unistd::{chdir, chroot, fchdir, pivot_root},
};
use rcriu_images::ImageDir;

use super::{
    flags, paths::below, plain::Plain, prepare::Prepared, sharing, spot::Spot, terminals::Masters,
    tree::Tree, walk,
};
use crate::{
    error::{Error, Result, SysContext},
    sys::mount::{self as calls, Mounting},
};

/// Makes the namespace what `tree` says. In the process that has it for itself: in all its other namespaces already,
/// just after unshare(CLONE_NEWNS). Afterwards `/` and the working folder are the restored root, and nothing of the
/// host is mounted. Terminals that are mounted on files are there for as long as their masters, which are returned.
///
/// Precondition: this process has one thread, and no descriptor below is in the way of ones to come.
///
/// # Errors
/// What the kernel refuses, with the mount. The namespace is of no use then.
pub fn build(tree: &Tree, prepared: &Prepared, images: &ImageDir) -> Result<Masters> {
    // Nothing may reach the host's namespace.
    calls::mount(Mounting { target: b"/", flags: flags::REC | flags::PRIVATE, ..Mounting::default() })?;
    let mut plain = Plain::make(tree, prepared, images)?;
    plain.set_flags()?;
    let set_group = plain.calls.set_group;
    if !set_group {
        cover_root(&plain)?;
        sharing::clone_joint(&mut plain)?;
    }
    for at in tree.order.iter().copied().filter(|at| *at != tree.root) {
        let put = put(&mut plain, at);
        tree.context(at, put)?;
    }
    pivot(&plain, !set_group)?;
    if set_group {
        sharing::set(&plain)?
    } else {
        sharing::finish_old(&plain)?
    }
    plain.remove_moments()?;
    plain.set_read_only()?;
    chdir("/").call("chdir(/)")?;
    Ok(std::mem::take(&mut plain.masters))
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
fn cover_root(plain: &Plain<'_>) -> Result<()> {
    let target = &plain.path(plain.tree.root)[..];
    calls::mount(Mounting { source: b"rcriu", target, kind: b"tmpfs", flags: 0, options: b"mode=700" })?;
    calls::mount(Mounting { target, flags: flags::PRIVATE, ..Mounting::default() })
}

/// Makes the new root the root, and detaches the old one with all that is on it.
fn pivot(plain: &Plain<'_>, cover: bool) -> Result<()> {
    let root = plain.root(plain.tree.root)?;
    fchdir(root).call("fchdir")?;
    let over = plain.path(plain.tree.root);
    let old = if cover { OsStr::from_bytes(&over) } else { OsStr::new(".") };
    match pivot_root(OsStr::new("."), old) {
        Ok(()) => {
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
