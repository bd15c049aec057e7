//! Groups at a restore: folders are there before the first fork, tasks enter their set at birth.

use std::{
    collections::HashMap,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
};

use nix::{
    errno::Errno,
    fcntl::AtFlags,
    sys::stat::{FchmodatFlags, Mode, fchmodat, fstatat, mkdirat},
    unistd::{Gid, Uid, fchownat},
};
use rcriu_images::{ImageDir, ImageKind, pb};

use self::undo::Undo;
use super::{
    attributes, roots,
    values::{self, When},
    yard,
};
use crate::{
    error::{Context, Error, Result, SysContext},
    ns,
    options::{CgroupOptions, ManageCgroups},
    procfs::ProcDir,
    pstree::RealPid,
};

/// One group of a set.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    hierarchy: usize,
    /// From the hierarchy's root, without a slash in front; `.` is the root.
    path: Vec<u8>,
}

#[derive(Debug)]
struct Hierarchy {
    /// As in `/proc/PID/cgroup`.
    controllers: String,
    root: OwnedFd,
    threaded: bool,
}

/// The groups of the tasks being restored. Dropped before [`Groups::freeze`] they are as they were before.
#[derive(Debug, Default)]
pub struct Groups {
    hierarchies: Vec<Hierarchy>,
    /// With the engine's own, in which tasks are born.
    sets: HashMap<u32, Vec<Place>>,
    /// Of each set, the groups at which a cgroup namespace of the tree's own begins.
    tops: HashMap<u32, Vec<Place>>,
    late: Vec<(Place, pb::CgroupPropEntry)>,
    frozen: Vec<(Place, pb::CgroupPropEntry)>,
    undo: Vec<Undo>,
    moved: Vec<roots::Moved>,
}

impl Groups {
    /// Reads cgroup.img and makes the folders that it asks for, as far as `opts.manage` allows. `own` is the
    /// number of the dumping process's set: whoever was in it stays where this process is.
    ///
    /// # Errors
    /// Groups that are missing and must not be made, or are there and must not be; named, with a remedy.
    pub fn prepare(images: &ImageDir, own: u32, opts: &CgroupOptions) -> Result<Groups> {
        let mut groups = Groups::default();
        if opts.manage == ManageCgroups::Ignore {
            return Ok(groups);
        }
        let entries: Vec<pb::CgroupEntry> = images.read_all(ImageKind::Cgroup, 0)?;
        let Some(mut entry) = entries.into_iter().next() else { return Ok(groups) };
        if entry.sets.is_empty() {
            return Ok(groups);
        }
        groups.moved = roots::replace(&mut entry, opts)?;
        let me = ProcDir::own()?;
        let me = crate::procfs::cgroup::read(&me)?;
        for controller in &entry.controllers {
            let controllers = controller.cnames.join(",");
            let root = yard::hierarchy(&controllers, opts.yard.as_deref())?;
            let threaded = controller.is_threaded.unwrap_or(false);
            groups.hierarchies.push(Hierarchy { controllers, root, threaded });
        }
        for set in &entry.sets {
            let place = |m: &pb::CgMemberEntry| groups.place(&String::from_utf8_lossy(&m.name), &m.path);
            let places = set.ctls.iter().map(place).collect::<Result<_>>()?;
            groups.sets.insert(set.id, places);
            let top = |m: &pb::CgMemberEntry| {
                let (hidden, _) = ns::cgroup::split(&m.path, m.cgns_prefix.unwrap_or(0))?;
                groups.place(&String::from_utf8_lossy(&m.name), hidden)
            };
            let tops = set.ctls.iter().map(top).collect::<Result<_>>()?;
            groups.tops.insert(set.id, tops);
        }
        let here = me.iter().filter_map(|m| groups.place(&m.controllers, &m.path).ok()).collect();
        groups.sets.insert(own, here);
        for (at, controller) in entry.controllers.into_iter().enumerate() {
            let name = yard::folder(&groups.hierarchies[at].controllers);
            for folder in controller.dirs {
                groups
                    .folder(at, b"", folder, opts.manage, 0)
                    .during(|| format!("cgroup controllers '{name}'"))?;
            }
        }
        Ok(groups)
    }

    fn place(&self, controllers: &str, path: &[u8]) -> Result<Place> {
        let names = |s: &str| {
            let mut names: Vec<String> = s.split(',').map(str::to_owned).collect();
            names.sort_unstable();
            names
        };
        let wanted = names(controllers);
        let hierarchy =
            self.hierarchies.iter().position(|h| names(&h.controllers) == wanted).ok_or_else(|| {
                Error::image(format!("cgroup.img: no controller entry for '{controllers}'"))
            })?;
        Ok(Place { hierarchy, path: clean(path)? })
    }

