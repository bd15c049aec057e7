//! Namespaces of its own that a restored tree gets: read and checked before anything is made, then filled by the root
//! task before it becomes what it was.
//!
//! ```text
//! engine                                root task
//! fork with CLONE_NEW*  --------------> waits
//! maps of ids           -- go --------> makes the others of kinds of which there are several
//! what connects their
//! networks with ours    <-- made, go -> host name, ipc, network
//!                                       builder: a child that makes the mounts and ends
//!                                       files without a name, terminals, connections
//! takes them over       <-- made ------ goes on: memory, children
//! ```
//!
//! Engine and tasks stay in the engine's mount namespace, with its /proc, until each task enters the restored one as its
//! last step; until then paths are found below the root folders that the builder hands over ([`Roots`]).

use std::{
    cell::OnceCell,
    os::fd::{AsFd, OwnedFd},
};

use nix::{
    fcntl::OFlag,
    sched::{CloneFlags, setns, unshare},
};
use rcriu_images::{ImageDir, pb};

pub use super::kinds::Kinds;
use super::{
    TaskCx,
    apart::Several,
    builder::{self, Built},
    entered::{Entered, Opened},
    mapped, networks,
    passing::Channel,
    stages::Area,
};
use crate::{
    error::{Context, Error, Result, SysContext},
    files::{FilesPlan, FilesShared, OpenMasters, Revived, Root, Roots, Space, Spaces, spaces},
    ns::{home, ipc, mnt, net, user, uts},
    options::RestoreOptions,
    procfs::ProcDir,
    pstree::{FileId, RealPid},
};

/// What the root tells the engine.
const MADE: u8 = 0;
const ROOT: u8 = 1;
const CONNECTION: u8 = 2;
const REUSING: u8 = 3;
const MASTER: u8 = 4;
/// And the position of the kind among [`spaces::KINDS`].
const SPACE: u8 = 5;

/// Namespaces that a tree gets for itself.
#[derive(Debug, Default)]
pub struct Home {
    kinds: Kinds,
    uts: Several<uts::Uts>,
    pub(super) ipc: Several<ipc::Ipc>,
    net: Several<()>,
    nets: Option<net::Nets>,
    pub(super) user: Option<user::UserNs>,
    mnt: Option<mnt::Tree>,
    entered: Entered,
    /// Whether the tree had any when it was dumped.
    had: bool,
}

impl Home {
    /// Reads and checks the images of all namespaces of a tree whose root has `ids` and whose tasks are in all of `spaces`
    /// of a kind; of those that are `entered` there are none to be read.
    ///
    /// # Errors
    /// What cannot be made again; images that are missing or contradict each other.
    pub fn read(
        images: &ImageDir,
        (ids, spaces): (&pb::TaskKobjIdsEntry, &dyn Fn(CloneFlags) -> Vec<u32>),
        (kinds, entered): (Kinds, Entered),
        opts: &RestoreOptions,
    ) -> Result<Home> {
        let had = !kinds.is_empty();
        let kinds = kinds.without(entered.kinds());
        if entered.has(CloneFlags::CLONE_NEWUSER) && !kinds.is_empty() {
            return Err(Error::unsupported(
                "namespaces that are made for the tree would not belong to the user namespace it joins",
            )
            .remedy("restore without --join-ns user, or join those of all other kinds as well"));
        }
        // Others may be made beside the one that stayed outside.
        let net = CloneFlags::CLONE_NEWNET;
        let beside = entered.is_external(net) && spaces(net).len() > 1;
        for (flag, name, what) in home::KINDS.iter().filter(|(flag, ..)| home::SEVERAL.contains(*flag)) {
            if entered.has(*flag) && spaces(*flag).len() > 1 && !(beside && *flag == net) {
                return Err(Error::unsupported(format!(
                    "tasks that were in several {what} namespaces cannot all be in the one that is joined"
                ))
                .remedy(format!("restore without --join-ns {name}")));
            }
        }
        let wanted = |flag, id: Option<u32>| id.filter(|_| kinds.has(flag));
        let several = |kind| match kinds.has(kind) || beside && kind == net {
            true => spaces(kind),
            false => Vec::new(),
        };
        Ok(Home {
            kinds,
            uts: Several::read(several(CloneFlags::CLONE_NEWUTS), |id| uts::read(images, id))?,
            ipc: Several::read(several(CloneFlags::CLONE_NEWIPC), |id| ipc::read(images, id))?,
            nets: networks::read(images, &several(net), kinds, opts)?,
            net: Several::read(several(net), |_| Ok(()))?,
            user: wanted(CloneFlags::CLONE_NEWUSER, ids.user_ns_id)
                .map(|id| user::read(images, id))
                .transpose()?,
            mnt: wanted(CloneFlags::CLONE_NEWNS, ids.mnt_ns_id)
                .map(|_| mnt::read(images, &spaces(CloneFlags::CLONE_NEWNS), opts))
                .transpose()?,
            entered,
            had,
        })
    }

