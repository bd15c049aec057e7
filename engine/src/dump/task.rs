//! One task: everything it has, in an order that leaves it infected for as short as possible.

use std::os::fd::OwnedFd;

use nix::fcntl::OFlag;
use parasite::{task::TaskInfo, thread::ThreadInfo};
use rcriu_images::{ImageKind, pagemap::PAGE_SIZE, pb};

use super::{
    DumpCx,
    background::Kept,
    collect::{Pstree, Task},
    core,
    finish::one,
    later::{self, Pages},
    listed::{self, Begun, Listed},
    mapped::space,
    refuse,
    seize::Frozen,
    told::Told,
};
use crate::{
    error::{Context, Error, Result},
    files::PathUse,
    infect::{self, Infected, Question, StoppedTask},
    mm::{
        aio::Rings,
        more,
        pagemap::{Scanner, Walk},
        pages::{Copier, Written},
        track::TaskTrack,
        vma::{self, Vma},
    },
    procfs::{
        ProcDir,
        maps::{self, Listing, Map},
        stat::Stat,
        status::Status,
        timers,
    },
    pstree::FileId,
    sys::sched::{self, Attr},
    task::{fs, misc, more::Seen, numa, sigaction, sigqueue},
};

/// What is asked from inside.
pub(super) struct Asked {
    pub task: TaskInfo,
    pub threads: Vec<ThreadInfo>,
    pub sigactions: Vec<pb::SaEntry>,
    pub timers: pb::TaskTimersEntry,
    /// Address of a `syscall` instruction in the task.
    pub syscall: u64,
    /// Memory policies of mappings, by their start.
    pub policies: Vec<(u64, pb::RcriuPolicyEntry)>,
    /// `MCL_FUTURE` and `MCL_ONFAULT` of mlockall(2).
    pub lock_future: u32,
    session: Option<pb::RcriuSession>,
}

/// Dumps the task at position `at` of the tree. One that has ended has only what [`super::finish`] writes.
pub(super) fn dump<'a>(
    tree: &'a Pstree,
    at: usize,
    told: Told,
    frozen: &mut Frozen,
    cx: &mut DumpCx<'_>,
    later: &mut dyn FnMut(Pages<'a>) -> Result<()>,
) -> Result<()> {
    let task = &tree.tasks[at];
    if !task.state.is_alive() {
        return Ok(());
    }
    log::info!("========================================");
    log::info!("Dumping task (pid: {} comm: {})", task.pid, task.stat.comm.escape_ascii());
    log::info!("========================================");
    let hold = frozen.task_mut(task.pid)?;
    let stopped = hold.stopped.as_ref().ok_or_else(|| Error::bug("a living task is not stopped"))?;
    // Who shares its memory with others cannot be followed alone.
    let alone = tree.tasks.iter().filter(|t| t.ids.vm_id == task.ids.vm_id).nth(1).is_none();
    whole(task, stopped, told, alone, cx, later).during(|| refuse::name(task.pid))
}

