//! Namespaces that a restored tree enters instead of getting them new: those that `--join-ns` names, and those that
//! stayed outside when it was dumped (`--external`) and come back through `--inherit-fd`.
//!
//! ```text
//! users             the root task, which has rights there
//! mounts            each task, as its last step; until then paths are found below that namespace's root
//! all others        the engine, for as long as it forks the root: it has rights over them also when the tree gets a
//!                   user namespace, and scripts find the root in them
//! ```
//! Images of a kind that is entered are not restored: what is there, is there.

use std::{
    io::Read,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
};

use nix::{
    fcntl::{OFlag, open, openat},
    sched::{CloneFlags, setns, unshare},
    sys::stat::{Mode, fstat, stat},
};
use rcriu_images::{ImageDir, ImageKind, pb};

use super::{fork, passing::Channel};
use crate::{
    error::{Context, Error, Result, SysContext},
    files::{FilesShared, Root},
    interrupt,
    ns::pid,
    options::{JoinNs, JoinTarget, NsKind, RestoreOptions},
    procfs::ProcDir,
    pstree::RealPid,
    sys::{clone3::Side, fork::fork, ids},
};

/// Time namespaces, which nix does not know.
const CLONE_NEWTIME: CloneFlags = CloneFlags::from_bits_retain(libc::CLONE_NEWTIME);

/// What the helper tells of another mount namespace.
const ROOT: u8 = 1;
const MOUNTS: u8 = 2;

/// Namespaces to be entered.
#[derive(Clone, Debug, Default)]
pub struct Entered {
    list: Vec<One>,
    /// Who to be in the user namespace.
    ids: (u32, u32),
}

#[derive(Clone, Debug)]
struct One {
    flag: CloneFlags,
    name: &'static str,
    from: Source,
}

/// Where a namespace comes from.
#[derive(Clone, Debug)]
enum Source {
    /// A file.
    Path(PathBuf),
    /// A descriptor, given for this name.
    Given(String),
}

fn flag(kind: NsKind) -> CloneFlags {
    match kind {
        NsKind::Net => CloneFlags::CLONE_NEWNET,
        NsKind::Uts => CloneFlags::CLONE_NEWUTS,
        NsKind::Time => CLONE_NEWTIME,
        NsKind::Ipc => CloneFlags::CLONE_NEWIPC,
        NsKind::User => CloneFlags::CLONE_NEWUSER,
        NsKind::Mnt => CloneFlags::CLONE_NEWNS,
    }
}

