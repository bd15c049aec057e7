//! Where a tree lives: the namespaces of its root task, which of them are not this process's own, and that all
//! other tasks are in the same, or in one of their own where there may be several.

use std::{os::fd::AsFd, path::PathBuf};

use nix::sched::CloneFlags;

use crate::{
    dump::refuse,
    error::{Error, Result},
    procfs::{ProcDir, status::Status},
    pstree::RealPid,
    spread,
    sys::pidfd,
};

/// Kinds of namespaces but that of time: what clone(2) calls them, their name in `/proc/PID/ns`, that in messages.
pub const KINDS: [(CloneFlags, &str, &str); 7] = [
    (CloneFlags::CLONE_NEWPID, "pid", "pid"),
    (CloneFlags::CLONE_NEWUSER, "user", "user"),
    (CloneFlags::CLONE_NEWNS, "mnt", "mount"),
    (CloneFlags::CLONE_NEWNET, "net", "network"),
    (CloneFlags::CLONE_NEWIPC, "ipc", "ipc"),
    (CloneFlags::CLONE_NEWUTS, "uts", "uts"),
    (CloneFlags::CLONE_NEWCGROUP, "cgroup", "cgroup"),
];

/// Kinds of which tasks of one tree may have several, if the root task has one of its own.
pub const SEVERAL: CloneFlags = CloneFlags::CLONE_NEWNS
    .union(CloneFlags::CLONE_NEWNET)
    .union(CloneFlags::CLONE_NEWIPC)
    .union(CloneFlags::CLONE_NEWUTS);

/// Namespaces of one task that may be others than those of the root task; none where the kernel has no such kind.
#[derive(Clone, Debug, Default)]
pub struct Apart {
    pub time: Option<PathBuf>,
    pub mnt: Option<PathBuf>,
    pub net: Option<PathBuf>,
    pub ipc: Option<PathBuf>,
    pub uts: Option<PathBuf>,
}

impl Apart {
    fn slot(&mut self, kind: CloneFlags) -> Option<&mut Option<PathBuf>> {
        match kind {
            CloneFlags::CLONE_NEWNS => Some(&mut self.mnt),
            CloneFlags::CLONE_NEWNET => Some(&mut self.net),
            CloneFlags::CLONE_NEWIPC => Some(&mut self.ipc),
            CloneFlags::CLONE_NEWUTS => Some(&mut self.uts),
            _ => None,
        }
    }
}

/// Those that one thread of a task may be in, or choose for children, without the others: name, that in messages, number
/// of the kind for pidfds.
const OF_THREADS: [(&str, &str, u8); 7] = [
    ("mnt", "mount", 3),
    ("net", "network", 4),
    ("ipc", "ipc", 2),
    ("uts", "uts", 10),
    ("cgroup", "cgroup", 1),
    ("pid_for_children", "pid (of its children)", 6),
    ("time_for_children", "time (of its children)", 8),
];

/// One kind: whose is which.
#[derive(Clone, Debug)]
struct Kind {
    flag: CloneFlags,
    name: &'static str,
    what: &'static str,
    ours: PathBuf,
    theirs: PathBuf,
}

/// The namespaces of a tree, as far as the kernel has them.
#[derive(Clone, Debug)]
pub struct Home {
    kinds: Vec<Kind>,
}

impl Home {
    /// Those of the root task, whose folder is `root`.
    ///
    /// Preconditions: it is stopped.
    ///
    /// # Errors
    /// A pid namespace below one that is not ours.
    pub fn of(root: &ProcDir, status: &Status) -> Result<Home> {
        let me = ProcDir::open(RealPid(std::process::id().cast_signed()))?;
        let mut kinds = Vec::new();
        for (flag, name, what) in KINDS {
            let (Some(ours), Some(theirs)) = (link(&me, name)?, link(root, name)?) else { continue };
            kinds.push(Kind { flag, name, what, ours, theirs });
        }
        let home = Home { kinds };
        if home.has_own(CloneFlags::CLONE_NEWPID) && status.nspid.len() > 2 {
            return Err(nested(root.pid(), "pid", "a pid namespace below the one it is in"));
        }
        Ok(home)
    }

    /// Kinds in which the tree has a namespace of its own.
    pub fn own(&self) -> CloneFlags {
        let own = self.kinds.iter().filter(|kind| kind.ours != kind.theirs);
        own.fold(CloneFlags::empty(), |flags, kind| flags | kind.flag)
    }

    /// Whether the tree has a namespace of its own of this kind.
    pub fn has_own(&self, flag: CloneFlags) -> bool {
        self.own().contains(flag)
    }

    /// Fails unless the thread is in all of them, but for kinds of which there may be several; gives those that may be
    /// others.
    ///
    /// Preconditions: it is stopped.
    pub fn check(&self, dir: &ProcDir) -> Result<Apart> {
        let mut apart = Apart::default();
        for kind in &self.kinds {
            let leads = link(dir, kind.name)?;
            let other = leads.as_ref().is_some_and(|leads| *leads != kind.theirs);
            if other && !SEVERAL.contains(kind.flag) {
                return Err(nested(dir.pid(), kind.what, "another than the root task's"));
            }
            if other && kind.ours == kind.theirs {
                let (who, what) = (refuse::name(dir.pid()), kind.what);
                return Err(Error::unsupported(format!(
                    "{who} has a {what} namespace of its own, but the root task is in that of this process"
                ))
                .remedy(format!(
                    "start the tree in a {what} namespace of its own too (unshare --{what}), or dump only the task"
                )));
            }
            if let Some(slot) = apart.slot(kind.flag) {
                *slot = leads;
            }
            // Nobody lives in the children's one yet, if there is none.
            if kind.flag == CloneFlags::CLONE_NEWPID
                && link(dir, "pid_for_children")?.is_some_and(|leads| leads != kind.theirs)
            {
                return Err(nested(dir.pid(), "pid (of its children)", "another than its own"));
            }
        }
        Ok(Apart { time: time_namespace(dir)?, ..apart })
    }
}

