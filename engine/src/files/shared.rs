//! What exists before the first fork so that tasks can restore their files.

use std::{
    cell::{OnceCell, RefCell},
    collections::{BTreeMap, HashMap},
    os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd},
};

use nix::sched::CloneFlags;
use rcriu_images::ImageDir;

use super::{
    Lost, Revived, Roots, Source, Spaces,
    fdpass::{self, FdPass},
    ghost, memfd, pidfd,
    plan::{FilesPlan, Zone},
    tty::{self, OpenMasters, Terminals},
};
use crate::{
    error::{Context, Error, Result, SysContext},
    kernel::Kernel,
    ns::enter::here,
    options::{CgroupOptions, RestoreOptions},
    pstree::FileId,
    sys::{fd, shared::SharedWords},
    task::cgroup::Groups,
};

/// Descriptors that the engine and the restorer need for themselves.
const ENGINE_ROOM: RawFd = 64;

/// Words of a table: how many of its sharers are waiting, and whether it is done.
pub(super) const ARRIVED: usize = 0;
pub(super) const DONE: usize = 1;
pub(super) const WORDS: usize = 2;

/// What exists before the first fork so that tasks can restore files; kept by the engine to the end.
#[derive(Debug)]
pub struct FilesShared {
    pub(super) zone: Zone,
    pub(super) pass: FdPass,
    pub(super) tables: SharedWords,
    /// Descriptors given from outside, in the order of the options.
    pub(super) inherited: Vec<OwnedFd>,
    /// Files from outside.
    pub(super) given: HashMap<FileId, OwnedFd>,
    pub(super) memfds: memfd::Made,
    spaces: OnceCell<Spaces>,
    made: OnceCell<Made>,
}

/// What is made where the tree lives: by the engine, or if the tree has namespaces of its own by the root task before it
/// forks.
#[derive(Debug)]
pub(super) struct Made {
    /// Where paths of tasks begin.
    pub(super) roots: Roots,
    /// Inodes without a name.
    pub(super) handles: HashMap<FileId, OwnedFd>,
    /// Names that were made for this restore by the dump, with the mounts they are on.
    links: Vec<(Option<i32>, Vec<u8>)>,
    pub(super) terminals: Terminals,
    /// TCP connections, which the engine lets go in the end.
    pub(super) revived: RefCell<HashMap<FileId, Revived>>,
    /// Masters of terminals for somebody outside of the tree.
    orphans: RefCell<Vec<OwnedFd>>,
}

impl FilesShared {
    /// Numbers in which everything must lie that tasks inherit and need: the engine moves its own descriptors
    /// there before it forks. `limit` is RLIMIT_NOFILE, already raised; `namespaces` are those of namespaces that are
    /// made for the tree.
    ///
    /// # Errors
    /// More descriptors than `limit` allows.
    pub fn zone(
        plan: &FilesPlan,
        limit: RawFd,
        namespaces: usize,
        opts: &RestoreOptions,
        kernel: &Kernel,
    ) -> Result<Zone> {
        let passing = if fdpass::by_socket(kernel) { plan.slots + 2 * plan.receivers().count() } else { 0 };
        let early = plan.memfds.len() + plan.dead_pidfds.values().map(Vec::len).sum::<usize>();
        let lost = plan.nodes.values().iter().filter(|node| node.file.lost().is_some()).count();
        let outside = opts.inherit_fds.len() + plan.ttys.descriptors();
        let given = plan.nodes.values().iter().filter(|node| node.file.is_given(opts)).count();
        let early = early + plan.connections().len() + given;
        // And the folder that a task opens files from, and /proc.
        let room = plan.most_kept() + passing + early + lost + outside + namespaces + 2;
        let room = i32::try_from(room).unwrap_or(i32::MAX);
        plan.zone(limit, room.saturating_add(ENGINE_ROOM))
    }