impl Entered {
    /// Those of a tree whose root task is called `root` and has `ids`, where options join others. World: Plan.
    ///
    /// # Errors
    /// One that is not given or not there; two of a kind.
    pub fn read(
        images: &ImageDir,
        root: i32,
        ids: &pb::TaskKobjIdsEntry,
        opts: &RestoreOptions,
    ) -> Result<Entered> {
        let mut entered = Entered::default();
        for join in &opts.join_ns {
            entered.join(join).during(|| format!("--join-ns {}", join.kind.name()))?;
        }
        let external = |name: &str| opts.inherit_fds.iter().any(|fd| fd.is_for(name));
        let mut add = |flag, kind: &'static str, name: String| {
            if !external(&name) {
                return Err(Error::host(format!("the {kind} namespace {name} must be given from outside"))
                    .remedy(format!("restore with --inherit-fd fd[N]:{name}")));
            }
            entered.list.push(One { flag, name: kind, from: Source::Given(name) });
            Ok(())
        };
        if let Some(name) = ids.pid_ns_id.map(|id| pid::read(images, id)).transpose()?.flatten() {
            if root == 1 {
                return Err(Error::image(format!(
                    "process 1 cannot come back in the pid namespace {name}, which is outside"
                )));
            }
            add(CloneFlags::CLONE_NEWPID, "pid", name)?;
        }
        let joined = opts.join_ns.iter().any(|join| join.kind == NsKind::Net);
        if let Some(id) = ids.net_ns_id.filter(|_| !joined)
            && let Some(name) =
                images.read_opt::<pb::NetnsEntry>(ImageKind::Netns, id.into())?.and_then(|net| net.ext_key)
        {
            add(CloneFlags::CLONE_NEWNET, "net", name)?;
        }
        Ok(entered)
    }

    fn join(&mut self, join: &JoinNs) -> Result<()> {
        let (flag, name) = (flag(join.kind), join.kind.name());
        if self.has(flag) {
            return Err(Error::usage("given twice").remedy("a task is in one namespace of a kind"));
        }
        let path = match &join.target {
            JoinTarget::Pid(pid) => format!("/proc/{pid}/ns/{name}").into(),
            JoinTarget::File(path) => path.clone(),
        };
        stat(&path).call(format!("stat({})", path.display()))?;
        self.ids = join.ids.unwrap_or(self.ids);
        self.list.push(One { flag, name, from: Source::Path(path) });
        Ok(())
    }

    /// Whether this is one of the kinds.
    pub fn has(&self, flag: CloneFlags) -> bool {
        self.list.iter().any(|one| one.flag == flag)
    }

    /// Whether it is one that stayed outside when the tree was dumped.
    pub fn is_external(&self, flag: CloneFlags) -> bool {
        self.list.iter().any(|one| one.flag == flag && matches!(one.from, Source::Given(_)))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// All kinds.
    pub fn kinds(&self) -> CloneFlags {
        self.list.iter().fold(CloneFlags::empty(), |all, one| all | one.flag)
    }

    /// Opens them, in the engine, before the root is forked.
    ///
    /// # Errors
    /// One that is gone; a file that is no namespace of its kind.
    pub fn open(&self, opts: &RestoreOptions, files: &FilesShared) -> Result<Opened> {
        let mut opened = Opened { ids: self.ids, ..Opened::default() };
        for One { flag, name, from } in &self.list {
            let file = match from {
                Source::Path(path) => {
                    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
                    open(path, flags, Mode::empty()).call(format!("open({})", path.display()))?
                }
                Source::Given(key) => files
                    .given(opts, key)?
                    .ok_or_else(|| Error::bug(format!("the {name} namespace {key} is not given")))?,
            };
            let file = files.keep(file)?;
            if *flag == CloneFlags::CLONE_NEWNS {
                opened.mounts = Some(look_at(file.as_fd(), files).during(|| "--join-ns mnt".into())?);
            }
            opened.list.push((*flag, name, file));
        }
        Ok(opened)
    }
}

/// Root folder of another mount namespace, and what is mounted in it, as told by a process that enters it.
fn look_at(namespace: BorrowedFd<'_>, files: &FilesShared) -> Result<(OwnedFd, Vec<u8>)> {
    let (ours, theirs) = Channel::pair()?;
    let look = || {
        let folder = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        // What /proc tells is of whom it is asked about, when the file is opened.
        let me = open("/proc/self", folder, Mode::empty()).call("open(/proc/self)")?;
        unshare(CloneFlags::CLONE_FS).call("unshare(CLONE_FS)")?;
        setns(namespace, CloneFlags::CLONE_NEWNS).call("setns(CLONE_NEWNS)")?;
        let root = open("/", folder, Mode::empty()).call("open(/)")?;
        theirs.send(ROOT, 0, Some(root.as_fd()))?;
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let mounts = openat(&me, "mountinfo", flags, Mode::empty()).call("open(mountinfo)")?;
        theirs.send(MOUNTS, 0, Some(mounts.as_fd()))
    };
    let looking = match fork()? {
        Side::Parent(looking) => looking,
        Side::Child => {
            let looked = look();
            if let Err(e) = &looked {
                log::error!("{e}");
            }
            fork::leave(i32::from(looked.is_err()))
        }
    };
    drop(theirs);
    let mut found = [None, None];
    while let Some((kind, _, fd)) = ours.receive()? {
        if let Some(slot) = found.get_mut(usize::from(kind).wrapping_sub(usize::from(ROOT))) {
            *slot = fd;
        }
    }
    fork::reap(looking)?;
    let [Some(root), Some(mounts)] = found else {
        return Err(Error::host("the namespace cannot be entered, the log says why"));
    };
    let mut mountinfo = Vec::new();
    std::fs::File::from(mounts).read_to_end(&mut mountinfo).call("read(mountinfo)")?;
    Ok((files.keep(root)?, mountinfo))
}