    /// Makes sure of one folder and those below it.
    fn folder(
        &mut self,
        hierarchy: usize,
        parent: &[u8],
        mut entry: pb::CgroupDirEntry,
        mode: ManageCgroups,
        depth: usize,
    ) -> Result<()> {
        if depth > 256 {
            return Err(Error::image("cgroup.img: folders too deep"));
        }
        let path = clean(&[parent, b"/", &entry.dir_name].concat())?;
        let place = Place { hierarchy, path };
        // The root belongs to the host.
        if place.path != b"." {
            self.group(&place, &mut entry, mode).during(|| format!("group /{}", show(&place)))?;
        }
        let parent = if place.path == b"." { Vec::new() } else { place.path };
        entry
            .children
            .into_iter()
            .try_for_each(|child| self.folder(hierarchy, &parent, child, mode, depth + 1))
    }

    fn group(&mut self, place: &Place, entry: &mut pb::CgroupDirEntry, mode: ManageCgroups) -> Result<()> {
        let there = fstatat(self.root(place), path(place), AtFlags::empty());
        match (there, mode) {
            (Ok(_), ManageCgroups::Strict) => {
                return Err(
                    Error::host("it exists already").remedy("--manage-cgroups=soft takes it as it is")
                );
            }
            (Err(Errno::ENOENT), ManageCgroups::None | ManageCgroups::Props) => {
                return Err(Error::host("it does not exist").remedy("--manage-cgroups=soft makes it"));
            }
            (Err(Errno::ENOENT), _) => {
                self.make(place)?;
                if let Some(perms) = &entry.dir_perms {
                    self.set_perms(place, perms)?;
                }
                attributes::set(self.root(place), &place.path, &entry.attribute)?;
                let (early, rest) =
                    entry.properties.drain(..).partition(|p| values::when(&p.name) == When::Empty);
                entry.properties = rest;
                for property in early {
                    values::set(&self.hierarchies[place.hierarchy].root, &place.path, &property)?;
                }
            }
            (Err(e), _) => return Err(Error::sys("newfstatat", e as i32)),
            (Ok(stat), ManageCgroups::Soft | ManageCgroups::Props | ManageCgroups::Full) => {
                if mode == ManageCgroups::Soft {
                    entry.properties.clear();
                }
                entry.properties.retain(|p| values::when(&p.name) != When::Empty);
                if let Some(perms) = &entry.dir_perms {
                    let old = pb::CgroupPerms { mode: stat.st_mode, uid: stat.st_uid, gid: stat.st_gid };
                    self.undo.push(Undo::Perms(place.clone(), old));
                    self.set_perms(place, perms)?;
                }
            }
            (Ok(_), ManageCgroups::None | ManageCgroups::Ignore) => entry.properties.clear(),
        }
        for property in entry.properties.drain(..) {
            let list = match values::when(&property.name) {
                When::Resumed => &mut self.frozen,
                _ => &mut self.late,
            };
            list.push((place.clone(), property));
        }
        Ok(())
    }

    /// Makes a folder and those above it that are missing.
    fn make(&mut self, place: &Place) -> Result<()> {
        let ends = place.path.iter().enumerate().filter(|(_, c)| **c == b'/').map(|(at, _)| at);
        let ends: Vec<usize> = ends.chain([place.path.len()]).collect();
        for end in ends {
            let part = Place { hierarchy: place.hierarchy, path: place.path[..end].to_vec() };
            match mkdirat(self.root(&part), path(&part), Mode::from_bits_truncate(0o755)) {
                Ok(()) => {
                    log::info!("Created cgroup dir {}", show(&part));
                    self.undo.push(Undo::Made(part));
                }
                Err(Errno::EEXIST) => {}
                Err(e) => return Err(Error::sys("mkdirat", e as i32)),
            }
        }
        Ok(())
    }

    fn set_perms(&self, place: &Place, perms: &pb::CgroupPerms) -> Result<()> {
        let (uid, gid) = (Uid::from_raw(perms.uid), Gid::from_raw(perms.gid));
        fchownat(self.root(place), path(place), Some(uid), Some(gid), AtFlags::empty()).call("fchownat")?;
        let mode = Mode::from_bits_truncate(perms.mode);
        fchmodat(self.root(place), path(place), mode, FchmodatFlags::FollowSymlink).call("fchmodat")
    }