    /// How many descriptors tasks inherit of namespaces that are made for the tree.
    pub fn descriptors(&self) -> usize {
        let mounts = self.mnt.as_ref().map_or(0, |tree| 3 * tree.ids().count());
        mounts + self.uts.descriptors() + self.ipc.descriptors() + self.net.descriptors()
    }

    /// Numbers of its network namespaces in images, the root task's first; none if none is made.
    pub fn networks(&self) -> Vec<u32> {
        self.nets.iter().flat_map(net::Nets::ids).collect()
    }

    /// Kinds that are made for the tree.
    pub fn kinds(&self) -> Kinds {
        self.kinds
    }

    /// Those that it enters.
    pub fn entered(&self) -> &Entered {
        &self.entered
    }

    /// Whether the tree is in another namespace of this kind than we are.
    pub fn is_away(&self, kind: CloneFlags) -> bool {
        self.kinds.has(kind) || self.entered.has(kind)
    }

    /// Whether the tree shares all namespaces with us.
    pub fn is_ours(&self) -> bool {
        self.kinds.is_empty() && self.entered.is_empty()
    }

    /// Whether those who are told of stages hear of namespaces: not where options put a tree into others that had none
    /// of its own.
    pub fn is_told(&self) -> bool {
        self.had
    }

    /// Opens what comes from outside, in the engine, before the root is forked.
    pub fn prepare(&self, opts: &RestoreOptions, files: &FilesShared) -> Result<Prepared> {
        let outside = self.mnt.as_ref().map(|tree| tree.prepare(opts)).transpose()?;
        let (engine, root) = Channel::pair()?;
        let keep = |fd| files.keep(fd);
        let (engine, root) = (engine.moved(keep)?, root.moved(keep)?);
        let entered = self.entered.open(opts, files)?;
        Ok(Prepared { outside, engine, root, entries: OnceCell::new(), entered })
    }

    /// What clone(2) is told for the root: all but mounts, which its builder makes, and control groups, which come when
    /// it is in its own.
    pub fn clone_flags(&self) -> u64 {
        let later = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP;
        (self.kinds.0 & !later).bits().cast_unsigned().into()
    }

    /// The root task fills its namespaces. On return files can be opened.
    pub fn settle(&self, cx: &TaskCx<'_>, prepared: &Prepared) -> Result<()> {
        let folder = prepared.root.await_engine(cx.area)?;
        folder.map_or(Ok(()), |folder| mapped::take(&folder, &cx.snapshot.dir))?;
        prepared.entered.enter()?;
        if self.user.is_some() {
            user::UserNs::become_root()?;
            // The engine has put it where that begins, and moves it on.
            if self.kinds.has(CloneFlags::CLONE_NEWCGROUP) {
                unshare(CloneFlags::CLONE_NEWCGROUP).call("unshare(CLONE_NEWCGROUP)")?;
            }
        }
        self.fill(cx, prepared)?;
        let (roots, masters) = match &self.mnt {
            Some(tree) => self.mounts(tree, cx, prepared).during(|| "mount namespace".into())?,
            None => match prepared.entered.root(|fd| cx.files.keep(fd))? {
                Some(root) => {
                    prepared.root.send(ROOT, 0, Some(root.folder()?.as_fd()))?;
                    (Roots::of(root), OpenMasters::new())
                }
                None => Default::default(),
            },
        };
        cx.files.make(&cx.plan.files, &cx.snapshot.dir, cx.opts, roots, masters)?;
        for master in cx.files.take_orphans()? {
            prepared.root.send(MASTER, 0, Some(master.as_fd()))?;
        }
        cx.files.each_revived(|id, revived| {
            let kind = if revived.reuses_address() { REUSING } else { CONNECTION };
            prepared.root.send(kind, id.0, Some(revived.socket()))
        })?;
        prepared.root.send(MADE, 0, None)
    }