fn whole<'a>(
    task: &'a Task,
    stopped: &StoppedTask,
    told: Told,
    alone: bool,
    cx: &mut DumpCx<'_>,
    later: &mut dyn FnMut(Pages<'a>) -> Result<()>,
) -> Result<()> {
    let dir = &task.dir;
    // Mappings, status and signals are read before anything of ours is in the task.
    let (protected, Listed { maps, vmas, walk, begun }) =
        match cx.background.protected(task.pid).filter(|_| alone) {
            Some(protected) => {
                let (protected, maps) = protected.settled(stopped, dir)?;
                let vmas = listed::known(task, &maps, cx)?;
                (protected, Listed { maps, vmas, walk: None, begun: None })
            }
            None => {
                let listing = told.maps.unwrap_or_else(|| Listing::open(dir))?;
                (None, listed::take(task, stopped, listing, cx)?)
            }
        };
    let (statuses, groups): (Vec<Status>, Vec<_>) = told.threads?.into_iter().unzip();
    let groups: Vec<u32> =
        groups.iter().map(|content| cx.cgroups.of_content(dir, content)).collect::<Result<_>>()?;
    let signals = signals(stopped, &statuses)?;
    let start = match task.leader_gone {
        // Of the leader, which keeps it even when it has ended.
        Some(_) => Stat::read(&ProcDir::open(task.pid)?)?.start_time,
        None => task.stat.start_time,
    };
    let mut track = cx.track.task((task.pid, task.virt), start, dir, &maps)?;
    cx.uprobes |= maps.iter().any(|m| m.name == b"[uprobes]");
    let mut mapping = more::collect(&maps);
    cx.shmem.mapped(&vmas);
    cx.segments.mapped(space(task), &vmas);
    cx.undo.warn(task.pid, stopped.threads().len());
    let apart = protected.is_none() && walk.is_none() && begun.is_none() && later::suits(cx, &maps);
    // That walks all page tables, which can wait.
    let mut vmas = match protected.is_some() || apart {
        true => vmas,
        false => with_guards(vmas, walk.as_ref(), dir, cx)?,
    };
    let rings = Rings::look(dir.pid(), &vmas)?;

    let attributes: Vec<Attr> =
        stopped.threads().iter().map(|t| sched::attributes(t.tid())).collect::<Result<_>>()?;
    let status = statuses.first().ok_or_else(|| Error::bug("a task without threads"))?;
    let mut question = Question {
        status,
        start_stack: task.stat.start_stack,
        inspect: cx.landlock.target(status)?,
        session: cx.keys.may_have_session(status),
        addresses: more::starts(&vmas),
        hints: &mut cx.hints,
    };
    let infected = Infected::asking(stopped, cx.kernel, &mut question)?;
    let mut asked = ask(task, &infected, &vmas, &statuses, &mut track, cx)?;
    super::rings::number(&mut vmas, dir, &cx.files)?;
    super::rings::registered(&infected, &vmas, &cx.files)?;
    // Its memory as it is now, to be read when the task runs again.
    let adopts = asked.task.child_subreaper > 0;
    let copy = match protected {
        Some(_) => None,
        None => cx.background.copy(&infected, &maps, &statuses, adopts, cx.kernel)?,
    };
    more::add_policies(&mut mapping, &vmas, asked.policies.iter().cloned());
    cx.more.task(Seen {
        pid: task.virt,
        numbering: &cx.numbering,
        dir,
        stat: &task.stat,
        stopped,
        statuses: &statuses,
        info: &asked.task,
        threads: &asked.threads,
        attributes: &attributes,
        lock_future: asked.lock_future,
        session: asked.session.take(),
        mapping,
    })?;

    match copy {
        Some(copy) => cx.background.push(copy, task.virt, &vmas, stacks(stopped)),
        None if protected.is_some() || apart => {}
        None => pages(task, &infected, &vmas, (walk, begun), &track, cx)?,
    }
    infected.cure()?;
    rings.check_still()?;
    track.look(&vmas);
    cx.track.keep(track);
    let mut entry = mm(task, &asked.task, &rings, cx)?;
    if let Some(protected) = protected {
        let policies = std::mem::take(&mut asked.policies);
        let stacks = stacks(stopped);
        cx.background.hold(protected, Kept { task: task.virt, maps, vmas, stacks, policies, mm: entry });
    } else if apart {
        later(Pages { task, vmas, stacks: stacks(stopped), mm: entry })?;
    } else {
        entry.vmas = vmas.into_iter().map(|v| v.entry).collect();
        one(cx.images, ImageKind::Mm, id(task), &entry)?;
    }
    let file = |fd, what| cx.files.path_file(task.dir.pid(), fd, what);
    folders(task, &statuses[0], cx.images, file)?;
    one(cx.images, ImageKind::Ids, id(task), &task.ids)?;
    let seen = core::Seen { statuses: &statuses, attributes: &attributes, groups: &groups };
    core::dump(task, stopped, seen, asked, signals, cx)
}

/// All mappings with their flags, now that nothing of ours is left in the task.
pub(super) fn whole_maps(stopped: &StoppedTask, dir: &ProcDir) -> Result<Vec<Map>> {
    let maps = maps::smaps(dir)?;
    if infect::remove_leftover(stopped, &maps)? { maps::smaps(dir) } else { Ok(maps) }
}

