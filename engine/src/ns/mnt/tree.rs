//! The mounts of a tree's namespaces, one tree of mounts for each: what is on what, in which order, and what each is
//! made from. Sources and propagation lead from one namespace to another.
//!
//! Dump and restore build it alike, so a namespace that no restore could make is refused by the dump. Numbers of
//! mounts are positions in the table of all of them from here on.

use std::{collections::HashMap, ops::Range};

use super::{
    fstypes::Again,
    mount::{Mount, Outside},
    paths::{below, depth, join, shown},
};
use crate::{
    error::{Context, Error, Result},
    files::Place,
};

/// What a mount is made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The root that whoever restores gives.
    Root,
    /// A path outside.
    Outside,
    /// Mounted as a file system of its own.
    New,
    /// From another mount of the same file system.
    Of(usize),
}

/// Mounts that belong together: one propagation group, slaves of one other, or both.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    pub shared: u32,
    pub master: u32,
    /// Those whose root comes first in the path are first.
    pub members: Vec<usize>,
    /// The group it is a slave of; `None` also if that is outside.
    pub above: Option<usize>,
}

impl Group {
    /// It is a slave of a group that only exists outside of the namespace.
    pub fn is_led_outside(&self) -> bool {
        self.master != 0 && self.above.is_none()
    }
}

/// One of the namespaces.
#[derive(Debug, Clone)]
pub(super) struct Space {
    /// Its number in the images.
    pub(super) id: u32,
    pub(super) root: usize,
    /// Where its mounts are in the table.
    pub(super) mounts: Range<usize>,
}

/// All mounts of all namespaces.
#[derive(Debug)]
pub struct Tree {
    /// That of the root task is the first.
    pub(super) spaces: Vec<Space>,
    /// In the order of the kernel's tables.
    pub(super) mounts: Vec<Mount>,
    /// The mount each is on; roots are on none.
    pub(super) parents: Vec<Option<usize>>,
    /// Parents before those on them, and of two on one parent the deeper first: it may be hidden by the other.
    pub(super) order: Vec<usize>,
    pub(super) sources: Vec<Source>,
    /// Those above come first.
    pub(super) groups: Vec<Group>,
    by_id: HashMap<u32, usize>,
}

impl Tree {
    /// Of the tables of all namespaces with their numbers, that of the root task first.
    ///
    /// # Errors
    /// Tables that are no tree, and mounts that could not be made again; the flag that would help is named.
    pub(super) fn new(tables: Vec<(u32, Vec<Mount>)>) -> Result<Tree> {
        let (mut mounts, mut spaces) = (Vec::new(), Vec::new());
        let mut by_id = HashMap::new();
        let mut parents = Vec::new();
        for (id, table) in tables {
            let first = mounts.len();
            for (at, mount) in table.iter().enumerate() {
                if by_id.insert(mount.id, first + at).is_some() {
                    return Err(Error::image(format!("two mounts have the number {}", mount.id)));
                }
            }
            mounts.extend(table);
            let range = first..mounts.len();
            let (root, on) = parents_of(&mounts, range.clone(), &by_id)?;
            parents.extend(on);
            spaces.push(Space { id, root, mounts: range });
        }
        let root = spaces.first().map(|space| space.root).ok_or_else(|| Error::bug("no namespace"))?;
        let order = order(&mounts, &parents, spaces.iter().map(|space| space.root))?;
        for (mount, parent) in mounts.iter().zip(&parents) {
            if let Some(parent) = parent.and_then(|parent| mounts.get(parent))
                && below(&mount.point, &parent.point).is_none()
            {
                let what = format!("it is said to be on {}", parent.name());
                return Err(Error::image(what).during(mount.name()));
            }
        }
        let sources = sources(&mounts, root)?;
        let groups = super::groups::of(&mounts, &sources)?;
        Ok(Tree { spaces, mounts, parents, order, sources, groups, by_id })
    }

    /// Numbers of the namespaces in the images, that of the root task first.
    pub fn ids(&self) -> impl Iterator<Item = u32> {
        self.spaces.iter().map(|space| space.id)
    }

    /// In which of the namespaces the mount at a position is.
    pub(super) fn space_of(&self, at: usize) -> usize {
        self.spaces.iter().position(|space| space.mounts.contains(&at)).unwrap_or(0)
    }

    /// The mount at a position is the root of its namespace.
    pub(super) fn is_root(&self, at: usize) -> bool {
        self.parents.get(at) == Some(&None)
    }

    /// Where files can be found by the numbers of mounts, for [`Roots`](crate::files::Roots): by namespace.
    pub fn places(&self) -> Vec<Vec<Place>> {
        let place = |mount: &Mount| Place {
            id: mount.id.cast_signed(),
            dev: mount.dev,
            root: mount.root.clone().unwrap_or_default(),
            point: mount.point.clone(),
            writable: (mount.flags | mount.sb_flags) & super::flags::RDONLY == 0,
        };
        let of = |space: &Space| self.mounts.get(space.mounts.clone()).unwrap_or_default();
        self.spaces.iter().map(|space| of(space).iter().map(place).collect()).collect()
    }