    /// The name of a network namespace that comes from outside.
    fn external(&self, id: u32) -> Option<&str> {
        self.nets.as_ref()?.external(id)
    }

    /// Whether there are several namespaces of a kind.
    fn is_several(&self) -> bool {
        self.uts.descriptors() + self.ipc.descriptors() + self.net.descriptors() > 0
    }

    /// Makes all namespaces of which there are several, and fills them.
    fn fill(&self, cx: &TaskCx<'_>, prepared: &Prepared) -> Result<()> {
        let (uts, ipc, net) = (CloneFlags::CLONE_NEWUTS, CloneFlags::CLONE_NEWIPC, CloneFlags::CLONE_NEWNET);
        let mut made = Vec::new();
        let none = |_| Ok(None);
        self.uts.make(uts, cx.files, &mut made, none)?;
        self.ipc.make(ipc, cx.files, &mut made, none)?;
        self.net.make(net, cx.files, &mut made, |id| match self.external(id) {
            Some(name) => cx.files.given(cx.opts, name),
            None => Ok(None),
        })?;
        for Space { kind, id, file } in &made {
            let at = spaces::KINDS.iter().position(|(known, ..)| known == kind).unwrap_or_default();
            prepared.root.send(SPACE + at as u8, *id, Some(file.as_fd()))?;
        }
        if self.is_several() {
            prepared.root.send(MADE, 0, None)?;
            drop(prepared.root.await_engine(cx.area)?);
        }
        self.uts.fill(uts, &made, |uts| uts.restore().during(|| "uts namespace".into()))?;
        let (images, users) = (&cx.snapshot.dir, self.user.is_some());
        self.ipc.fill(ipc, &made, |ipc| ipc.restore(images, users).map_err(user::unreadable))?;
        if let Some(nets) = &self.nets {
            net::restore(nets, &networks::files(&made)).during(|| "network namespace".into())?;
        }
        cx.files.set_spaces(Spaces::new(made))
    }

    /// Has the mounts made. With masters of terminals that are mounted on files.
    fn mounts(&self, tree: &mnt::Tree, cx: &TaskCx<'_>, prepared: &Prepared) -> Result<(Roots, OpenMasters)> {
        let outside = prepared.outside.as_ref().ok_or_else(|| Error::bug("no mounts are prepared"))?;
        // In a user namespace of its own, the root is in its cgroup namespace already.
        let groups = self.kinds.has(CloneFlags::CLONE_NEWCGROUP) && self.user.is_none();
        let Built { spaces, masters } = builder::run(tree, outside, cx, groups)?;
        let (mut list, mut entries) = (Vec::new(), Vec::new());
        for (number, (id, space)) in (0..).zip(tree.ids().zip(spaces)) {
            let namespace = cx.files.keep(space.entry.try_clone().call("dup")?)?;
            entries.push((id, cx.files.keep(space.entry)?));
            let root = cx.files.keep(space.root)?;
            prepared.root.send(ROOT, number, Some(root.as_fd()))?;
            list.push((id, Root::of_namespace(root, &space.mountinfo, Some(namespace))?));
        }
        prepared.entries.set(entries).map_err(|_| Error::bug("mounts are made twice"))?;
        Ok((Roots::new(list, tree.places()), masters))
    }
}

/// What is ready before the root is forked.
#[derive(Debug)]
pub struct Prepared {
    outside: Option<mnt::Prepared>,
    engine: Channel,
    root: Channel,
    /// The restored mount namespaces by their numbers in images, in tasks.
    entries: OnceCell<Vec<(u32, OwnedFd)>>,
    /// Namespaces that are entered.
    entered: Opened,
}

