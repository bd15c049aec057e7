//! Namespaces that the tree has for itself: where its files are found while it is dumped, and their images.

use std::{collections::HashMap, os::fd::OwnedFd};

use nix::{
    fcntl::OFlag,
    sched::{CloneFlags, setns},
};

use rcriu_images::ImageDir;

use super::{DumpCx, collect::Pstree, refuse};
use crate::{
    error::{Context, Error, Result, SysContext},
    files::{Place, Root, Roots, Space, Spaces, spaces},
    infect::Ledger,
    netlock::{Locks, Method, Whole, guard_all, lock_all},
    ns::{
        enter::{here, inside},
        inode, ipc, mnt, net, pid,
        user::{self, Ids, UserNs},
        uts,
    },
    options::{DumpOptions, External},
    procfs::{ProcDir, own_pid},
    pstree::{RealPid, VirtPid},
    scripts::Stage,
};

/// Where paths of the tree begin.
pub(super) fn roots(tree: &Pstree) -> Result<Roots> {
    let spaces = tree.spaces(CloneFlags::CLONE_NEWNS);
    if spaces.is_empty() {
        return Ok(Roots::default());
    }
    let (mut list, mut places) = (Vec::new(), Vec::new());
    for (pid, id) in spaces {
        let (folder, mountinfo) = mnt::look(pid)?;
        let namespace = ProcDir::open(pid)?.file("ns/mnt", OFlag::O_RDONLY)?;
        let root = Root::of_namespace(folder, &mountinfo, Some(namespace))?;
        places.push(root.mounts()?.iter().map(Place::of).collect());
        list.push((id, root));
    }
    Ok(Roots::new(list, places))
}

/// Namespaces of the other kinds of which the tree has several.
pub(super) fn spaces(tree: &Pstree) -> Result<Spaces> {
    let mut list = Vec::new();
    for (kind, file, _) in spaces::KINDS {
        let all = tree.spaces(kind);
        for (pid, id) in all.iter().filter(|_| all.len() > 1) {
            let file = ProcDir::open(*pid)?.file(file, OFlag::O_RDONLY)?;
            list.push(Space { kind, id: *id, file });
        }
    }
    Ok(Spaces::new(list))
}

/// The calling thread in the tree's network and ipc namespaces, whose tables it looks at. Dropped, it is back in its
/// own.
#[derive(Debug)]
pub(super) struct Inside(Vec<(OwnedFd, CloneFlags)>);

impl Inside {
    pub(super) fn enter(tree: &Pstree) -> Result<Inside> {
        let mut inside = Inside(Vec::new());
        let dir = &tree.tasks[0].dir;
        for (flag, name) in [(CloneFlags::CLONE_NEWNET, "ns/net"), (CloneFlags::CLONE_NEWIPC, "ns/ipc")] {
            if tree.namespaces.contains(flag) {
                let path = format!("/proc/thread-self/{name}");
                let ours = std::fs::File::open(&path).call(path)?;
                setns(dir.file(name, OFlag::O_RDONLY)?, flag).call("setns").during(|| name.to_owned())?;
                inside.0.push((ours.into(), flag));
            }
        }
        Ok(inside)
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        for (ours, flag) in self.0.drain(..).rev() {
            if let Err(e) = setns(ours, flag) {
                log::error!("Can't go back into our own namespace: {e}");
            }
        }
    }
}

/// The name under which an option leaves the namespace of task `dir` outside, `kind` being `net` or `pid`.
///
/// # Errors
/// An option without a name.
fn external(dir: &ProcDir, kind: &str, opts: &DumpOptions) -> Result<Option<String>> {
    let number = inode(dir, kind)?.to_string();
    let named = opts.common.external.iter().find_map(|external| match external {
        External::Net { key, value } if kind == "net" && *key == number => Some((external, value)),
        External::Pid { key, value } if kind == "pid" && *key == number => Some((external, value)),
        _ => None,
    });
    match named {
        None => Ok(None),
        Some((_, Some(name))) if !name.is_empty() => Ok(Some(name.clone())),
        Some((external, _)) => Err(Error::usage(format!("--external {external} has no name"))
            .remedy(format!("give --external {}:NAME", external.id()))),
    }
}

