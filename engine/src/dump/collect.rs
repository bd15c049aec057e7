//! The tree as images describe it: who is whose child, in which group and session, and who shares what.

use std::collections::HashSet;

use nix::sched::CloneFlags;
use rcriu_images::pb;

use super::{
    again,
    identity::KcmpTree,
    namespaces::NsIds,
    refuse,
    seize::{Frozen, FrozenTask},
};
use crate::{
    error::{Error, Result},
    infect::StoppedTask,
    kernel::Kernel,
    ns,
    procfs::{ProcDir, stat::Stat, status::Status},
    pstree::{Numbering, RealPid, TaskState, VirtPid},
    sys::kcmp::What,
};

/// All tasks, parents before their children; the root is the first.
#[derive(Debug)]
pub struct Pstree {
    pub tasks: Vec<Task>,
    /// Numbers of this process's own objects, for the inventory.
    pub own: pb::TaskKobjIdsEntry,
    /// Kinds of which the tree has a namespace of its own.
    pub namespaces: CloneFlags,
}

/// One task.
#[derive(Debug)]
pub struct Task {
    pub pid: RealPid,
    pub virt: VirtPid,
    /// Position of the parent; the root has none.
    pub parent: Option<usize>,
    pub state: TaskState,
    /// Signal that stopped it, of a stopped one.
    pub stop_signal: Option<i32>,
    pub pgid: VirtPid,
    pub sid: VirtPid,
    /// Threads, the leader first: as they see themselves, and as we do.
    pub threads: Vec<(VirtPid, RealPid)>,
    /// Numbers of what it shares with others; all 0 for one that has ended.
    pub ids: pb::TaskKobjIdsEntry,
    /// Folder of a thread that lives: the leader's, unless that one has ended before the others.
    pub dir: ProcDir,
    /// Of that thread, as read when everything stood still. Name, group and session are the task's.
    pub stat: Stat,
    /// Exit status of a leader that has ended while other threads live.
    pub leader_gone: Option<i32>,
}

/// Trees of everything that tasks may share.
struct Sharing {
    vm: KcmpTree<u32>,
    files: KcmpTree<u32>,
    fs: KcmpTree<u32>,
    sighand: KcmpTree<u32>,
    /// Numbers given out so far, in the order above.
    next: [u32; 4],
    namespaces: NsIds,
    kcmp: bool,
}

/// Describes the tree that `frozen` holds.
///
/// Preconditions: nothing in the tree runs. `shell_job` allows session and group to lead outside.
pub fn pstree(frozen: &Frozen, shell_job: bool, kernel: &Kernel) -> Result<Pstree> {
    let mut sharing = Sharing::new(kernel);
    let own = sharing.own()?;
    let namespaces = frozen.home()?.own();
    let mut home = own;
    let mut tasks = Vec::with_capacity(frozen.tasks().len());
    for (at, from) in frozen.preorder() {
        let task = &frozen.tasks()[at];
        let live = task.stopped.as_ref().map_or(task.pid, StoppedTask::live);
        let dir = ProcDir::open(live)?;
        if from.is_none() {
            sharing.namespaces.fill(&dir, &mut home)?;
        }
        let mut stat = Stat::read(&dir)?;
        let mut leader_gone = None;
        if live != task.pid {
            let leader = Stat::read(&ProcDir::open(task.pid)?)?;
            leader_gone = Some(leader.exit_code);
            stat.comm = leader.comm;
        }
        let ids = if task.state.is_alive() {
            let mut ids = sharing.shared(live, Some(kernel))?;
            sharing.namespaces.fill_as(&home, &task.apart, &mut ids);
            ids
        } else {
            pb::TaskKobjIdsEntry::default()
        };
        let numbers = Numbers::of(task, &stat, namespaces)?;
        if stat.sid == 0 {
            return Err(Error::unsupported(format!(
                "the session of {} is led by a task outside of its pid namespace",
                refuse::name(task.pid)
            )));
        }
        tasks.push(Task {
            pid: task.pid,
            virt: numbers.pid,
            parent: from,
            state: task.state,
            stop_signal: task.stop_signal,
            pgid: numbers.pgid,
            sid: numbers.sid,
            threads: numbers.threads,
            ids,
            dir,
            stat,
            leader_gone,
        });
    }
    let root = &tasks[0];
    if let Some(task) = tasks.iter().find(|t| t.state.is_alive() && t.ids.time_ns_id != root.ids.time_ns_id) {
        return Err(Error::unsupported(format!(
            "{} is in another time namespace than the root task",
            refuse::name(task.pid)
        )));
    }
    if root.sid != root.virt && !shell_job {
        return Err(Error::unsupported(format!(
            "The root process {} is not a session leader: its session {} is not part of the tree",
            root.virt, root.sid
        ))
        .remedy("Consider using --shell-job option"));
    }
    again::check(&tasks, shell_job)?;
    Ok(Pstree { tasks, own, namespaces })
}

/// Numbers of this process's own objects, when nothing else has any.
pub(super) fn own(kernel: &Kernel) -> Result<pb::TaskKobjIdsEntry> {
    Sharing::new(kernel).own()
}

impl Pstree {
    /// A task in each namespace of this kind that the tree has, and its number: that of the root task first. None if all
    /// are in ours.
    pub fn spaces(&self, kind: CloneFlags) -> Vec<(RealPid, u32)> {
        let mut spaces = Vec::new();
        let mut known = HashSet::new();
        let own = self.namespaces.contains(kind);
        for task in self.tasks.iter().filter(|task| own && task.state.is_alive()) {
            if let Some(id) = ns::id(&task.ids, kind).filter(|id| known.insert(*id)) {
                spaces.push((task.dir.pid(), id));
            }
        }
        spaces
    }

