//! Terminals of a devpts instance of the tree's own that are mounted on files, as container runtimes do with
//! /dev/console: what is mounted is only there while the master is open, so the master comes before the mount.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::{
    fcntl::{OFlag, openat},
    sys::stat::Mode,
};

use super::{fstypes::Again, paths::shown, tree::Tree};
use crate::{
    error::{Error, Result, SysContext},
    interrupt, procfs,
    sys::tty,
};

/// Number of the terminal that the mount at `at` shows, if it has to be made for it.
pub(super) fn number(tree: &Tree, at: usize) -> Option<u32> {
    let mount = tree.mounts.get(at)?;
    let terminals = mount.kind.is_some_and(|kind| kind.again == Again::Terminals);
    let name = mount.root.as_deref()?.strip_prefix(b"/")?;
    let number = procfs::number(name).filter(|number: &u32| number.to_string().as_bytes() == name)?;
    (terminals && !tree.comes_from_outside(at)).then_some(number)
}

/// Refuses parts of a devpts instance of the tree's own that are nothing a restore could make.
pub(super) fn check(tree: &Tree, at: usize) -> Result<()> {
    let mount = tree.at(at)?;
    let terminals = mount.kind.is_some_and(|kind| kind.again == Again::Terminals);
    if !terminals
        || mount.is_whole()
        || tree.comes_from_outside(at)
        || mount.root.as_deref() == Some(b"/ptmx")
    {
        return Ok(());
    }
    let point = shown(&mount.point);
    let refused = |why: String| {
        Err(Error::unsupported(why).remedy(format!(
            "dump with --external mnt[{point}]:NAME, restore with --external mnt[NAME]:PATH"
        )))
    };
    let Some(own) = number(tree, at).filter(|_| !mount.deleted) else {
        return refused(format!(
            "it shows {} of devpts, which cannot be made again",
            shown(mount.root.as_deref().unwrap_or_default())
        ));
    };
    let other = |other: &usize| {
        number(tree, *other) == Some(own) && tree.mounts.get(*other).is_some_and(|m| m.dev != mount.dev)
    };
    match (0..at).find(other) {
        Some(_) => {
            refused(format!("two instances of devpts have a terminal {own}, which images cannot tell apart"))
        }
        None => Ok(()),
    }
}

/// Masters, by device of their instance and by number.
#[derive(Debug, Default)]
pub struct Masters {
    open: BTreeMap<(u32, u32), OwnedFd>,
    /// Those that were asked for; the others are open so that these came up.
    wanted: BTreeSet<(u32, u32)>,
}

impl Masters {
    /// Makes terminal `number` of the instance with root `folder`, which images know as `dev`. The kernel gives the
    /// lowest free number.
    pub(super) fn make(&mut self, folder: BorrowedFd<'_>, dev: u32, number: u32) -> Result<()> {
        self.wanted.insert((dev, number));
        while !self.open.contains_key(&(dev, number)) {
            interrupt::check()?;
            let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let master = openat(folder, "ptmx", flags, Mode::empty()).call("open(ptmx)")?;
            let got = tty::pty_number(master.as_fd())?;
            self.open.insert((dev, got), master);
            if got > number && !self.open.contains_key(&(dev, number)) {
                return Err(Error::host(format!("the terminal {number} is in use")));
            }
        }
        Ok(())
    }

    /// Each that was asked for, with its number.
    pub fn each(&self) -> impl Iterator<Item = (u32, &OwnedFd)> {
        self.wanted.iter().filter_map(|key| Some((key.1, self.open.get(key)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        fstypes,
        mount::{Mount, Outside},
        testing::{mount, tree},
    };
    use super::*;

    /// A part of the instance `dev` of devpts.
    fn part(id: u32, point: &str, dev: u32, root: &str) -> Mount {
        let (kind, root) = (fstypes::by_name(b"devpts"), Some(root.into()));
        Mount { dev, kind, root, ..mount(id, 1, point) }
    }

    #[test]
    fn terminals_on_files_are_known_by_number() {
        let outside = Mount { outside: Some(Outside::Named("c".into())), ..part(6, "/dev/other", 7, "/1") };
        let tree = tree(vec![
            mount(1, 0, "/"),
            part(2, "/dev/pts", 5, "/"),
            part(3, "/dev/console", 5, "/12"),
            part(4, "/dev/ptmx", 5, "/ptmx"),
            part(5, "/dev/odd", 5, "/012"),
            outside,
        ])
        .unwrap();
        let numbers: Vec<_> = (0..6).map(|at| number(&tree, at)).collect();
        assert_eq!(numbers, [None, None, Some(12), None, None, None]);
        let checked: Vec<_> = (0..6).map(|at| check(&tree, at).is_ok()).collect();
        assert_eq!(checked, [true, true, true, true, false, true]);
    }

    #[test]
    fn what_cannot_be_made_is_refused_with_the_option_that_helps() {
        let refused = |mounts: Vec<Mount>, at: usize| {
            let all = [vec![mount(1, 0, "/"), part(2, "/dev/pts", 5, "/"), part(3, "/pts", 6, "/")], mounts];
            check(&tree(all.concat()).unwrap(), at).unwrap_err().to_string()
        };
        let two = vec![part(4, "/a", 5, "/0"), part(5, "/b", 6, "/0")];
        let said = refused(two, 4);
        assert!(said.contains("two instances") && said.contains("--external mnt[/b]:NAME"), "{said}");
        let gone = vec![Mount { deleted: true, ..part(4, "/a", 5, "/0") }];
        assert!(refused(gone, 3).contains("/0 of devpts"));
    }
}
