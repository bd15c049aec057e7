//! Propagation groups of mounts that are made, whichever namespaces they are in.
//!
//! New kernels put a mount into the group of another where it stands. Old ones give a group only to clones, so mounts
//! of groups are made once more, from one another, before they are put into the tree.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::{
    flags,
    paths::{below, shown},
    plain::Plain,
    spot::Spot,
    tree::{Group, Tree},
    walk,
};
use crate::{
    error::{Context, Error, Result},
    sys::mount as calls,
};

/// Sets all groups of a tree that is complete.
pub(super) fn set(plain: &Plain<'_>) -> Result<()> {
    let groups = &plain.tree.groups;
    for group in groups {
        let Some(first) = group.members.first() else { continue };
        let above = group.above.and_then(|above| groups.get(above));
        let wide = match group.shared {
            0 => None,
            _ => wider(plain, group)?,
        };
        if let Some(wide) = &wide {
            let in_group = || {
                lead(plain, (*first, wide.as_fd()), b"/", above)?;
                calls::set_propagation(wide, flags::SHARED)
            };
            plain.tree.context(*first, in_group())?;
        }
        for (number, at) in group.members.iter().enumerate() {
            let root = plain.tree.at(*at)?.root.clone().unwrap_or_default();
            let join = || {
                let mount = plain.root(*at)?.as_fd();
                match (&wide, group.shared) {
                    (Some(wide), _) => return calls::set_group(wide.as_fd(), mount),
                    (None, shared) if shared != 0 && number > 0 => {
                        plain.change(*at, flags::PRIVATE)?;
                        return calls::set_group(plain.root(*first)?.as_fd(), mount);
                    }
                    _ => {}
                }
                lead(plain, (*at, mount), &root, above)?;
                if group.shared != 0 { plain.change(*at, flags::SHARED) } else { Ok(()) }
            };
            let joined = join().during(|| format!("propagation group {}", group.shared));
            plain.tree.context(*at, joined)?;
        }
    }
    others(plain)
}