    /// How numbers of the tree read inside of it.
    pub fn numbering(&self) -> Numbering {
        if !self.namespaces.contains(CloneFlags::CLONE_NEWPID) {
            return Numbering::default();
        }
        let threads = self.tasks.iter().flat_map(|t| t.threads.iter().map(|(virt, real)| (real.0, virt.0)));
        // Groups and sessions may outlive their leaders.
        let others = self
            .tasks
            .iter()
            .flat_map(|t| [(t.stat.pgid, t.pgid.0), (t.stat.sid, t.sid.0), (t.pid.0, t.virt.0)]);
        Numbering::inner(threads.chain(others).filter(|(real, _)| *real > 0))
    }
}

/// Numbers of a task as itself sees them: those of the innermost pid namespace.
struct Numbers {
    pid: VirtPid,
    pgid: VirtPid,
    sid: VirtPid,
    threads: Vec<(VirtPid, RealPid)>,
}

impl Numbers {
    fn of(task: &FrozenTask, stat: &Stat, namespaces: CloneFlags) -> Result<Numbers> {
        if !namespaces.contains(CloneFlags::CLONE_NEWPID) {
            return Ok(Numbers {
                pid: VirtPid(task.pid.0),
                pgid: VirtPid(stat.pgid),
                sid: VirtPid(stat.sid),
                threads: task.threads().map(|tid| (VirtPid(tid.0), tid)).collect(),
            });
        }
        let inner = |numbers: &[i32], what: &str| match numbers {
            [_, inner] => Ok(VirtPid(*inner)),
            _ => Err(Error::unsupported(format!(
                "{} is in a pid namespace below that of the root task ({what} {numbers:?})",
                refuse::name(task.pid)
            ))),
        };
        let dir = ProcDir::open(task.pid)?;
        let status = Status::read(&dir)?;
        let thread = |tid: RealPid| {
            let status = Status::read_thread(&dir, tid)?;
            Ok((inner(&status.nspid, "NSpid")?, tid))
        };
        Ok(Numbers {
            pid: inner(&status.nspid, "NSpid")?,
            pgid: inner(&status.nspgid, "NSpgid")?,
            sid: inner(&status.nssid, "NSsid")?,
            threads: task.threads().map(thread).collect::<Result<_>>()?,
        })
    }
}

/// The number of a task as itself sees it, where nothing else of it is of interest.
pub(super) fn virt(pid: RealPid) -> Result<VirtPid> {
    let status = Status::read(&ProcDir::open(pid)?)?;
    Ok(VirtPid(status.nspid.last().copied().unwrap_or(pid.0)))
}

impl Sharing {
    fn new(kernel: &Kernel) -> Self {
        Sharing {
            vm: KcmpTree::new(),
            files: KcmpTree::new(),
            fs: KcmpTree::new(),
            sighand: KcmpTree::new(),
            next: [0; 4],
            namespaces: NsIds::default(),
            kcmp: kernel.kcmp,
        }
    }

    /// Numbers of this process's own objects; to be asked for first.
    fn own(&mut self) -> Result<pb::TaskKobjIdsEntry> {
        let me = RealPid(std::process::id().cast_signed());
        let mut own = self.shared(me, None)?;
        self.namespaces.fill(&ProcDir::open(me)?, &mut own)?;
        Ok(own)
    }

    /// Numbers of all but namespaces.
    fn shared(&mut self, pid: RealPid, check: Option<&Kernel>) -> Result<pb::TaskKobjIdsEntry> {
        let mut ids = pb::TaskKobjIdsEntry::default();
        if self.kcmp {
            let next = &mut self.next;
            let mut fresh = |which: usize| {
                next[which] += 1;
                Ok(next[which])
            };
            let (vm, new_vm) = self.vm.number(pid, 0, |_, _| What::Vm, || fresh(0))?;
            let (files, _) = self.files.number(pid, 0, |_, _| What::Files, || fresh(1))?;
            let (fs, new_fs) = self.fs.number(pid, 0, |_, _| What::Fs, || fresh(2))?;
            let (sighand, new_sighand) = self.sighand.number(pid, 0, |_, _| What::Sighand, || fresh(3))?;
            if !new_vm {
                return Err(shared(pid, "memory", "CLONE_VM"));
            }
            if !new_sighand {
                return Err(shared(pid, "signal handlers", "CLONE_SIGHAND"));
            }
            if !new_fs {
                log::warn!(
                    "{} shares its working folder (CLONE_FS): CRIU will not share it again",
                    refuse::name(pid)
                );
            }
            (ids.vm_id, ids.files_id, ids.fs_id, ids.sighand_id) = (vm, files, fs, sighand);
        } else {
            // Without kcmp nobody can tell; the number of threads is all that shares.
            self.next.iter_mut().for_each(|n| *n += 1);
            [ids.vm_id, ids.files_id, ids.fs_id, ids.sighand_id] = self.next;
            if check.is_some() {
                log::warn!("This kernel has no kcmp: tables shared by tasks cannot be recognised");
            }
        }
        Ok(ids)
    }
}

fn shared(pid: RealPid, what: &str, flag: &str) -> Error {
    Error::unsupported(format!(
        "{} shares its {what} with another task ({flag} without CLONE_THREAD)",
        refuse::name(pid)
    ))
    .remedy("wait until a vfork or posix_spawn of it is over")
}
