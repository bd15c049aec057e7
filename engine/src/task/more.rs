//! `rcriu-tasks.img`: what the format has no place for, one entry per living task.
//!
//! Only what differs from a fresh process is written; what an entry does not tell is set to what a fresh process
//! has, in case the restoring process has something else. Images without the file (CRIU's) leave all this as
//! tasks have it from the restoring process.

use std::collections::HashMap;

use parasite::{task::TaskInfo, thread::ThreadInfo};
use rcriu_images::{ImageDir, ImageKind, dir::ImageWriter, pb};
use restorer::args::Setting;

use super::{affinity, attributes, autogroup, coredump, dispatch, ioprio, misc, numa, sched};
use crate::{
    arch::{Layout, Leftover},
    error::{Context, Error, Result},
    infect::StoppedTask,
    mm,
    procfs::{ProcDir, stat::Stat, status::Status},
    pstree::{Numbering, RealPid, VirtPid},
    restore::{Snapshot, TaskImage, stages::Area},
    sys::sched::Attr,
};

const PR_SET_THP_DISABLE: u64 = 41;
const PR_SET_MDWE: u64 = 65;
const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
/// `XFEATURE_XTILE_DATA`: AMX, the one component a process must ask for.
const XTILE_DATA: u64 = 18;
/// `CAP_SYS_RESOURCE`.
const CAP_SYS_RESOURCE: u64 = 1 << 24;

/// The image while it is written.
#[derive(Debug)]
pub struct MoreOut {
    out: ImageWriter,
    entries: Vec<pb::RcriuTaskEntry>,
    allowed: affinity::Allowed,
    usual_slice: u64,
}

/// What was found out about a task by others.
pub struct Seen<'a> {
    pub pid: VirtPid,
    pub numbering: &'a Numbering,
    pub dir: &'a ProcDir,
    pub stat: &'a Stat,
    pub stopped: &'a StoppedTask,
    pub statuses: &'a [Status],
    pub info: &'a TaskInfo,
    pub threads: &'a [ThreadInfo],
    pub attributes: &'a [Attr],
    pub lock_future: u32,
    pub session: Option<pb::RcriuSession>,
    pub mapping: Vec<pb::RcriuMappingEntry>,
}

impl MoreOut {
    /// Nothing is written yet.
    pub fn new(images: &ImageDir) -> MoreOut {
        MoreOut {
            out: images.writer(ImageKind::RcriuTasks, 0),
            entries: Vec::new(),
            allowed: affinity::Allowed::ask(),
            usual_slice: sched::usual_slice(),
        }
    }

    /// Takes the entry of a task.
    pub fn task(&mut self, seen: Seen<'_>) -> Result<()> {
        let Seen { dir, info, .. } = seen;
        let mut entry = pb::RcriuTaskEntry {
            pid: seen.pid.0.cast_unsigned(),
            personality: Some(misc::exact_personality(dir)?).filter(|p| *p != 0),
            coredump_filter: coredump::dump(dir)?,
            autogroup_nice: autogroup::dump(dir)?,
            thp_disable: u32::try_from(info.thp_disabled).ok().filter(|mode| *mode > 1),
            mdwe: u32::try_from(info.mdwe).ok().filter(|bits| *bits != 0),
            merge_any: (info.memory_merge > 0).then_some(true),
            lock_future: Some(seen.lock_future).filter(|flags| *flags != 0),
            xcomp_perm: u64::try_from(info.xcomp_perm)
                .ok()
                .map(|perm| perm & 1 << XTILE_DATA)
                .filter(|perm| *perm != 0),
            pkeys: u32::try_from(info.pkeys).ok().filter(|keys| *keys != 0),
            session: seen.session,
            thread: Vec::new(),
            mapping: Vec::new(),
        };
        let threads = seen.stopped.threads().iter().zip(seen.statuses).zip(seen.threads).zip(seen.attributes);
        for (((thread, status), asked), attributes) in threads {
            let tid = thread.tid();
            let own_dir = || dir.thread(tid);
            let mut more = pb::RcriuThreadEntry {
                cpus: affinity::dump(own_dir, status, &mut self.allowed)?,
                ioprio: ioprio::dump(tid)?,
                sched: sched::dump_more(attributes, self.usual_slice),
                dispatch: dispatch::dump(thread),
                xstate: xstate(thread.xsave().leftovers(Layout::host())?),
                ..Default::default()
            };
            // A thread that never could set what only its stat file tells needs no look at that.
            let flags = || match tid == dir.pid() || status.cap_bnd & CAP_SYS_RESOURCE == 0 {
                true => Ok(seen.stat.flags),
                false => Ok(Stat::read(&own_dir()?)?.flags),
            };
            attributes::dump(asked, flags, &mut more)?;
            if more != pb::RcriuThreadEntry::default() {
                let virt = seen.numbering.of(tid);
                entry.thread.push(pb::RcriuThreadEntry { tid: virt.0.cast_unsigned(), ..more });
            }
        }
        entry.mapping = seen.mapping;
        self.entries.push(entry);
        Ok(())
    }