    /// Makes what needs no place of its own, in the engine, before the first fork. [`FilesShared::make`] follows.
    pub fn prepare(
        plan: &FilesPlan,
        zone: Zone,
        images: &ImageDir,
        opts: &RestoreOptions,
        kernel: &Kernel,
    ) -> Result<FilesShared> {
        let inherited = opts.inherit_fds.iter().map(|fd| {
            zone.keep(fd::duplicate(fd.fd)?).during(|| format!("--inherit-fd fd[{}]:{}", fd.fd, fd.key))
        });
        let inherited = inherited.collect::<Result<Vec<_>>>()?;
        let mut given = HashMap::new();
        for (id, node) in plan.nodes.iter().filter(|(_, node)| node.file.is_given(opts)) {
            let name = node.file.name();
            let made = find_inherited(opts, &inherited, &name).and_then(|outside| node.file.give(outside));
            given.insert(id, zone.keep(made.during(|| format!("file {id} {name}"))?)?);
        }
        Ok(FilesShared {
            given,
            zone,
            pass: FdPass::new(plan.slots, plan.receivers(), kernel, zone)?,
            tables: SharedWords::new(plan.tables.len() * WORDS)?,
            inherited,
            memfds: memfd::Made::new(&plan.memfds, images, zone)?,
            spaces: OnceCell::new(),
            made: OnceCell::new(),
        })
    }