/// Makes a private mount with `root`, which is in the namespace of `at`, a slave of group `above`.
fn lead(
    plain: &Plain<'_>,
    (at, mount): (usize, BorrowedFd<'_>),
    root: &[u8],
    above: Option<&Group>,
) -> Result<()> {
    let Some(above) = above else { return Ok(()) };
    let shows = |at: &&usize| {
        let of = plain.tree.mounts.get(**at).and_then(|m| m.root.as_ref());
        of.is_some_and(|base| below(root, base).is_some())
    };
    let clone;
    let from = match above.members.iter().find(shows) {
        Some(at) => plain.root(*at)?.as_fd(),
        None => {
            clone = member_for(plain, above, root)?;
            clone.as_fd()
        }
    };
    calls::set_group(from, mount)?;
    plain.enter(at)?;
    calls::set_propagation(mount, flags::SLAVE)
}

/// A clone in `group` that shows `root`, which none of its members does. The kernel copies groups only to mounts of
/// the same part or a smaller one, so there is no way from the members up.
fn member_for(plain: &Plain<'_>, group: &Group, root: &[u8]) -> Result<OwnedFd> {
    let first = group.members.first().copied().unwrap_or_default();
    let what = format!(
        "no mount of propagation group {} shows {}, and a slave of it does",
        group.shared,
        shown(root)
    );
    Err(Error::unsupported(what).during(plain.tree.at(first)?.name()))
}

/// If members of a group are of different parts of the file system: a clone of a mount that shows all of them, to be
/// the first of the group; `None` if the first member shows all.
fn wider(plain: &Plain<'_>, group: &Group) -> Result<Option<OwnedFd>> {
    let tree = plain.tree;
    let shows_all = |base: &[u8]| {
        let mut roots = group.members.iter().filter_map(|at| tree.mounts.get(*at)?.root.as_deref());
        roots.all(|root| below(root, base).is_some())
    };
    let Some(first) = group.members.first() else { return Ok(None) };
    let mount = tree.at(*first)?;
    if mount.root.as_deref().is_none_or(shows_all) {
        return Ok(None);
    }
    let fits = |(_, m): &(usize, &super::Mount)| {
        m.dev == mount.dev && !m.deleted && m.root.as_deref().is_some_and(shows_all)
    };
    let Some((at, _)) = tree.mounts.iter().enumerate().find(fits) else {
        let what = format!("propagation group {} has mounts of several parts, and none of all", group.shared);
        return Err(Error::unsupported(what).during(mount.name()));
    };
    plain.enter(at)?;
    let clone = calls::clone_of(plain.root(at)?.as_fd())?;
    calls::set_propagation(&clone, flags::PRIVATE)?;
    Ok(Some(clone))
}

/// Mounts without a group: private or unbindable.
fn others(plain: &Plain<'_>) -> Result<()> {
    for (at, mount) in plain.tree.mounts.iter().enumerate() {
        if (mount.shared, mount.master) == (0, 0) {
            let unbindable = mount.flags & flags::UNBINDABLE != 0;
            let kind = if unbindable { flags::UNBINDABLE } else { flags::PRIVATE };
            plain.tree.context(at, plain.change(at, kind))?;
        }
    }
    Ok(())
}

/// In a copy of the namespace, at its root: not all kernels copy that mounts are unbindable.
pub(super) fn unbindable_again(tree: &Tree, space: usize) -> Result<()> {
    let mounts = tree.spaces.get(space).map(|space| space.mounts.clone()).unwrap_or_default();
    let root = walk::open_folder(b"/")?;
    for at in mounts {
        let mount = tree.at(at)?;
        if mount.flags & flags::UNBINDABLE == 0 || tree.is_hidden(at)? {
            continue;
        }
        let set = || {
            let spot = Spot::below(&root, mount.point.strip_prefix(b"/").unwrap_or_default())?;
            let (target, flags) = (spot.go()?, flags::UNBINDABLE);
            calls::mount(calls::Mounting { target, flags, ..Default::default() })
        };
        tree.context(at, set())?;
    }
    Ok(())
}

/// More than one mount has to do with a group.
fn is_joint(plain: &Plain<'_>, group: &Group) -> bool {
    let slaves = plain.tree.groups.iter().any(|g| group.shared != 0 && g.master == group.shared);
    group.members.len() > 1 || group.above.is_some() || slaves
}

/// Without calls for it: mounts of groups are made from one another. Before they are in the tree.
pub(super) fn clone_joint(plain: &mut Plain<'_>) -> Result<()> {
    let tree = plain.tree;
    for group in tree.groups.iter().filter(|g| is_joint(plain, g)).collect::<Vec<_>>() {
        for (number, at) in group.members.iter().enumerate() {
            let above = group.above.and_then(|above| tree.groups.get(above)?.members.first());
            let first = group.members.first().filter(|_| group.shared != 0 && number > 0);
            let mut join = || {
                match (first, above) {
                    (Some(first), _) => return plain.again(*at, *first),
                    (None, Some(above)) => {
                        plain.again(*at, *above)?;
                        plain.change(*at, flags::SLAVE)?;
                    }
                    (None, None) => {}
                }
                if group.shared != 0 { plain.change(*at, flags::SHARED) } else { Ok(()) }
            };
            let joined = join();
            tree.context(*at, joined)?;
        }
    }
    Ok(())
}

/// Without calls for it: what being put onto a shared mount has changed, and all that no other has to do with.
pub(super) fn finish_old(plain: &Plain<'_>) -> Result<()> {
    for group in &plain.tree.groups {
        let joint = is_joint(plain, group);
        for at in &group.members {
            let change = || {
                if group.shared == 0 {
                    return plain.change(*at, flags::SLAVE);
                }
                if joint { Ok(()) } else { plain.change(*at, flags::SHARED) }
            };
            plain.tree.context(*at, change())?;
        }
    }
    others(plain)
}