    /// Replaces what was told of the mappings of a task.
    pub fn set_mapping(&mut self, pid: VirtPid, mapping: Vec<pb::RcriuMappingEntry>) {
        let pid = pid.0.cast_unsigned();
        if let Some(entry) = self.entries.iter_mut().find(|entry| entry.pid == pid) {
            entry.mapping = mapping;
        }
    }

    /// Completes the image.
    pub fn finish(mut self) -> Result<()> {
        for entry in &self.entries {
            self.out.write(entry)?;
        }
        Ok(self.out.finish()?)
    }
}

/// Processor state that core images cannot hold.
fn xstate(leftovers: Vec<Leftover>) -> Vec<pb::RcriuXstateEntry> {
    let entry = |left: Leftover| pb::RcriuXstateEntry { component: left.component, state: left.bytes };
    leftovers.into_iter().map(entry).collect()
}

/// What the image tells of a task.
#[derive(Debug)]
pub struct More {
    entry: pb::RcriuTaskEntry,
    /// Places of threads in the entry.
    threads: HashMap<u32, usize>,
}

impl std::ops::Deref for More {
    type Target = pb::RcriuTaskEntry;

    fn deref(&self) -> &pb::RcriuTaskEntry {
        &self.entry
    }
}

impl More {
    /// All entries, by pid; empty where there is no such image.
    ///
    /// # Errors
    /// Tasks or threads that stand there twice, mappings out of order.
    pub fn read(images: &ImageDir) -> Result<HashMap<u32, More>> {
        let mut all = HashMap::new();
        for entry in images.read_all::<pb::RcriuTaskEntry>(ImageKind::RcriuTasks, 0)? {
            let pid = entry.pid;
            let twice = |what: String| Error::image(format!("rcriu-tasks.img: {what} stands there twice"));
            mm::more::check(&entry.mapping)?;
            let mut threads = HashMap::with_capacity(entry.thread.len());
            for (at, thread) in entry.thread.iter().enumerate() {
                if threads.insert(thread.tid, at).is_some() {
                    return Err(twice(format!("thread {}", thread.tid)));
                }
            }
            if all.insert(pid, More { entry, threads }).is_some() {
                return Err(twice(format!("task {pid}")));
            }
        }
        Ok(all)
    }

    /// What it tells of a thread.
    pub fn thread(&self, tid: VirtPid) -> Option<&pb::RcriuThreadEntry> {
        self.threads.get(&tid.0.cast_unsigned()).and_then(|at| self.entry.thread.get(*at))
    }

    /// Processor state of a thread that its core image cannot hold.
    pub fn leftovers(&self, tid: VirtPid) -> Vec<Leftover> {
        let told = self.thread(tid).map_or(&[][..], |thread| &thread.xstate);
        told.iter().map(|left| Leftover { component: left.component, bytes: left.state.clone() }).collect()
    }