    /// A file that the engine has made or opened.
    pub fn given_file(&self, id: FileId) -> Option<BorrowedFd<'_>> {
        self.given.get(&id).map(AsFd::as_fd)
    }

    /// Attaches programs to the control groups that their files tell of.
    pub fn attach(&self, plan: &FilesPlan, groups: &mut Groups, opts: &CgroupOptions) -> Result<()> {
        for (id, node) in plan.nodes.iter() {
            for group in node.file.groups() {
                let program =
                    self.given.get(&id).ok_or_else(|| Error::bug("a program that was not loaded"))?;
                groups.attach(program.as_fd(), group, opts).during(|| node.file.name())?;
            }
        }
        Ok(())
    }

    /// Makes the rest in the namespaces of the tree, before any task but the root is forked: files without a name are
    /// brought back, terminals and connections are made. Paths begin at `roots`; `masters` are those of terminals that had
    /// to be made before.
    pub fn make(
        &self,
        plan: &FilesPlan,
        images: &ImageDir,
        opts: &RestoreOptions,
        roots: Roots,
        masters: OpenMasters,
    ) -> Result<()> {
        let zone = self.zone;
        let mut lost: BTreeMap<Source<'_>, Vec<Lost<'_>>> = BTreeMap::new();
        for (source, file) in plan.nodes.values().iter().filter_map(|node| node.file.lost()) {
            lost.entry(source).or_default().push(file);
        }
        let (mut handles, mut links) = (HashMap::new(), Vec::new());
        for (source, files) in &lost {
            for (id, handle) in ghost::bring_back(images, source, files, &roots)? {
                handles.insert(id, zone.keep(handle)?);
            }
            if let Source::Link((mount, path)) = source {
                links.push((*mount, path.to_vec()));
            }
        }
        let outside = |name: &str| find_inherited(opts, &self.inherited, name);
        let (terminals, orphans) =
            tty::prepare(&plan.ttys, zone, opts, outside, &mut handles, (&roots, masters))?;
        for (id, handle) in pidfd::prepare(&plan.dead_pidfds)? {
            handles.insert(id, zone.keep(handle)?);
        }
        let mut revived = HashMap::new();
        for (id, node) in plan.nodes.iter() {
            let _making = plan.making(id)?;
            let revive = || node.file.revive(opts.common.tcp.close, images);
            // Connections of the namespace this is in need no other.
            let space = node.file.network().and_then(|id| self.spaces().get(CloneFlags::CLONE_NEWNET, id));
            let made = space.map_or_else(revive, |space| here(space, CloneFlags::CLONE_NEWNET, revive));
            if let Some(made) = made.during(|| format!("file {id} {}", node.file.name()))? {
                revived.insert(id, made.keep(zone)?);
            }
        }
        let (revived, orphans) = (RefCell::new(revived), RefCell::new(orphans));
        self.set(Made { roots, handles, links, terminals, revived, orphans })
    }

    /// Takes over from the root task what only the engine can do in the end: `roots` are where paths begin.
    pub fn made_elsewhere(
        &self,
        plan: &FilesPlan,
        roots: Roots,
        revived: Vec<(FileId, Revived)>,
        orphans: Vec<OwnedFd>,
    ) -> Result<()> {
        let links = plan.nodes.values().iter().filter_map(|node| match node.file.lost()?.0 {
            Source::Link((mount, path)) => Some((mount, path.to_vec())),
            Source::Ghost(_) => None,
        });
        let revived = revived.into_iter().map(|(id, made)| Ok((id, made.keep(self.zone)?)));
        self.set(Made {
            roots,
            handles: HashMap::new(),
            links: links.collect(),
            terminals: Terminals::default(),
            revived: RefCell::new(revived.collect::<Result<_>>()?),
            orphans: RefCell::new(orphans),
        })
    }

    fn set(&self, made: Made) -> Result<()> {
        self.made.set(made).map_err(|_| Error::bug("files are made twice"))
    }

    /// What [`FilesShared::make`] has made.
    pub(super) fn made(&self) -> Result<&Made> {
        self.made.get().ok_or_else(|| Error::bug("files are not made yet"))
    }

    /// Takes namespaces of which there are several: before anything is made in them.
    pub fn set_spaces(&self, spaces: Spaces) -> Result<()> {
        self.spaces.set(spaces).map_err(|_| Error::bug("namespaces are made twice"))
    }

    /// Namespaces of which there are several.
    pub fn spaces(&self) -> &Spaces {
        self.spaces.get_or_init(Spaces::default)
    }

    /// Where paths of tasks begin.
    pub fn roots(&self) -> Result<&Roots> {
        Ok(&self.made()?.roots)
    }

    /// Connections that were made, for [`FilesShared::made_elsewhere`].
    pub fn each_revived(&self, mut give: impl FnMut(FileId, &Revived) -> Result<()>) -> Result<()> {
        self.made()?.revived.borrow().iter().try_for_each(|(id, revived)| give(*id, revived))
    }

    /// Masters of terminals that belong to somebody outside, who must get them: here they are closed by the caller.
    pub fn take_orphans(&self) -> Result<Vec<OwnedFd>> {
        Ok(self.made()?.orphans.take())
    }

    /// A duplicate of what was given from outside for `name`.
    pub fn given(&self, opts: &RestoreOptions, name: &str) -> Result<Option<OwnedFd>> {
        find_inherited(opts, &self.inherited, name)
    }

    /// Moves a descriptor that tasks inherit to where none of theirs is.
    pub fn keep(&self, fd: OwnedFd) -> Result<OwnedFd> {
        self.zone.keep(fd)
    }

    /// Once all tasks have mapped their files: what must not be changed any more is sealed.
    pub fn mapped(&self) -> Result<()> {
        self.memfds.seal()
    }

    /// Connections go on: right before tasks do, when their packets flow again.
    ///
    /// # Errors
    /// None of a single connection: that it is lost is logged, since nothing can be undone any more.
    pub fn connect(&self) {
        let made = self.made.get().map(|made| made.revived.take());
        for (id, connection) in made.into_iter().flatten() {
            if let Err(e) = connection.resume() {
                log::error!("file {id}: the connection does not go on: {e}");
            }
        }
    }

    /// After a restore that succeeded: names that the dump made for it go.
    pub fn finished(&self) {
        let Some(made) = self.made.get() else { return };
        for (mount, path) in &made.links {
            if let Err(e) = nix::unistd::unlink(made.roots.of_mount(*mount).path(path).as_ref()) {
                log::warn!("unlink({}): {e}", path.escape_ascii());
            }
        }
    }

    /// Once all tasks are forked: the engine needs what they use among themselves no longer.
    pub fn forked(&self) -> Result<()> {
        self.pass.close()
    }
}

/// A duplicate of what `--inherit-fd` gives for `name`.
pub(super) fn find_inherited(
    opts: &RestoreOptions,
    inherited: &[OwnedFd],
    name: &str,
) -> Result<Option<OwnedFd>> {
    let at = opts.inherit_fds.iter().position(|fd| fd.is_for(name));
    at.and_then(|at| inherited.get(at)).map(|fd| fd.try_clone().call("dup")).transpose()
}