    /// The mount with this number.
    pub fn mount(&self, id: u32) -> Option<&Mount> {
        self.position(id).and_then(|at| self.mounts.get(at))
    }

    pub(super) fn position(&self, id: u32) -> Option<usize> {
        self.by_id.get(&id).copied()
    }

    /// The mount at a position of this tree.
    pub(super) fn at(&self, at: usize) -> Result<&Mount> {
        self.mounts.get(at).ok_or_else(|| Error::bug("a position outside of the mounts"))
    }

    /// Mounts that are on `at`.
    pub(super) fn children(&self, at: usize) -> impl Iterator<Item = (usize, &Mount)> {
        let on = move |(child, _): &(usize, &Mount)| self.parents.get(*child) == Some(&Some(at));
        self.mounts.iter().enumerate().filter(on)
    }

    /// Something is mounted over the mount at `at`, so that no path leads to it.
    pub(super) fn is_hidden(&self, at: usize) -> Result<bool> {
        let (mut at, mut point) = (at, self.at(at)?.point.clone());
        // One on its very root hides it, and so does one on a mount further down that is above it on the way.
        if self.children(at).any(|(_, child)| child.point == point) {
            return Ok(true);
        }
        while let Some(parent) = self.parents.get(at).copied().flatten() {
            point.clone_from(&self.at(at)?.point);
            let covers = |(sibling, m): (usize, &Mount)| sibling != at && below(&point, &m.point).is_some();
            if self.children(parent).any(covers) {
                return Ok(true);
            }
            at = parent;
        }
        Ok(false)
    }

    /// Where in the restored namespace the file is that was `path` of the namespace, on mount `id`.
    ///
    /// # Errors
    /// A mount that is not there; one that no path leads to, or not this one.
    pub fn path(&self, id: u32, path: &[u8]) -> Result<Vec<u8>> {
        let whole = if path.starts_with(b"/") { path.to_vec() } else { join(b"/", path) };
        let (at, mount) = self
            .position(id)
            .and_then(|at| Some((at, self.mounts.get(at)?)))
            .ok_or_else(|| Error::image(format!("{}: there is no mount {id}", shown(&whole))))?;
        if below(&whole, &mount.point).is_none() {
            return Err(Error::image(format!("{} is not on {}", shown(&whole), mount.name())));
        }
        if self.is_hidden(at)? || self.leads_elsewhere(at, &whole) {
            let what = format!("{} is hidden by what is mounted over {}", shown(&whole), mount.name());
            return Err(Error::unsupported(what));
        }
        Ok(whole)
    }

    /// A mount on `at` is on the way to `path`.
    fn leads_elsewhere(&self, at: usize, path: &[u8]) -> bool {
        self.children(at).any(|(_, child)| below(path, &child.point).is_some())
    }

    /// Root and what is mounted directly or not from it, or from outside: nothing of these is in the images.
    pub(super) fn comes_from_outside(&self, at: usize) -> bool {
        match self.sources.get(at) {
            Some(Source::Root | Source::Outside) => true,
            Some(Source::Of(base)) => {
                matches!(self.sources.get(*base), Some(Source::Root | Source::Outside))
            }
            _ => false,
        }
    }
}

/// Root of the namespace whose mounts stand at `range`, and what each of them is on.
fn parents_of(
    mounts: &[Mount],
    range: Range<usize>,
    by_id: &HashMap<u32, usize>,
) -> Result<(usize, Vec<Option<usize>>)> {
    let mut root = None;
    let mut parents = Vec::with_capacity(range.len());
    for at in range.clone() {
        let Some(mount) = mounts.get(at) else { continue };
        let parent = by_id.get(&mount.parent).copied();
        let parent = parent.filter(|parent| *parent != at && range.contains(parent));
        if parent.is_none() {
            if mount.point != b"/" {
                let why = format!("mount {}, which it is on, is not there", mount.parent);
                return Err(Error::image(why).during(mount.name()));
            }
            if let Some(other) = root.replace(at).and_then(|other| mounts.get(other)) {
                return Err(Error::image(format!("there are two roots: {} and {}", other.id, mount.id)));
            }
        }
        parents.push(parent);
    }
    let root = root.ok_or_else(|| Error::image("no mount is the root of the namespace"))?;
    Ok((root, parents))
}