    /// Whether one of the threads has a memory policy of its own.
    pub fn has_memory_policy(&self) -> bool {
        self.thread.iter().any(|thread| thread.policy.is_some())
    }

    /// Whether some memory is sealed.
    pub fn has_seals(&self) -> bool {
        self.mapping.iter().any(pb::RcriuMappingEntry::sealed)
    }

    /// What the leader sets for the whole process while it still has every right.
    pub fn for_process(&self) -> Vec<Setting> {
        let mut calls = Vec::new();
        if let Some(mode) = self.thp_disable {
            // The first bit says that it is on at all.
            calls.push(Setting::prctl(PR_SET_THP_DISABLE, [1, u64::from(mode) & !1, 0, 0]));
        }
        let uses_tiles =
            || self.thread.iter().flat_map(|t| &t.xstate).any(|x| u64::from(x.component) == XTILE_DATA);
        if self.xcomp_perm() >> XTILE_DATA & 1 != 0 || uses_tiles() {
            calls.push(Setting::call(libc::SYS_arch_prctl, [ARCH_REQ_XCOMP_PERM, XTILE_DATA, 0, 0, 0]));
        }
        if let Some(flags) = self.lock_future {
            calls.push(Setting::call(libc::SYS_mlockall, [flags.into(), 0, 0, 0, 0]));
        }
        calls
    }

    /// What the leader sets at the very end, because it forbids what comes before.
    pub fn last(&self) -> Vec<Setting> {
        let sealed = mm::more::Told::new(Some(&self.entry)).sealed();
        let mut calls: Vec<Setting> =
            sealed.map(|(start, end)| Setting::call(MSEAL, [start, end - start, 0, 0, 0])).collect();
        if let Some(bits) = self.mdwe {
            calls.push(Setting::prctl(PR_SET_MDWE, [bits.into(), 0, 0, 0]));
        }
        calls
    }
}

const MSEAL: i64 = 462;

/// What has to be set before the task takes memory: the leader's memory policy, which counts for the whole
/// restore of the process.
pub fn enter(snapshot: &Snapshot, task: &TaskImage) -> Result<()> {
    // They are rare. Where no task has one, children inherit none either.
    if !snapshot.memory_policies {
        return Ok(());
    }
    let leader = task.more.as_ref().and_then(|more| more.thread(task.pid));
    numa::enter(&task.name(), leader.and_then(|leader| leader.policy.as_ref()), &numa::Nodes::own()?)
}

/// Settings that are made from outside, in all threads.
///
/// Preconditions: the restorer has set policies and priorities; nothing of the program has run.
pub fn from_outside(snapshot: &Snapshot, area: &Area) -> Result<()> {
    if snapshot.alive().all(|(_, task)| task.more.is_none()) {
        return Ok(());
    }
    let mut binder = affinity::Binder::new()?;
    let own_ioprio = ioprio::dump(RealPid(nix::unistd::gettid().as_raw()))?.unwrap_or(0);
    for (_, task) in snapshot.alive() {
        let Some(more) = &task.more else { continue };
        for (i, virt) in task.threads.iter().enumerate() {
            let (tid, thread) = (area.real(*virt), more.thread(*virt));
            let core = task.thread_core(i).and_then(|core| core.thread_core.as_ref());
            (|| {
                binder.restore(tid, thread.and_then(|t| t.cpus.as_deref()))?;
                ioprio::restore(tid, thread.and_then(|t| t.ioprio), own_ioprio)?;
                core.map_or(Ok(()), |core| {
                    sched::restore_more(tid, core, thread.and_then(|t| t.sched.as_ref()))
                })
            })()
            .during(|| format!("thread {tid}"))
            .during(|| task.name())?;
        }
    }
    Ok(())
}