/// Refuses a tree that does not begin with the first process of the pid namespace it has for itself, unless that stays
/// outside. `root` is what its root task, whose folder is `dir`, is called inside.
pub(super) fn check_first(dir: &ProcDir, root: VirtPid, opts: &DumpOptions) -> Result<()> {
    let is_own = dir.link("ns/pid")? != ProcDir::open(own_pid()?)?.link("ns/pid")?;
    match (external(dir, "pid", opts)?, is_own, root) {
        (None, true, VirtPid(2..)) => Err(Error::unsupported(format!(
            "{} is in a pid namespace of its own, but not its first process",
            refuse::name(dir.pid())
        ))
        .remedy(format!(
            "dump the tree of process 1 of that namespace, or leave it outside with --external pid[{}]:NAME",
            inode(dir, "pid")?
        ))),
        (Some(name), _, VirtPid(1)) => Err(Error::unsupported(format!(
            "{} is the first process of its pid namespace, which cannot stay outside as {name}",
            refuse::name(dir.pid())
        ))
        .remedy("leave out --external pid")),
        _ => Ok(()),
    }
}

/// The tree's own network namespaces.
pub(super) fn networks(tree: &Pstree) -> Result<net::Networks> {
    net::Networks::of(&tree.spaces(CloneFlags::CLONE_NEWNET)).during(|| "network namespaces".into())
}

/// The tree's own network namespaces, without packets.
///
/// Dropped, scripts are told that it is about to be unlocked; the lock itself is with the connections of the dump.
/// Scripts run in our own namespaces, so nobody may be [`Inside`] then.
pub(super) struct Network<'a>(Option<(&'a DumpOptions, RealPid)>);

impl<'a> Network<'a> {
    /// Locks them, if the tree has any.
    ///
    /// Precondition: the tree is frozen.
    pub(super) fn lock(
        (tree, networks): (&Pstree, &net::Networks),
        opts: &'a DumpOptions,
        run: &str,
        ledger: &Ledger,
    ) -> Result<(Network<'a>, Option<Locks>)> {
        if networks.is_empty() {
            return Ok((Network(None), None));
        }
        log::info!("Lock network");
        let dir = &tree.tasks[0].dir;
        // Whoever is asked to lock is asked to unlock again, also if it failed.
        let network = Network(Some((opts, dir.pid())));
        opts.common.notifier.notify(Stage::NetworkLock, Some(dir.pid()))?;
        let mut method = Method::of_dump(opts.network_lock);
        method.find_program();
        method.name(run);
        let mut wholes = Vec::new();
        if method.stays() {
            for (pid, _) in tree.spaces(CloneFlags::CLONE_NEWNET) {
                ledger.locks_network(pid)?;
            }
        }
        for (id, namespace) in networks.each() {
            let lock = || match wholes.is_empty() {
                true => lock_all(&method),
                false => guard_all(&method).map(Whole::untold),
            };
            let whole = here(namespace, CloneFlags::CLONE_NEWNET, lock);
            wholes.push((id, whole.during(|| format!("network namespace {id}"))?));
        }
        Ok((network, Some((method, wholes))))
    }

    /// The tree is gone: it stays without packets.
    pub(super) fn stays(mut self) {
        self.0 = None;
    }
}

impl Drop for Network<'_> {
    fn drop(&mut self) {
        if let Some((opts, root)) = self.0.take() {
            log::info!("Unlock network");
            if let Err(e) = opts.common.notifier.notify(Stage::NetworkUnlock, Some(root)) {
                log::error!("{e}");
            }
        }
    }
}