fn order(
    mounts: &[Mount],
    parents: &[Option<usize>],
    roots: impl DoubleEndedIterator<Item = usize>,
) -> Result<Vec<usize>> {
    let mut on: Vec<Vec<usize>> = vec![Vec::new(); mounts.len()];
    for (at, parent) in parents.iter().enumerate() {
        if let Some(children) = parent.and_then(|parent| on.get_mut(parent)) {
            children.push(at);
        }
    }
    let point = |at: usize| mounts.get(at).map_or(&[][..], |m| &m.point);
    for children in &mut on {
        children.sort_by_key(|at| (std::cmp::Reverse(depth(point(*at))), *at));
        let twice = children.iter().zip(children.iter().skip(1)).find(|(a, b)| point(**a) == point(**b));
        if let Some((one, other)) = twice.and_then(|(a, b)| mounts.get(*a).zip(mounts.get(*b))) {
            let what = format!("{} is at the same place of the same mount", other.name());
            return Err(Error::unsupported(what).during(one.name()));
        }
    }
    let (mut order, mut next) = (Vec::with_capacity(mounts.len()), roots.rev().collect::<Vec<_>>());
    while let Some(at) = next.pop() {
        order.push(at);
        next.extend(on.get(at).into_iter().flatten().rev());
    }
    let mut reached = vec![false; mounts.len()];
    for at in &order {
        if let Some(reached) = reached.get_mut(*at) {
            *reached = true;
        }
    }
    match mounts.iter().zip(reached).find(|(_, reached)| !reached) {
        // A circle of mounts that are on one another.
        Some((lost, _)) => Err(Error::image("it is not on the root").during(lost.name())),
        None => Ok(order),
    }
}

/// Both are of one file system.
pub(super) fn same_file_system(a: &Mount, b: &Mount) -> bool {
    a.dev == b.dev
}

fn sources(mounts: &[Mount], root: usize) -> Result<Vec<Source>> {
    let direct = |(at, mount): (usize, &Mount)| match mount.outside {
        _ if at == root => Some(Source::Root),
        Some(Outside::Named(_) | Outside::Automatic) => Some(Source::Outside),
        Some(Outside::Device) => Some(Source::New),
        None => None,
    };
    let mut sources: Vec<Option<Source>> = mounts.iter().enumerate().map(direct).collect();
    // A base that is a part of the file system, then whole ones.
    for pass in 0..2 {
        for (at, mount) in mounts.iter().enumerate() {
            if sources.get(at).copied().flatten().is_some() {
                continue;
            }
            let found = source(mounts, &sources, at, mount, pass)?;
            if let Some(place) = sources.get_mut(at) {
                *place = found;
            }
        }
    }
    let all = sources.into_iter().zip(mounts).map(|(source, mount)| source.ok_or_else(|| unmade(mount)));
    all.collect()
}

/// One that is made before, and has the root of `mount`.
fn source(
    mounts: &[Mount],
    sources: &[Option<Source>],
    at: usize,
    mount: &Mount,
    pass: usize,
) -> Result<Option<Source>> {
    let Some(root) = mount.root.as_deref() else { return Ok(None) };
    let made = |(base, source): (usize, &Option<Source>)| {
        let of = mounts.get(base)?;
        let made = matches!(source, Some(Source::Root | Source::Outside | Source::New));
        let covers = of.root.as_deref().is_some_and(|base| below(root, base).is_some());
        (base != at && made && same_file_system(of, mount) && covers && !of.deleted).then_some(base)
    };
    let bases = || sources.iter().enumerate().filter_map(made);
    let single = mount.kind.is_some_and(|kind| kind.single);
    let same_source = |base: &usize| mounts.get(*base).is_some_and(|of| of.source == mount.source);
    let outside = |base: &usize| sources.get(*base).copied().flatten() != Some(Source::New);
    // One of its own shows the same, and keeps what its source was called.
    let base = match mount.is_whole() && single {
        true => bases().find(|base| outside(base) || same_source(base)),
        false => bases().find(outside).or_else(|| bases().next()),
    };
    if let Some(base) = base {
        return Ok(Some(Source::Of(base)));
    }
    if pass == 0 && !mount.is_whole() {
        return Ok(None);
    }
    match (mount.is_whole(), mount.kind) {
        (true, _) if mount.by_name => Ok(Some(Source::New)),
        (true, Some(kind)) => match kind.again {
            Again::Never(why) => Err(refused(
                mount,
                &format!("a file system of type {} cannot be mounted again: {why}", kind.name),
            )),
            _ => Ok(Some(Source::New)),
        },
        _ => Ok(None),
    }
}

fn unmade(mount: &Mount) -> Error {
    let root = shown(mount.root.as_deref().unwrap_or_default());
    if mount.is_whole() {
        let kind = shown(mount.type_name());
        let what = match kind.is_empty() {
            true => "its type is not known, so it cannot be mounted again".to_owned(),
            false => format!("a file system of type {kind} cannot be mounted again"),
        };
        return refused(mount, &what);
    }
    refused(mount, &format!("it shows {root} of a file system that the tree has no larger mount of"))
}

/// The flag that would make a mount work.
fn refused(mount: &Mount, why: &str) -> Error {
    let point = shown(&mount.point);
    Error::unsupported(why)
        .remedy(format!("dump with --external mnt[{point}]:NAME, restore with --external mnt[NAME]:PATH"))
        .during(mount.name())
}

impl Tree {
    /// Names the mount at a position in errors.
    pub(super) fn context<T>(&self, at: usize, result: Result<T>) -> Result<T> {
        result.during(|| self.mounts.get(at).map(Mount::name).unwrap_or_default())
    }
}
