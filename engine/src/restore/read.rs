//! Images into a [`Snapshot`]: plain data, checked once, so that nothing later has to doubt it.
//!
//! After [`Snapshot::read`] these hold: pids and tids are positive and unique, every parent stands before
//! its children and the first task is the root, each task has its leader among its threads, living tasks
//! have memory, ids and a core per thread, dead ones have no more than their exit code, and every
//! descriptor refers to an open file that is there.

mod files;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use rcriu_images::pagemap::{PAGE_SIZE, PageReader, Stored};
use rcriu_images::{Cause, ImageDir, ImageKind, compat, pb};

use crate::error::{Context, Error, Result, SysContext};
use crate::files::ById;
use crate::interrupt;
use crate::mm::{keys, restore::Range};
use crate::ns::{self, time::Clocks};
use crate::pstree::{TaskState, VirtPid};
use crate::restore::home::Kinds;
use crate::spread;
use crate::task::more::More;

/// Largest pid Linux can be configured to give (`PID_MAX_LIMIT`).
const PID_MAX_LIMIT: u32 = 4 << 20;

/// Index of a task in [`Snapshot::tasks`] and in the plan's tree, where helpers follow the tasks.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct TaskIx(pub u32);

impl TaskIx {
    /// The root task.
    pub const ROOT: TaskIx = TaskIx(0);

    /// For slices.
    pub fn at(self) -> usize {
        self.0 as usize
    }
}

/// Everything the images say about tasks and their open files.
#[derive(Debug)]
pub struct Snapshot {
    /// The folder, for what is read later (pages, queues, ghost files).
    pub dir: ImageDir,
    /// `inventory.img`.
    pub inventory: pb::InventoryEntry,
    /// Parents before their children; the root is first.
    pub tasks: Vec<TaskImage>,
    /// Every open file, by its number.
    pub files: ById<Arc<pb::FileEntry>>,
    /// Clocks at the time of the dump, if it tells them.
    pub clocks: Option<Clocks>,
    /// Kinds of which the tree gets a namespace of its own.
    pub namespaces: Kinds,
    /// Descriptor tables by `files_id`, each sorted by descriptor.
    pub fd_tables: BTreeMap<u32, Vec<pb::FdinfoEntry>>,
    /// Some task has a NUMA memory policy.
    pub memory_policies: bool,
    by_pid: HashMap<VirtPid, TaskIx>,
}

/// One task of the tree.
#[derive(Debug)]
pub struct TaskImage {
    /// Its pid.
    pub pid: VirtPid,
    /// Its parent; `None` for the root.
    pub parent: Option<TaskIx>,
    /// Process group.
    pub pgid: VirtPid,
    /// Session.
    pub sid: VirtPid,
    /// Tids, the leader (equal to `pid`) first.
    pub threads: Vec<VirtPid>,
    /// Whether it lives.
    pub state: TaskState,
    /// The leader's core; its part about the task stands in `tc`.
    pub core: pb::CoreEntry,
    /// The part of the core about the task as a whole.
    pub tc: pb::TaskCoreEntry,
    /// Cores of the other threads: number `i` belongs to `threads[i + 1]`.
    pub thread_cores: Vec<pb::CoreEntry>,
    /// Which kernel objects it shares with whom; dead tasks have those of their parent.
    pub ids: pb::TaskKobjIdsEntry,
    /// Memory; there for all living tasks.
    pub mm: Option<pb::MmEntry>,
    /// Memory that can only be executed, which is readable in `mm` ([`keys::withhold`]).
    pub execute_only: Vec<Range>,
    /// Working folder, root folder, umask; there for all living tasks.
    pub fs: Option<pb::FsEntry>,
    /// What only images of ours tell.
    pub more: Option<More>,
}

impl TaskImage {
    /// The name for messages, as `task 12 (worker)`.
    pub fn name(&self) -> String {
        format!("task {} ({})", self.pid, self.comm())
    }