    fn root(&self, place: &Place) -> BorrowedFd<'_> {
        self.hierarchies[place.hierarchy].root.as_fd()
    }

    /// Moves the calling process from the set it was born in into `set`. To be called in the task, before it
    /// takes memory or forks.
    ///
    /// # Errors
    /// A set that is not in the image; a group that does not take it.
    pub fn enter(&self, born: u32, set: u32) -> Result<()> {
        self.put(RealPid(0), born, set)
    }

    /// The same for process `who`, by one that has the right; 0 is the caller.
    pub fn put(&self, who: RealPid, born: u32, set: u32) -> Result<()> {
        if self.sets.is_empty() || born == set {
            return Ok(());
        }
        self.put_from(who, self.set(born)?, set)
    }

    /// The same for one that is where [`Groups::put_at_top`] has put it.
    pub fn put_from_top(&self, who: RealPid, set: u32) -> Result<()> {
        match self.tops.get(&set) {
            Some(tops) => self.put_from(who, tops, set),
            None => Ok(()),
        }
    }

    fn put_from(&self, who: RealPid, from: &[Place], set: u32) -> Result<()> {
        log::info!("Move into {set}");
        let who = who.to_string();
        for place in self.set(set)?.iter().filter(|p| !from.contains(p)) {
            self.write(place, "cgroup.procs", who.as_bytes())?;
        }
        Ok(())
    }

    /// Moves process `who` to where a cgroup namespace begins that `set` is in, from where it makes one; 0 is the caller.
    ///
    /// # Errors
    /// As [`Groups::enter`].
    pub fn put_at_top(&self, who: RealPid, set: u32) -> Result<()> {
        let who = who.to_string();
        let tops = self.tops.get(&set).into_iter().flatten();
        tops.into_iter().try_for_each(|place| self.write(place, "cgroup.procs", who.as_bytes()))
    }

    /// Moves a thread into `set`, in hierarchies where threads of a process may differ.
    ///
    /// # Errors
    /// As [`Groups::enter`].
    pub fn enter_thread(&self, tid: RealPid, leader: u32, set: u32) -> Result<()> {
        if self.sets.is_empty() || leader == set {
            return Ok(());
        }
        let from = self.set(leader)?;
        for place in self.set(set)?.iter().filter(|p| !from.contains(p)) {
            let hierarchy = &self.hierarchies[place.hierarchy];
            if hierarchy.threaded {
                let list = if hierarchy.controllers.is_empty() { "cgroup.threads" } else { "tasks" };
                self.write(place, list, tid.0.to_string().as_bytes())?;
            }
        }
        Ok(())
    }

    fn set(&self, set: u32) -> Result<&Vec<Place>> {
        self.sets.get(&set).ok_or_else(|| Error::image(format!("cgroup.img has no set {set}")))
    }

    fn write(&self, place: &Place, list: &str, who: &[u8]) -> Result<()> {
        values::write_to(self.root(place), &values::below(&place.path, list), who).during(|| {
            let controllers = yard::folder(&self.hierarchies[place.hierarchy].controllers);
            format!("entering group /{} of cgroup controllers '{controllers}'", show(place))
        })
    }

    /// Sets the properties that wait until everybody is in.
    pub fn settle(&mut self) -> Result<()> {
        let late = std::mem::take(&mut self.late);
        self.set_values(late)
    }

    /// Freezes the groups that were frozen; nothing is taken back any more. Everybody must have been let go.
    pub fn freeze(&mut self) {
        let frozen = std::mem::take(&mut self.frozen);
        if let Err(e) = self.set_values(frozen) {
            log::error!("A control group was not frozen again: {e}");
        }
        self.undo.clear();
    }

    fn set_values(&mut self, list: Vec<(Place, pb::CgroupPropEntry)>) -> Result<()> {
        for (place, property) in list {
            let root = &self.hierarchies[place.hierarchy].root;
            let name = || format!("group /{}", show(&place));
            if let Some(old) = values::get(root, &place.path, &property.name).during(name)? {
                self.undo.push(Undo::Value(place.clone(), old));
            }
            values::set(root, &place.path, &property).during(name)?;
        }
        Ok(())
    }
}

/// `/a//b/` as `a/b`; nothing as `.`.
fn clean(path: &[u8]) -> Result<Vec<u8>> {
    let parts: Vec<&[u8]> = path.split(|c| *c == b'/').filter(|p| !p.is_empty()).collect();
    if parts.iter().any(|p| *p == b".." || *p == b"." || p.contains(&0)) {
        let path = String::from_utf8_lossy(path).into_owned();
        return Err(Error::image(format!("cgroup.img: {path:?} is no path of a group")));
    }
    Ok(if parts.is_empty() { b".".to_vec() } else { parts.join(&b'/') })
}

fn path(place: &Place) -> &std::ffi::OsStr {
    std::ffi::OsStr::from_bytes(&place.path)
}

fn show(place: &Place) -> String {
    String::from_utf8_lossy(&place.path).escape_debug().to_string()
}

/// The set that a task or thread was in; `None` if its images do not say.
pub fn set_of(core: &pb::CoreEntry) -> Option<u32> {
    let thread = core.thread_core.as_ref().and_then(|t| t.cg_set);
    let task = core.tc.as_ref().and_then(|t| t.cg_set);
    thread.or(task).filter(|set| *set != 0)
}

mod programs;
#[cfg(test)]
mod tests;
mod undo;