pub(super) fn id(task: &Task) -> u64 {
    task.virt.0.cast_unsigned().into()
}

/// Signals pending for the task, and for each thread alone.
pub(super) struct Signals {
    pub shared: pb::SignalQueueEntry,
    pub private: Vec<pb::SignalQueueEntry>,
    /// SIGSTOP was among them, and was taken out.
    pub stop: bool,
}

fn signals(stopped: &StoppedTask, statuses: &[Status]) -> Result<Signals> {
    let mut private = Vec::with_capacity(statuses.len());
    for (thread, status) in stopped.threads().iter().zip(statuses) {
        private.push(sigqueue::dump(thread.tid(), false, status.sig_pending)?);
    }
    let leader = stopped.threads().first().ok_or_else(|| Error::bug("a task without threads"))?;
    let mut shared = sigqueue::dump(leader.tid(), true, statuses.first().map_or(0, |s| s.shared_pending))?;
    let stop =
        private.iter_mut().fold(sigqueue::take_stop(&mut shared), |stop, q| sigqueue::take_stop(q) || stop);
    Ok(Signals { shared, private, stop })
}

/// Asks the task itself what nobody else can tell, and takes its descriptors.
fn ask(
    task: &Task,
    infected: &Infected<'_>,
    vmas: &[Vma],
    statuses: &[Status],
    track: &mut TaskTrack,
    cx: &mut DumpCx<'_>,
) -> Result<Asked> {
    let timers = timers::read(&task.dir)?;
    let stopped = infected.task();
    let info = infected.task_info()?;
    cx.refusals.process(&info)?;
    let mut asked = Vec::with_capacity(stopped.threads().len());
    for (thread, status) in stopped.threads().iter().zip(statuses) {
        cx.refusals.thread(thread.tid(), status)?;
        let (inspect, session) = (cx.landlock.target(status)?, cx.keys.may_have_session(status));
        asked.push(infect::Asked { thread, inspect, session });
    }
    let threads = infected.threads_info(&asked)?;
    let mut session = None;
    for ((thread, status), info) in stopped.threads().iter().zip(statuses).zip(&threads) {
        cx.landlock.check(infected, thread, status, info)?;
        let joined = cx.keys.check(infected, thread, info)?;
        if thread.tid() == task.dir.pid() {
            session = joined;
        }
    }
    let sigactions = infected.sigactions()?;
    let intervals = infected.itimers()?;
    let ids: Vec<i32> = timers.iter().map(|t| t.id.cast_signed()).collect();
    let left = infected.posix_timers(&ids)?;
    let (pid, pidfd) = (task.dir.pid(), infected.pidfd()?);
    let whose = (pid, &task.ids, &task.stat);
    cx.files.task_fds(whose, &task.dir, pidfd, &mut |fd| infected.take_fd(fd))?;
    // After its descriptors were listed: this takes one for a moment.
    cx.track.enter(track, infected);
    let policies = infected.policies(&more::starts(vmas))?.into_iter();
    let policies = policies.filter_map(|(at, mode, nodes)| Some((at, numa::dump(mode, &nodes)?))).collect();
    let lock_future = more::lock_future(&info, &task.dir, infected.range().start)?;
    let syscall = infected.syscall_instruction();
    Ok(Asked {
        task: info,
        threads,
        sigactions: sigaction::dump(&sigactions),
        timers: crate::task::timers::dump(intervals, &timers, &left, &cx.numbering)?,
        syscall,
        policies,
        lock_future,
        session,
    })
}

/// Ranges of guard pages follow the mappings, as entries of their own.
fn with_guards(mut vmas: Vec<Vma>, walk: Option<&Walk>, dir: &ProcDir, cx: &DumpCx<'_>) -> Result<Vec<Vma>> {
    let Some(walk) = walk else { return later::with_guards(vmas, dir, cx.kernel) };
    vmas.extend(walk.guards.iter().map(|(start, end)| vma::guard(*start, *end)));
    Ok(vmas)
}