    /// Command name, printable.
    pub fn comm(&self) -> String {
        let end = self.tc.comm.iter().position(|b| *b == 0).unwrap_or(self.tc.comm.len());
        String::from_utf8_lossy(&self.tc.comm[..end]).escape_debug().to_string()
    }

    /// Core of thread number `i` (0 is the leader).
    pub fn thread_core(&self, i: usize) -> Option<&pb::CoreEntry> {
        match i.checked_sub(1) {
            None => Some(&self.core),
            Some(i) => self.thread_cores.get(i),
        }
    }

    /// XSAVE components that any of its threads has in use.
    pub fn in_use(&self) -> u64 {
        let infos = (0..self.threads.len()).filter_map(|i| self.thread_core(i)?.thread_info.as_ref());
        infos.fold(0, |used, info| used | in_use(info))
    }

    /// Whether it has memory, descriptors and registers.
    pub fn is_alive(&self) -> bool {
        self.state.is_alive()
    }
}

impl Snapshot {
    /// Reads and checks all images that describe tasks and open files.
    ///
    /// # Errors
    /// Missing, damaged or contradicting images, each named.
    pub fn read(dir: &ImageDir) -> Result<Snapshot> {
        let inventory = read_inventory(dir)?;
        let entries: Vec<pb::PstreeEntry> = dir.require(ImageKind::Pstree, 0)?.all()?;
        let by_pid = check_tree(&entries)?;
        let mut tasks: Vec<TaskImage> = Vec::with_capacity(entries.len());
        let mut more = More::read(dir)?;
        let memory_policies = more.values().any(More::has_memory_policy);
        for entry in &entries {
            interrupt::check()?;
            let mut task =
                read_task(dir, entry, &tasks, &by_pid).during(|| format!("images of task {}", entry.pid))?;
            task.more = more.remove(&entry.pid);
            let vmas = task.mm.as_ref().map_or(&[][..], |mm| &mm.vmas);
            keys::check(task.more.as_deref(), vmas).during(|| task.name())?;
            tasks.push(task);
        }
        let host = inventory.root_ids.as_ref();
        let root = &tasks[0].ids;
        let namespaces = Kinds::of(root, host);
        for task in tasks.iter().filter(|t| t.is_alive()) {
            ns::check(&task.ids, root, namespaces).during(|| task.name())?;
            if task.ids.time_ns_id != root.time_ns_id {
                return Err(Error::unsupported("it is in another time namespace than the root task")
                    .during(task.name()));
            }
        }
        let clocks = Clocks::read(dir, root, host)?;
        let (files, fd_tables) = files::read(dir, &tasks)?;
        let snapshot = Snapshot {
            clocks,
            namespaces,
            dir: dir.clone(),
            inventory,
            tasks,
            files,
            fd_tables,
            memory_policies,
            by_pid,
        };
        for (_, task) in snapshot.alive() {
            interrupt::check()?;
            check_pages(dir, task.pid).during(|| format!("images of {}", task.name()))?;
        }
        Ok(snapshot)
    }

    /// A task by number; `None` for helpers.
    pub fn get(&self, ix: TaskIx) -> Option<&TaskImage> {
        self.tasks.get(ix.at())
    }

    /// The root task.
    pub fn root(&self) -> &TaskImage {
        &self.tasks[0]
    }

    /// The task whose leader is `pid`.
    pub fn by_pid(&self, pid: VirtPid) -> Option<TaskIx> {
        self.by_pid.get(&pid).copied()
    }

    /// Living tasks with their numbers.
    pub fn alive(&self) -> impl Iterator<Item = (TaskIx, &TaskImage)> {
        self.all().filter(|(_, t)| t.is_alive())
    }

    /// All tasks with their numbers.
    pub fn all(&self) -> impl Iterator<Item = (TaskIx, &TaskImage)> {
        self.tasks.iter().enumerate().map(|(i, t)| (TaskIx(i as u32), t))
    }

    /// Descriptors of a task, sorted; none for dead tasks.
    pub fn fds(&self, task: &TaskImage) -> &[pb::FdinfoEntry] {
        if !task.is_alive() {
            return &[];
        }
        self.fd_tables.get(&task.ids.files_id).map_or(&[], Vec::as_slice)
    }
}