/// Fails unless all these threads of the task of `dir` are in the same namespaces: images have room for one of each kind.
///
/// Preconditions: they are stopped.
pub fn check_threads(dir: &ProcDir, threads: &[RealPid]) -> Result<()> {
    let Some((first, others)) = threads.split_first().filter(|(_, others)| !others.is_empty()) else {
        return Ok(());
    };
    let namespaces = |tid: &RealPid| -> Result<Vec<Option<PathBuf>>> {
        let thread = dir.thread(*tid)?;
        OF_THREADS.iter().map(|(name, ..)| link(&thread, name)).collect()
    };
    let (numbers, wanted) = (numbers_of(*first), namespaces(first)?);
    spread::map(others, |tid| {
        if numbers.is_some() && numbers_of(*tid) == numbers {
            return Ok(());
        }
        let found = namespaces(tid)?;
        match OF_THREADS.iter().zip(found.iter().zip(&wanted)).find(|(_, (found, wanted))| found != wanted) {
            None => Ok(()),
            Some(((_, what, _), _)) => Err(Error::unsupported(format!(
                "thread {tid} of {} is in another {what} namespace than thread {first}",
                refuse::name(dir.pid())
            ))
            .remedy(
                "have it go back (setns) or end before the dump: only tasks may have namespaces of their own",
            )),
        }
    })?;
    Ok(())
}

/// Inodes of a thread's namespaces, without /proc, which would make seven files and a folder for every thread; `None`
/// where the kernel does not tell (before Linux 6.11).
fn numbers_of(tid: RealPid) -> Option<[u64; OF_THREADS.len()]> {
    let thread = pidfd::open(tid, pidfd::PIDFD_THREAD).ok()?;
    let mut numbers = [0; OF_THREADS.len()];
    for (number, (.., kind)) in numbers.iter_mut().zip(OF_THREADS) {
        *number = match pidfd::namespace(thread.as_fd(), kind) {
            Ok(namespace) => nix::sys::stat::fstat(&namespace).ok()?.st_ino,
            Err(e) if e.errno() == Some(libc::EOPNOTSUPP) => 0,
            Err(_) => return None,
        };
    }
    Some(numbers)
}

/// Where a link of `/proc/PID/ns` leads; `None` where the kernel has no such kind, or nobody lives there yet.
fn link(dir: &ProcDir, name: &str) -> Result<Option<PathBuf>> {
    match dir.link(&format!("ns/{name}")) {
        Ok(leads) => Ok(Some(leads)),
        Err(e) if e.errno() == Some(libc::ENOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

fn time_namespace(dir: &ProcDir) -> Result<Option<PathBuf>> {
    // Another time namespace is fine if the whole tree is in it, which is looked at when the tree is known.
    match (link(dir, "time")?, link(dir, "time_for_children")?) {
        (Some(own), Some(children)) if own != children => Err(Error::unsupported(format!(
            "{} makes its children in another time namespace than its own",
            refuse::name(dir.pid())
        ))),
        (own, _) => Ok(own),
    }
}

fn nested(pid: RealPid, what: &str, which: &str) -> Error {
    Error::unsupported(format!("{}: its {what} namespace is {which}", refuse::name(pid)))
        .remedy("namespaces inside of namespaces cannot be dumped yet")
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use nix::{sched::unshare, unistd::gettid};

    use super::*;
    use crate::procfs::own_pid;

    #[test]
    fn a_thread_that_has_left_is_seen() {
        let (tell, told) = channel();
        let (go, wait) = channel::<()>();
        let thread = std::thread::spawn(move || {
            tell.send((RealPid(gettid().as_raw()), Ok(()))).unwrap();
            wait.recv().unwrap();
            tell.send((RealPid(gettid().as_raw()), unshare(CloneFlags::CLONE_NEWUTS))).unwrap();
            let _ = wait.recv();
        });
        let dir = ProcDir::open(own_pid().unwrap()).unwrap();
        let me = RealPid(gettid().as_raw());
        let (other, _) = told.recv().unwrap();
        check_threads(&dir, &[me, other]).unwrap();
        let numbers = [numbers_of(me), numbers_of(other)];
        assert_eq!(numbers[0], numbers[1]);
        if let Some(numbers) = numbers[0] {
            let uts = dir.thread(me).unwrap().link("ns/uts").unwrap();
            assert_eq!(uts.to_string_lossy(), format!("uts:[{}]", numbers[3]));
        }
        go.send(()).unwrap();
        match told.recv().unwrap() {
            (_, Err(e)) => eprintln!("skipped: no new uts namespace: {e}"),
            (_, Ok(())) => {
                let said = check_threads(&dir, &[me, other]).unwrap_err().to_string();
                assert!(said.contains("another uts namespace"), "{said}");
                assert!(numbers[0].is_none() || numbers_of(other) != numbers[0]);
            }
        }
        drop(go);
        thread.join().unwrap();
    }
}
