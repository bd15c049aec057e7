//! `core-TID.img`: registers and settings of each thread; the leader's also holds those of the task.

use parasite::thread::ThreadInfo;
use rcriu_images::{ImageKind, pb};

use super::{
    DumpCx,
    collect::Task,
    finish::one,
    task::{Asked, Signals},
};
use crate::{
    arch::{self, Interrupted, Layout, TLS_ENTRIES},
    error::{Context, Error, Result},
    infect::{StoppedTask, StoppedThread},
    ns::user::Ids,
    procfs::{ProcDir, status::Status},
    pstree::{RealPid, TaskState, VirtPid},
    spread,
    sys::{
        ptrace::{self, UserDesc},
        robust_list,
        sched::Attr,
    },
    task::{
        creds, lsm, misc, rlimits, rseq, sched,
        seccomp::{Mode, ThreadSeccomp},
        stop::News,
    },
};

/// What is known of the threads from outside, in their order.
pub(super) struct Seen<'a> {
    pub statuses: &'a [Status],
    pub attributes: &'a [Attr],
    /// Numbers of their sets of control groups.
    pub groups: &'a [u32],
}

/// All that is known of one thread.
struct ThreadState<'a> {
    thread: &'a StoppedThread,
    virt: VirtPid,
    status: &'a Status,
    attributes: &'a Attr,
    group: u32,
    ids: &'a Ids,
    info: &'a ThreadInfo,
    label: lsm::Seen,
    /// Descriptors for thread-local storage, if one is set.
    tls: Option<Vec<UserDesc>>,
    pending: &'a pb::SignalQueueEntry,
    seccomp: ThreadSeccomp,
}

/// Writes the cores of all threads of `task`; `asked.threads` is in their order too.
pub(super) fn dump(
    task: &Task,
    stopped: &StoppedTask,
    Seen { statuses, attributes, groups }: Seen<'_>,
    asked: Asked,
    signals: Signals,
    cx: &mut DumpCx<'_>,
) -> Result<()> {
    let modes = stopped
        .threads()
        .iter()
        .zip(statuses)
        .map(|(thread, status)| Ok((thread.tid(), Mode::from_status(status.seccomp)?)))
        .collect::<Result<Vec<_>>>()?;
    let seccomp = cx.seccomp.task(&modes)?;
    let labels = cx.labels.of(stopped.threads().iter().map(StoppedThread::tid))?;
    let ids = cx.ids.clone();
    let mut tc = Some(task_core(task, &asked, signals.shared, signals.stop, &ids)?);
    if let Some(status) = task.leader_gone {
        let mut core = ended_leader(task, status, asked.syscall, stopped, cx)?;
        core.tc = tc.take().map(|tc| pb::TaskCoreEntry { blk_sigset: u64::MAX, ..tc });
        one(cx.images, ImageKind::Core, task.virt.0.cast_unsigned().into(), &core)?;
    }
    // A leader that has ended is not among those that stand still.
    let virts = task.threads.iter().skip(usize::from(task.leader_gone.is_some()));
    let states: Vec<ThreadState<'_>> = (0..)
        .zip(stopped.threads().iter().zip(virts).zip(labels))
        .map(|(at, ((thread, (virt, _)), label)): (usize, _)| {
            let info = &asked.threads[at];
            let any = info.tls != 0;
            Ok(ThreadState {
                thread,
                virt: *virt,
                status: &statuses[at],
                attributes: &attributes[at],
                group: groups[at],
                ids: &ids,
                info,
                label,
                // The tracer's thread alone may ask.
                tls: any.then(|| TLS_ENTRIES.map(|n| tls(thread.tid(), n)).collect()).transpose()?,
                pending: &signals.private[at],
                seccomp: seccomp[at],
            })
        })
        .collect::<Result<_>>()?;
    let (layout, images) = (cx.layout, cx.images);
    spread::map(&states, |state| {
        let tid = state.thread.tid();
        let mut core = thread_core(state, layout).during(|| format!("thread {tid}"))?;
        if tid == task.pid {
            core.tc = tc.clone().map(|tc| pb::TaskCoreEntry { blk_sigset: state.thread.sigmask(), ..tc });
        } else if let Some(part) = &mut core.thread_core {
            part.blk_sigset = Some(state.thread.sigmask());
        }
        one(images, ImageKind::Core, state.virt.0.cast_unsigned().into(), &core)
    })
    .map(drop)
}

/// What all threads have in common.
fn task_core(
    task: &Task,
    asked: &Asked,
    signals: pb::SignalQueueEntry,
    stop_pending: bool,
    ids: &Ids,
) -> Result<pb::TaskCoreEntry> {
    let info = &asked.task;
    let stop_signal = task.stop_signal.or(stop_pending.then_some(libc::SIGSTOP));
    let state = if stop_signal.is_some() { TaskState::Stopped } else { task.state };
    Ok(pb::TaskCoreEntry {
        task_state: state.to_image(),
        exit_code: News::of(task.stop_signal, task.stat.exit_code).to_image(),
        personality: misc::personality(&task.dir)?,
        flags: task.stat.flags,
        comm: task.stat.comm.clone(),
        timers: Some(asked.timers.clone()),
        rlimits: Some(rlimits::dump(&task.dir)?),
        signals_s: Some(signals),
        loginuid: misc::loginuid(&task.dir)?.map(|uid| ids.user(uid)),
        oom_score_adj: misc::oom_score_adj(&task.dir)?,
        sigactions: asked.sigactions.clone(),
        child_subreaper: Some(info.child_subreaper > 0),
        stop_signo: stop_signal.map(i32::cast_unsigned),
        membarrier_registration_mask: u32::try_from(info.membarrier).ok().filter(|mask| *mask != 0),
        ..pb::TaskCoreEntry::default()
    })
}