impl Prepared {
    /// Namespaces that are entered.
    pub fn entered(&self) -> &Opened {
        &self.entered
    }

    /// Enters the restored mount namespace of a task that images say is in `id`, at its root; does nothing if there is
    /// none.
    ///
    /// # Errors
    /// EINVAL if the folders are shared with another task.
    pub fn enter_mounts(&self, id: Option<u32>) -> Result<()> {
        let entry = match self.entries.get() {
            Some(made) => {
                let own = made.iter().find(|(known, _)| Some(*known) == id);
                Some(own.ok_or_else(|| Error::bug("a mount namespace that is not made"))?.1.as_fd())
            }
            None => self.entered.get(CloneFlags::CLONE_NEWNS),
        };
        entry.map_or(Ok(()), |entry| setns(entry, CloneFlags::CLONE_NEWNS).call("setns(CLONE_NEWNS)"))
    }

    /// In the engine, when the root task `root` is forked: gives it what only we can give, and lets it fill its
    /// namespaces, which others may look at `empty` before. All networks but the first are to be locked by `lock`, which is
    /// told whether they come from outside.
    pub fn let_go(
        &self,
        home: &Home,
        (root, images): (RealPid, &ImageDir),
        empty: impl FnOnce() -> Result<()>,
        (files, area, watch): (&FilesShared, &Area, &dyn Fn() -> Result<()>),
        lock: impl FnMut(OwnedFd, bool) -> Result<()>,
    ) -> Result<Option<net::Undo>> {
        let mut folder = None;
        if let Some(user) = &home.user {
            user.write_maps(root)?;
            folder = mapped::for_users_of(root, images);
        }
        empty()?;
        let mut made = Vec::new();
        if home.is_several() {
            self.engine.send(MADE, 0, folder.as_ref().map(AsFd::as_fd))?;
            folder = None;
            loop {
                match self.engine.next(area, watch)? {
                    (MADE, ..) => break,
                    (kind, id, Some(fd)) => {
                        let kind = space(kind).ok_or_else(|| Error::bug("a message of no kind"))?;
                        made.push(Space { kind, id, file: files.keep(fd)? });
                    }
                    _ => return Err(Error::bug("a message of no kind")),
                }
            }
        }
        let nets = home.nets.as_ref();
        let outside = nets.map(|nets| networks::connect(nets, root, &made, lock)).transpose()?;
        files.set_spaces(Spaces::new(made))?;
        home.limits(root, files, images)?;
        self.engine.send(MADE, 0, folder.as_ref().map(AsFd::as_fd))?;
        Ok(outside)
    }

    /// In the engine: waits until the root has filled them, and takes over what the engine needs of it.
    pub fn await_root(
        &self,
        home: &Home,
        (files, plan): (&FilesShared, &FilesPlan),
        area: &Area,
        watch: impl Fn() -> Result<()>,
    ) -> Result<()> {
        let (mut roots, mut revived, mut orphans) = (Vec::new(), Vec::new(), Vec::new());
        loop {
            match self.engine.next(area, &watch)? {
                (MADE, ..) => break,
                (ROOT, _, Some(fd)) => roots.push(Root::of(files.keep(fd)?, b"")?),
                (kind @ (CONNECTION | REUSING), id, Some(fd)) => {
                    revived.push((FileId(id), Revived::new(fd, kind == REUSING)));
                }
                (MASTER, _, Some(fd)) => orphans.push(fd),
                _ => return Err(Error::bug("a message of no kind")),
            }
        }
        let roots = match &home.mnt {
            Some(tree) => Roots::new(tree.ids().zip(roots).collect(), tree.places()),
            None => roots.pop().map_or_else(Roots::default, Roots::of),
        };
        files.made_elsewhere(plan, roots, revived, orphans)
    }
}

/// The kind of a message about a namespace.
fn space(message: u8) -> Option<CloneFlags> {
    spaces::KINDS.get(usize::from(message.wrapping_sub(SPACE))).map(|(kind, ..)| *kind)
}

/// The network namespace of a task.
pub(super) fn network_of(root: RealPid) -> Result<OwnedFd> {
    ProcDir::open(root)?.file("ns/net", OFlag::O_RDONLY)
}