/// Pages that stack pointers point to, in order.
pub(super) fn stacks(stopped: &StoppedTask) -> Vec<u64> {
    let mut stacks: Vec<u64> = stopped.threads().iter().map(|t| t.regs().rsp & !0xfff).collect();
    stacks.sort_unstable();
    stacks.dedup();
    stacks
}

/// `pagemap-PID.img` and its pages.
fn pages(
    task: &Task,
    infected: &Infected<'_>,
    vmas: &[Vma],
    (walk, begun): (Option<Walk>, Option<Begun>),
    track: &TaskTrack,
    cx: &mut DumpCx<'_>,
) -> Result<()> {
    log::info!("Dumping pages (pid: {})", task.pid);
    cx.stats.memdump.start();
    let stacks = stacks(infected.task());
    // What is below was copied already.
    let (mut out, upto) = match begun {
        Some(Begun { out, upto, took }) => {
            cx.stats.memdump.add(took);
            (out, upto)
        }
        None => (cx.pages.create(ImageKind::Pagemap, id(task))?, 0),
    };
    let copier = Copier::new(&task.dir, &mut out, &stacks)?;
    let mut copier = copier.with(infected).serving(cx.late.is_some());
    let mut scanner = Scanner::new(&task.dir, cx.kernel)?.knowing(walk);
    let scanned = scanner.pages(vmas, track.marks(), |vma, start, end, unchanged| {
        let start = start.max(upto);
        if !unchanged {
            return if start < end { copier.add(vma, start, end) } else { Ok(()) };
        }
        track.split(
            start,
            end,
            |from, to, stored| {
                if stored { copier.parent(from, to) } else { copier.add(vma, from, to) }
            },
        )
    })?;
    copier.flush()?;
    let served = copier.served();
    if let Some(late) = &mut cx.late {
        cx.stats.pages_lazy += served.iter().map(|(start, end)| (end - start) / PAGE_SIZE).sum::<u64>();
        late.add(id(task), &task.dir, served)?;
    }
    let Written { written, in_parent } = out.finish()?;
    cx.stats.memdump.stop();
    cx.stats.pages_scanned += scanned;
    cx.stats.pages_written += written;
    cx.stats.pages_skipped_parent += in_parent;
    log::info!("Dumped {written} pages of {}, {in_parent} are in the parent images", task.pid);
    Ok(())
}

/// `mm-PID.img`, without mappings.
fn mm(task: &Task, info: &TaskInfo, rings: &Rings, cx: &mut DumpCx<'_>) -> Result<pb::MmEntry> {
    let exe = task.dir.file("exe", OFlag::O_PATH)?;
    let exe = cx.files.path_file(task.dir.pid(), exe, PathUse::Exe).during(|| "executable".into())?;
    let Stat { start_code, end_code, start_data, end_data, start_stack, start_brk, .. } = task.stat;
    let Stat { arg_start, arg_end, env_start, env_end, .. } = task.stat;
    Ok(pb::MmEntry {
        mm_start_code: start_code,
        mm_end_code: end_code,
        mm_start_data: start_data,
        mm_end_data: end_data,
        mm_start_stack: start_stack,
        mm_start_brk: start_brk,
        mm_brk: info.brk,
        mm_arg_start: arg_start,
        mm_arg_end: arg_end,
        mm_env_start: env_start,
        mm_env_end: env_end,
        exe_file_id: exe.0,
        mm_saved_auxv: misc::auxv(&task.dir)?,
        vmas: Vec::new(),
        dumpable: i32::try_from(info.dumpable).ok().filter(|d| *d >= 0),
        aios: rings.entries(),
        thp_disabled: Some(info.thp_disabled > 0),
    })
}

/// `fs-PID.img`.
fn folders(
    task: &Task,
    status: &Status,
    images: &rcriu_images::ImageDir,
    mut file: impl FnMut(OwnedFd, PathUse) -> Result<FileId>,
) -> Result<()> {
    let mut uses = [PathUse::Cwd, PathUse::Root].into_iter();
    fs::dump(images, task.virt, &task.dir, status.umask, |fd| file(fd, uses.next().unwrap_or(PathUse::Root)))
}