/// Writes the images of the namespaces.
///
/// Precondition: all files are dumped: what had to be made for them lies on mounts.
pub(super) fn dump(tree: &Pstree, cx: &DumpCx<'_>) -> Result<()> {
    let Some(root) = tree.tasks.first() else { return Ok(()) };
    if let (Some(id), Some(name)) = (root.ids.pid_ns_id, external(&root.dir, "pid", cx.opts)?) {
        pid::dump(cx.images, id, &name)?;
    }
    for (real, id) in tree.spaces(CloneFlags::CLONE_NEWUTS) {
        within(real, CloneFlags::CLONE_NEWUTS, "uts", || uts::dump(cx.images, id))?;
    }
    let mut taken = cx.shmem.numbers();
    for (real, id) in tree.spaces(CloneFlags::CLONE_NEWIPC) {
        let attached = cx.segments.attachments(id);
        let ipc = ipc::DumpIpc {
            id,
            images: cx.images,
            store: &cx.pages,
            user: cx.ids.namespace(),
            taken: &taken,
            attached: Some(&attached),
        };
        let numbers = within(real, CloneFlags::CLONE_NEWIPC, "ipc", || ipc::dump(&ipc))?;
        taken.extend(numbers);
    }
    for (real, id) in tree.spaces(CloneFlags::CLONE_NEWNET) {
        network(real, id, cx)?;
    }
    let spaces = tree.spaces(CloneFlags::CLONE_NEWNS);
    if !spaces.is_empty() {
        let masters = cx.files.masters();
        let mounts = mnt::DumpMounts { spaces: &spaces, opts: cx.opts, images: cx.images, masters: &masters };
        mnt::dump(&mounts).during(|| "mount namespace".into())?;
    }
    Ok(())
}

fn within<T: Send>(
    pid: RealPid,
    flag: CloneFlags,
    what: &str,
    dump: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    inside(pid, flag, dump).during(|| format!("{what} namespace"))
}

/// Writes the images of network namespace `id`, in which task `real` is.
fn network(real: RealPid, id: u32, cx: &DumpCx<'_>) -> Result<()> {
    let (uids, gids) = cx.ids.namespace().map(UserNs::ranges).unwrap_or_default();
    let dir = ProcDir::open(real)?;
    let external = external(&dir, "net", cx.opts)?;
    let networks = cx.files.networks();
    let others: Vec<_> = networks.each().filter(|(other, _)| *other != id).collect();
    let tuns = cx.files.tuns(id);
    let net = net::DumpNet {
        uids: net::IdMap(uids),
        gids: net::IdMap(gids),
        external: external.as_deref(),
        inode: Some(inode(&dir, "net")?),
        others: &others,
        tuns: &tuns,
        lock: cx.files.network_lock(id),
        ..net::DumpNet::new(id, cx.opts, cx.images)
    };
    within(real, CloneFlags::CLONE_NEWNET, "network", || net::dump(&net))
}

/// What no restore could make again in namespaces of the tree's own.
///
/// # Errors
/// More than one thread in a user namespace without a pid namespace, whose root may choose no pid outside; folders that
/// tasks share in a mount namespace, which the kernel lets nobody enter whose folders are shared (setns(2)).
pub(super) fn check(tree: &Pstree) -> Result<()> {
    let own = |kind| tree.namespaces.contains(kind);
    let threads: usize = tree.tasks.iter().map(|task| task.threads.len().max(1)).sum();
    if own(CloneFlags::CLONE_NEWUSER) && !own(CloneFlags::CLONE_NEWPID) && threads > 1 {
        return Err(Error::unsupported(format!(
            "the tree of {} has several threads in a user namespace of its own, but in the pid namespace of this \
             process: no restore could choose their pids",
            refuse::name(tree.tasks[0].pid)
        ))
        .remedy("start it in a pid namespace of its own too (unshare --user --pid --fork)"));
    }
    let mut folders = HashMap::new();
    let alive = tree.tasks.iter().filter(|task| task.state.is_alive() && own(CloneFlags::CLONE_NEWNS));
    for task in alive {
        if let Some(other) = folders.insert(task.ids.fs_id, task.pid) {
            return Err(Error::unsupported(format!(
                "{} and {} share their working folder (CLONE_FS) in a mount namespace of their own, which no \
                 restore can enter then",
                refuse::name(other),
                refuse::name(task.pid)
            ))
            .remedy("let one of them call unshare(CLONE_FS) before the dump"));
        }
    }
    Ok(())
}

/// How users and groups of the tree stand in images; writes the image of its user namespace, if it has its own.
pub(super) fn ids(tree: &Pstree, images: &ImageDir) -> Result<Ids> {
    let root = &tree.tasks[0];
    match root.ids.user_ns_id.filter(|_| tree.namespaces.contains(CloneFlags::CLONE_NEWUSER)) {
        Some(id) => Ok(Ids::of(user::dump(root.dir.pid(), images, id)?)),
        None => Ok(Ids::default()),
    }
}
