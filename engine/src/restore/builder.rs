//! The builder: a child of the root task that makes the mounts of a restored tree and ends, so that the root itself stays
//! in the engine's mount namespace, with its /proc.

use std::{
    collections::BTreeMap,
    io::Read,
    os::fd::{AsFd, OwnedFd},
};

use nix::{
    fcntl::{OFlag, open},
    sched::{CloneFlags, unshare},
    sys::stat::Mode,
};
use rcriu_images::ImageDir;

use super::{TaskCx, fork, passing::Channel};
use crate::{
    error::{Error, Result, SysContext},
    files::OpenMasters,
    ns::{self, mnt},
    procfs::ProcDir,
    pstree::RealPid,
    sys::{clone3::Side, fork::fork},
    task::cgroup,
};

/// What it tells the root.
const ROOT: u8 = 0;
const MOUNTS: u8 = 1;
const ENTRY: u8 = 2;
const MASTER: u8 = 3;

/// A mount namespace that is made.
#[derive(Debug)]
pub(super) struct Space {
    /// The root folder.
    pub root: OwnedFd,
    /// The file mountinfo of a process there.
    pub mountinfo: Vec<u8>,
    /// The mount namespace.
    pub entry: OwnedFd,
}

/// What it has made.
#[derive(Debug)]
pub(super) struct Built {
    /// In the order of the tree.
    pub spaces: Vec<Space>,
    /// Masters of terminals that are mounted on files.
    pub masters: OpenMasters,
}

/// Has the mounts made. With `groups` the tree has a cgroup namespace that the root is not in yet.
pub(super) fn run(tree: &mnt::Tree, outside: &mnt::Prepared, cx: &TaskCx<'_>, groups: bool) -> Result<Built> {
    let (ours, builders) = Channel::pair()?;
    let builder = match fork()? {
        Side::Parent(builder) => builder,
        Side::Child => {
            drop(ours);
            let begin = if groups { begin_groups(cx) } else { Ok(()) };
            let built =
                begin.and_then(|()| build(tree, (outside, beside(tree, cx)), &cx.snapshot.dir, &builders));
            if let Err(e) = &built {
                let e = e.clone().during("mount namespace").during(cx.name());
                log::error!("{e}");
                cx.area.fail(cx.node().pid, &e);
            }
            fork::leave(i32::from(built.is_err()))
        }
    };
    drop(builders);
    let (mut found, mut masters) = (BTreeMap::new(), OpenMasters::new());
    while let Some((kind, number, fd)) = ours.receive()? {
        match (kind, fd) {
            (ROOT | MOUNTS | ENTRY, Some(fd)) => drop(found.insert((number, kind), fd)),
            (MASTER, Some(master)) => drop(masters.insert(number, master)),
            _ => return Err(Error::bug("a message of no kind")),
        }
    }
    fork::reap(builder)?;
    let mut spaces = Vec::new();
    for (number, _) in (0..).zip(tree.ids()) {
        let mut take = |kind| found.remove(&(number, kind));
        let (Some(root), Some(mounts), Some(entry)) = (take(ROOT), take(MOUNTS), take(ENTRY)) else {
            return Err(Error::host("the process that makes the mounts of the tree was ended")
                .remedy("somebody killed it: restore again"));
        };
        let mut mountinfo = Vec::new();
        std::fs::File::from(mounts).read_to_end(&mut mountinfo).call("read(mountinfo)")?;
        spaces.push(Space { root, mountinfo, entry });
    }
    Ok(Built { spaces, masters })
}

/// What is mounted of control groups begins where the tree's own namespace of them does.
fn begin_groups(cx: &TaskCx<'_>) -> Result<()> {
    if let Some(set) = cgroup::set_of(&cx.image()?.core) {
        cx.groups.put_at_top(RealPid(0), set)?;
    }
    unshare(CloneFlags::CLONE_NEWCGROUP).call("unshare(CLONE_NEWCGROUP)")
}

/// What file systems of each mount namespace show.
fn beside<'a>(tree: &mnt::Tree, cx: &TaskCx<'a>) -> mnt::Beside<'a> {
    let of = |id: u32| {
        let first = cx.snapshot.alive().find(|(_, task)| task.ids.mnt_ns_id == Some(id));
        [CloneFlags::CLONE_NEWNET, CloneFlags::CLONE_NEWIPC].map(|kind| {
            let (_, task) = first?;
            cx.files.spaces().get(kind, ns::id(&task.ids, kind)?)
        })
    };
    mnt::Beside(tree.ids().map(of).collect())
}

fn build(
    tree: &mnt::Tree,
    outside: (&mnt::Prepared, mnt::Beside<'_>),
    images: &ImageDir,
    to: &Channel,
) -> Result<()> {
    // Found by descriptor in the end, when another /proc is mounted or none.
    let me = ProcDir::own()?;
    outside.0.go(tree)?;
    unshare(CloneFlags::CLONE_NEWNS).call("unshare(CLONE_NEWNS)")?;
    let masters = mnt::build(tree, outside, images, |space| {
        let number = u32::try_from(space).map_err(|_| Error::bug("too many namespaces"))?;
        let folder = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root = open("/", folder, Mode::empty()).call("open(/)")?;
        to.send(ROOT, number, Some(root.as_fd()))?;
        to.send(MOUNTS, number, Some(me.file("mountinfo", OFlag::O_RDONLY)?.as_fd()))?;
        to.send(ENTRY, number, Some(me.file("ns/mnt", OFlag::O_RDONLY)?.as_fd()))
    })?;
    for (number, master) in masters.each() {
        to.send(MASTER, number, Some(master.as_fd()))?;
    }
    Ok(())
}