fn thread_core(state: &ThreadState<'_>, layout: &Layout) -> Result<pb::CoreEntry> {
    let ThreadState { thread, status, attributes, group, ids, info, label, tls, pending, seccomp, .. } =
        state;
    let tid = thread.tid();
    let (regs, call) = thread.image_regs()?;
    if call == Interrupted::Unknown {
        log::warn!("Will restore {tid} with interrupted system call");
    }
    // What is left over stands in rcriu-tasks.img.
    let (fpregs, _) = thread.xsave().to_image(layout)?;
    let tls = (0..).zip(TLS_ENTRIES).map(|(at, n)| {
        let own = tls.as_ref().and_then(|own| own.get(at));
        arch::tls_to_image(own.unwrap_or(&empty_tls(n)))
    });
    let (futex_rla, futex_rla_len) = match robust_list::get(tid) {
        Err(e) if e.errno() == Some(libc::ENOSYS) => (0, 0),
        other => other?,
    };
    let scheduling = sched::dump(tid, attributes)?;
    let mut creds = creds::dump(status, u32::try_from(info.securebits).unwrap_or(0), ids)?;
    label.clone().into_entry(&mut creds);
    if info.clear_tid == u64::MAX {
        log::warn!("This kernel does not tell the clear_child_tid address of {tid}");
    }
    Ok(pb::CoreEntry {
        mtype: pb::core_entry::March::X8664 as i32,
        thread_info: Some(pb::ThreadInfoX86 {
            clear_tid_addr: if info.clear_tid == u64::MAX { 0 } else { info.clear_tid },
            gpregs: regs.to_image(),
            fpregs,
            tls: tls.collect(),
        }),
        thread_core: Some(pb::ThreadCoreEntry {
            futex_rla,
            futex_rla_len: futex_rla_len as u32,
            sched_nice: Some(scheduling.nice),
            sched_policy: Some(scheduling.policy),
            sched_prio: scheduling.priority,
            blk_sigset: None,
            sas: Some(pb::ThreadSasEntry {
                ss_sp: info.altstack_sp,
                ss_size: info.altstack_size,
                ss_flags: info.altstack_flags as u32,
            }),
            pdeath_sig: u32::try_from(info.pdeath_sig).ok().filter(|signal| *signal != 0),
            signals_p: Some((*pending).clone()),
            creds: Some(creds),
            seccomp_mode: seccomp.mode,
            seccomp_filter: seccomp.filter,
            comm: Some(info.name.iter().copied().take_while(|c| *c != 0).collect()),
            rseq_entry: Some(rseq::dump(thread)?),
            cg_set: Some(*group),
            ..pb::ThreadCoreEntry::default()
        }),
        ..pb::CoreEntry::default()
    })
}

/// Core of a leader that has ended while other threads live. The format has no such thing, so it is described
/// as a thread about to end: all signals blocked, at an instruction that makes it call exit(2).
fn ended_leader(
    task: &Task,
    status: i32,
    syscall: u64,
    stopped: &StoppedTask,
    cx: &mut DumpCx<'_>,
) -> Result<pb::CoreEntry> {
    let dir = ProcDir::open(task.pid)?;
    let other = stopped.threads().first().ok_or_else(|| Error::bug("a task without threads"))?;
    let code = (status >> 8 & 0xff).cast_unsigned().into();
    let regs = arch::Regs { cs: other.regs().cs, ss: other.regs().ss, ..arch::Regs::default() };
    let regs = regs.for_syscall(syscall, libc::SYS_exit.cast_unsigned(), [code, 0, 0, 0, 0, 0]);
    // Any valid state will do.
    let (fpregs, _) = other.xsave().to_image(cx.layout)?;
    let mut creds = creds::dump(&Status::read(&dir)?, 0, &cx.ids)?;
    // One that has ended tells its label no more.
    let labels = cx.labels.of([other.tid()])?;
    labels.into_iter().for_each(|label| label.into_entry(&mut creds));
    Ok(pb::CoreEntry {
        mtype: pb::core_entry::March::X8664 as i32,
        thread_info: Some(pb::ThreadInfoX86 {
            clear_tid_addr: 0,
            gpregs: regs.to_image(),
            fpregs,
            tls: TLS_ENTRIES.map(|n| arch::tls_to_image(&empty_tls(n))).collect(),
        }),
        thread_core: Some(pb::ThreadCoreEntry {
            sched_nice: Some(0),
            sched_policy: Some(0),
            sas: Some(pb::ThreadSasEntry {
                ss_flags: libc::SS_DISABLE.cast_unsigned(),
                ..Default::default()
            }),
            signals_p: Some(pb::SignalQueueEntry::default()),
            creds: Some(creds),
            comm: Some(task.stat.comm.clone()),
            rseq_entry: cx.kernel.get_rseq_conf.then(pb::RseqEntry::default),
            cg_set: Some(cx.cgroups.of(&task.dir)?),
            ..pb::ThreadCoreEntry::default()
        }),
        ..pb::CoreEntry::default()
    })
}

/// A descriptor of thread-local storage; empty where the kernel runs no 32-bit programs.
fn tls(tid: RealPid, number: u32) -> Result<UserDesc> {
    match ptrace::get_thread_area(tid, number) {
        Err(e) if matches!(e.errno(), Some(libc::EIO | libc::EINVAL)) => Ok(empty_tls(number)),
        other => other,
    }
}

fn empty_tls(number: u32) -> UserDesc {
    // read_exec_only and seg_not_present.
    UserDesc { entry_number: number, flags: 1 << 3 | 1 << 5, ..UserDesc::default() }
}