/// Namespaces that are ready to be entered.
#[derive(Debug, Default)]
pub struct Opened {
    list: Vec<(CloneFlags, &'static str, OwnedFd)>,
    ids: (u32, u32),
    /// Root folder of the mount namespace, and its mountinfo.
    mounts: Option<(OwnedFd, Vec<u8>)>,
}

impl Opened {
    /// The namespace of this kind, if one is entered.
    pub fn get(&self, flag: CloneFlags) -> Option<BorrowedFd<'_>> {
        self.list.iter().find(|(one, ..)| *one == flag).map(|(.., file)| file.as_fd())
    }

    /// Where paths begin in the mount namespace that is entered; duplicates go where `keep` puts them.
    pub fn root(&self, keep: impl Fn(OwnedFd) -> Result<OwnedFd>) -> Result<Option<Root>> {
        let Some((root, mountinfo)) = &self.mounts else { return Ok(None) };
        let namespace = self.get(CloneFlags::CLONE_NEWNS);
        let namespace = namespace.map(|fd| keep(fd.try_clone_to_owned().call("dup")?)).transpose()?;
        Root::of_namespace(keep(root.try_clone().call("dup")?)?, mountinfo, namespace).map(Some)
    }

    /// Enters the user namespace, if one is entered. World: Task, in the root of the tree.
    ///
    /// Precondition: this process has one thread, and no children.
    pub fn enter(&self) -> Result<()> {
        if self.get(CLONE_NEWTIME).is_some() {
            // A point in time of the engine's clock; whoever forked us watches it.
            interrupt::set_deadline(None);
        }
        match self.get(CloneFlags::CLONE_NEWUSER) {
            Some(user) => self.enter_user(user).during(|| "user namespace".into()),
            None => Ok(()),
        }
    }

    fn enter_user(&self, user: BorrowedFd<'_>) -> Result<()> {
        let theirs = fstat(user).call("fstat")?;
        let path = "/proc/thread-self/ns/user";
        let ours = stat(path).call(format!("stat({path})"))?;
        // The kernel lets nobody enter the one it is in.
        if (theirs.st_dev, theirs.st_ino) != (ours.st_dev, ours.st_ino) {
            setns(user, CloneFlags::CLONE_NEWUSER).call("setns(CLONE_NEWUSER)")?;
        }
        let (uid, gid) = self.ids;
        ids::become_user(uid, gid).during(|| format!("user {uid} and group {gid} of it"))?;
        nix::sys::prctl::set_dumpable(true).call("prctl(PR_SET_DUMPABLE)")
    }

    /// What this process forks while the guard is there is in all namespaces that are entered but those of users and
    /// mounts.
    pub fn fork_inside(&self) -> Result<ForksInside> {
        let mut inside = ForksInside(Vec::new());
        let later = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUSER;
        for (flag, name, file) in self.list.iter().filter(|(flag, ..)| !later.contains(*flag)) {
            inside.enter(*flag, name, file.as_fd())?;
        }
        Ok(inside)
    }
}

/// Our children are in other namespaces, until this is dropped.
#[derive(Debug)]
pub struct ForksInside(Vec<(CloneFlags, &'static str, OwnedFd)>);

impl ForksInside {
    /// The pid namespace of task `pid`.
    pub fn of(pid: RealPid) -> Result<ForksInside> {
        let mut inside = ForksInside(Vec::new());
        let namespace = ProcDir::open(pid)?.file("ns/pid", OFlag::O_RDONLY)?;
        inside.enter(CloneFlags::CLONE_NEWPID, "pid", namespace.as_fd())?;
        Ok(inside)
    }

    fn enter(&mut self, flag: CloneFlags, name: &'static str, namespace: BorrowedFd<'_>) -> Result<()> {
        let path = format!("/proc/self/ns/{name}");
        let ours = std::fs::File::open(&path).call(format!("open({path})"))?;
        setns(namespace, flag).call("setns").during(|| format!("{name} namespace"))?;
        self.0.push((flag, name, ours.into()));
        Ok(())
    }

    /// Goes back.
    pub fn leave(mut self) -> Result<()> {
        self.back()
    }

    fn back(&mut self) -> Result<()> {
        std::mem::take(&mut self.0).into_iter().rev().try_for_each(|(flag, name, ours)| {
            setns(ours, flag).call("setns").during(|| format!("back to our own {name} namespace"))
        })
    }
}

impl Drop for ForksInside {
    fn drop(&mut self) {
        if let Err(e) = self.back() {
            log::error!("{e}");
        }
    }
}