fn read_inventory(dir: &ImageDir) -> Result<pb::InventoryEntry> {
    compat::inventory(dir).map_err(|e| {
        let missing = matches!(e.cause(), Cause::Missing);
        let e = Error::from(e);
        if missing {
            e.remedy("only a dump that finished has an inventory; give its folder with -D")
        } else {
            e
        }
    })
}

/// Pids unique and in range, parents before children, one root, the leader among the threads.
fn check_tree(entries: &[pb::PstreeEntry]) -> Result<HashMap<VirtPid, TaskIx>> {
    let bad = |what: String| Error::image(format!("pstree.img: {what}"));
    if entries.is_empty() {
        return Err(bad("there is no task in it".into()));
    }
    let mut seen = HashSet::new();
    let mut leaders = HashMap::with_capacity(entries.len());
    for (at, e) in entries.iter().enumerate() {
        let pid = number(e.pid).ok_or_else(|| bad(format!("entry {at}: there can be no pid {}", e.pid)))?;
        for (what, id) in [("process group", e.pgid), ("session", e.sid)] {
            // 0 stands for a leader outside the pid namespace that was dumped.
            if id != 0 && number(id).is_none() {
                return Err(bad(format!("task {pid}: there can be no {what} {id}")));
            }
        }
        if at == 0 && e.ppid != 0 {
            return Err(bad(format!("the first task, {pid}, is not the root: it has parent {}", e.ppid)));
        }
        if at > 0 && !number(e.ppid).is_some_and(|p| leaders.contains_key(&p)) {
            return Err(bad(format!("parent {} of task {pid} is not there before it", e.ppid)));
        }
        if !e.threads.contains(&e.pid) && !has_no_threads(e) {
            return Err(bad(format!("task {pid} is not among its own threads")));
        }
        for tid in tids(e) {
            let tid = number(tid).ok_or_else(|| bad(format!("task {pid}: there can be no thread {tid}")))?;
            if !seen.insert(tid) {
                return Err(bad(format!("the number {tid} is given to two threads")));
            }
        }
        leaders.insert(pid, TaskIx(at as u32));
    }
    Ok(leaders)
}

/// For zombies CRIU writes one number from memory it did not set.
fn has_no_threads(e: &pb::PstreeEntry) -> bool {
    match e.threads[..] {
        [] => true,
        [tid] => tid != e.pid,
        _ => false,
    }
}

/// Tids, the leader first.
fn tids(e: &pb::PstreeEntry) -> impl Iterator<Item = u32> {
    let others = e.threads.iter().copied().filter(|t| *t != e.pid && !has_no_threads(e));
    [e.pid].into_iter().chain(others)
}

/// XSAVE components that a thread has in use.
pub fn in_use(info: &pb::ThreadInfoX86) -> u64 {
    info.fpregs.xsave.as_ref().map_or(0, |xsave| xsave.xstate_bv)
}

fn number(pid: u32) -> Option<VirtPid> {
    (1..=PID_MAX_LIMIT).contains(&pid).then_some(VirtPid(pid as i32))
}

