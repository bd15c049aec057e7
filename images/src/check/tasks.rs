//! The tree of processes and what each process must have.

use std::collections::{HashMap, HashSet};

use super::Check;
use crate::{
    catalog::ImageKind,
    compat, pb,
    set::{Task, TaskState},
};

const PSTREE: (ImageKind, u64) = (ImageKind::Pstree, 0);

impl Check<'_> {
    pub(super) fn tasks(&mut self) {
        if self.set.tasks.is_empty() {
            return;
        }
        self.tree();
        let filters = self.note(self.set.dir.read_opt::<pb::SeccompEntry>(ImageKind::Seccomp, 0)).flatten();
        let filters = filters.map_or(0, |s| s.seccomp_filters.len());
        let cgroups = self.note(self.set.dir.read_opt::<pb::CgroupEntry>(ImageKind::Cgroup, 0)).flatten();
        let cg_sets = cgroups.map(|c| c.sets.iter().map(|s| s.id).collect::<HashSet<_>>());
        for task in &self.set.tasks {
            self.task(task, filters, cg_sets.as_ref());
        }
        self.locks();
    }

    fn tree(&mut self) {
        let mut numbers: HashMap<u32, u32> = HashMap::new();
        let mut roots = 0;
        for task in &self.set.tasks {
            let pid = task.pid;
            if task.ppid == 0 {
                roots += 1;
            } else if !self.pids.contains_key(&task.ppid) {
                self.error(PSTREE.0, 0, format!("parent {} of task {pid} is not in the tree", task.ppid));
            }
            // What stands there for a zombie means nothing.
            if !task.state().has_body() {
                continue;
            }
            if !task.threads.contains(&pid) {
                self.error(PSTREE.0, 0, format!("task {pid} is not among its own threads"));
            }
            for &tid in &task.threads {
                if let Some(other) = numbers.insert(tid, pid) {
                    self.error(
                        PSTREE.0,
                        0,
                        format!("number {tid} is a thread of task {other} and of task {pid}"),
                    );
                }
            }
        }
        match roots {
            1 => self.ancestry(),
            0 => self.error(PSTREE.0, 0, "no task is the root of the tree"),
            n => self.error(PSTREE.0, 0, format!("{n} tasks have no parent, one may")),
        }
    }

    /// Tasks that are each other's ancestors.
    fn ancestry(&mut self) {
        // Whether each task is known to descend from one without parent.
        let mut rooted: HashMap<u32, bool> = HashMap::new();
        for task in &self.set.tasks {
            let mut path = Vec::new();
            let mut pid = task.pid;
            let answer = loop {
                if let Some(&known) = rooted.get(&pid) {
                    break known;
                }
                path.push(pid);
                // What is on the path and not decided leads round in a circle.
                rooted.insert(pid, false);
                match self.pids.get(&pid).map(|&at| self.set.tasks[at].ppid) {
                    None | Some(0) => break true,
                    Some(parent) => pid = parent,
                }
            };
            for pid in path {
                rooted.insert(pid, answer);
            }
        }
        let stray: Vec<u32> =
            self.set.tasks.iter().map(|t| t.pid).filter(|pid| rooted.get(pid) == Some(&false)).collect();
        for pid in stray {
            self.error(PSTREE.0, 0, format!("task {pid} does not descend from the root"));
        }
    }

    fn task(&mut self, task: &Task, filters: usize, cg_sets: Option<&HashSet<u32>>) {
        let (pid, id) = (task.pid, u64::from(task.pid));
        let Some(core) = &task.core else { return };
        let Some(tc) = &core.tc else {
            return self.error(ImageKind::Core, id, format!("task {pid} has no task part"));
        };
        if let TaskState::Other(number) = task.state() {
            self.error(ImageKind::Core, id, format!("state {number} of task {pid} is not known"));
        }
        if !task.state().has_body() {
            return;
        }
        self.registers(ImageKind::Core, id, core);
        if let (Some(sets), Some(set)) = (cg_sets, tc.cg_set)
            && !sets.contains(&set)
        {
            self.error(ImageKind::Core, id, format!("cgroup set {set} of task {pid} is not in cgroup.img"));
        }
        for (there, kind) in [
            (task.ids.is_some(), ImageKind::Ids),
            (task.mm.is_some(), ImageKind::Mm),
            (task.fs.is_some(), ImageKind::Fs),
        ] {
            let damaged = self.has(kind, id);
            if !there && !damaged {
                self.error(PSTREE.0, 0, format!("task {pid} has no {}", kind.file_name(id)));
            }
        }
        self.expect(PSTREE, (ImageKind::Pagemap, id), &format!("memory of task {pid}"));
        for &tid in &task.threads {
            self.thread(task, tid, filters);
        }
    }

    fn thread(&mut self, task: &Task, tid: u32, filters: usize) {
        let id = u64::from(tid);
        let core = if tid == task.pid {
            task.core.clone()
        } else {
            self.note(compat::thread_core(&self.set.dir, task.pid, tid))
        };
        let Some(core) = core else { return };
        if tid != task.pid {
            self.registers(ImageKind::Core, id, &core);
        }
        let Some(thread) = &core.thread_core else { return };
        let filter = thread.seccomp_filter.filter(|_| thread.seccomp_mode() == pb::SeccompMode::Filter);
        if let Some(filter) = filter
            && filter as usize >= filters
        {
            self.error(
                ImageKind::Core,
                id,
                format!("seccomp filter {filter} of thread {tid} is not in seccomp.img"),
            );
        }
    }

    fn registers(&mut self, kind: ImageKind, id: u64, core: &pb::CoreEntry) {
        let there = match core.mtype() {
            pb::core_entry::March::X8664 => core.thread_info.is_some(),
            pb::core_entry::March::Arm => core.ti_arm.is_some(),
            pb::core_entry::March::Aarch64 => core.ti_aarch64.is_some(),
            pb::core_entry::March::Ppc64 => core.ti_ppc64.is_some(),
            pb::core_entry::March::S390 => core.ti_s390.is_some(),
            pb::core_entry::March::Mips => core.ti_mips.is_some(),
            pb::core_entry::March::Loongarch64 => core.ti_loongarch64.is_some(),
            pb::core_entry::March::Riscv64 => core.ti_riscv64.is_some(),
            pb::core_entry::March::Unknown => false,
        };
        if !there {
            self.error(kind, id, format!("there are no registers of {:?}", core.mtype()));
        }
    }

    /// Locks are on a descriptor of a task.
    fn locks(&mut self) {
        let locks = self.note(self.set.dir.read_all::<pb::FileLockEntry>(ImageKind::FileLocks, 0));
        let mut descriptors: HashSet<(u32, u32)> = HashSet::new();
        for task in &self.set.tasks {
            descriptors.extend(self.set.fds(task).iter().map(|fd| (task.pid, fd.fd)));
        }
        for lock in locks.unwrap_or_default() {
            let at = (lock.pid.cast_unsigned(), lock.fd.cast_unsigned());
            if !descriptors.contains(&at) {
                let text = format!("fd {} of task {} is locked, but not open", lock.fd, lock.pid);
                self.error(ImageKind::FileLocks, 0, text);
            }
        }
    }
}