fn read_task(
    dir: &ImageDir,
    entry: &pb::PstreeEntry,
    before: &[TaskImage],
    by_pid: &HashMap<VirtPid, TaskIx>,
) -> Result<TaskImage> {
    let pid = VirtPid(entry.pid as i32);
    let parent = by_pid.get(&VirtPid(entry.ppid as i32)).copied();
    let (core, tc) = read_leader(dir, entry.pid)?;
    let state = TaskState::from_image(tc.task_state)
        .ok_or_else(|| Error::image(format!("core-{pid}.img: there is no task state {}", tc.task_state)))?;
    let threads = tids(entry).map(|t| VirtPid(t as i32)).collect();
    let parents_ids = parent.and_then(|p| before.get(p.at())).map(|p| &p.ids);
    let ids = dir.read_opt::<pb::TaskKobjIdsEntry>(ImageKind::Ids, u64::from(entry.pid))?.or(core.ids);
    let mut task = TaskImage {
        pid,
        parent,
        pgid: VirtPid(entry.pgid as i32),
        sid: VirtPid(entry.sid as i32),
        threads,
        state,
        ids: pb::TaskKobjIdsEntry::default(),
        core,
        tc,
        thread_cores: Vec::new(),
        mm: None,
        execute_only: Vec::new(),
        fs: None,
        more: None,
    };
    if !state.is_alive() {
        if task.threads.len() > 1 {
            return Err(Error::image("pstree.img: a zombie cannot have threads"));
        }
        task.ids = ids.or_else(|| parents_ids.cloned()).unwrap_or_default();
        return Ok(task);
    }
    if has_no_threads(entry) {
        return Err(Error::image(format!("pstree.img: the living task {pid} has no threads")));
    }
    task.ids = ids.ok_or_else(|| Error::image(format!("ids-{pid}.img is missing")))?;
    check_thread(pid, &task.core)?;
    task.thread_cores = spread::map(&task.threads[1..], |tid| {
        let core = x86_64(compat::thread_core(dir, entry.pid, tid.0 as u32)?, tid.0 as u32)?;
        check_thread(*tid, &core).map(|()| core)
    })?;
    let mut mm =
        compat::mm(dir, entry.pid)?.ok_or_else(|| Error::image(format!("mm-{pid}.img is missing")))?;
    task.execute_only = keys::withhold(&mut mm.vmas);
    task.mm = Some(mm);
    task.fs = Some(dir.read_one(ImageKind::Fs, u64::from(entry.pid))?);
    Ok(task)
}

fn read_leader(dir: &ImageDir, pid: u32) -> Result<(pb::CoreEntry, pb::TaskCoreEntry)> {
    let mut core = x86_64(compat::core(dir, pid)?, pid)?;
    let tc = core
        .tc
        .take()
        .ok_or_else(|| Error::image(format!("core-{pid}.img: the part about the task (tc) is missing")))?;
    Ok((core, tc))
}

fn x86_64(core: pb::CoreEntry, tid: u32) -> Result<pb::CoreEntry> {
    match core.mtype() {
        pb::core_entry::March::X8664 => Ok(core),
        other => Err(Error::unsupported(format!(
            "core-{tid}.img: the dump comes from another architecture ({other:?}), this is x86_64"
        ))),
    }
}

/// Every pages file is as long as its pagemap says: what is missing is known before anything is created.
fn check_pages(dir: &ImageDir, pid: VirtPid) -> Result<()> {
    let Some(pages) = PageReader::open(dir, ImageKind::Pagemap, u64::from(pid.0 as u32))? else {
        return Ok(());
    };
    for level in 0..pages.levels() {
        let Some(map) = pages.pagemap(level).filter(|map| map.stored > 0) else { continue };
        let name = || match pages.stored(level) {
            Some(Stored::Packed(packed)) => packed.name().to_owned(),
            _ => ImageKind::Pages.file_name(map.pages_id.into()),
        };
        let stored = pages.stored(level).ok_or_else(|| Error::image(format!("{} is missing", name())))?;
        let len = stored.size().call("fstat").during(name)?;
        let want = map.stored.saturating_mul(PAGE_SIZE);
        if len < want {
            let of = if level == 0 { "" } else { " of a parent dump" };
            return Err(Error::image(format!(
                "{}{of} has {len} bytes, its pagemap speaks of {want}",
                name()
            )));
        }
    }
    Ok(())
}

fn check_thread(tid: VirtPid, core: &pb::CoreEntry) -> Result<()> {
    let missing = |what| Err(Error::image(format!("core-{tid}.img: {what} is missing")));
    if core.thread_info.is_none() {
        return missing("thread_info (registers)");
    }
    if core.thread_core.is_none() {
        return missing("thread_core");
    }
    Ok(())
}

#[cfg(test)]
mod tests;
