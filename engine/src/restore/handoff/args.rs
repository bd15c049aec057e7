//! What the restorer is told, from the images.

use std::{collections::HashMap, os::fd::RawFd};

use prost::Message;
use rcriu_images::{ImageKind, pagemap::PageReader, pb};
use restorer::{
    BUILD, TaskArgs, ThreadArgs,
    args::{Creds, Filter, Late, MmMap, NONE, Segment, Setting, flag},
};

use super::{Arena, Leftovers, auxv, give, last_pid_file, same_file, securebits};
use crate::arch::{AltStack, Layout, Regs, SigFrame, XTILE_DATA, Xsave, tls_from_image};
use crate::error::{Context, Error, Result};
use crate::kernel::Kernel;
use crate::mm::keys;
use crate::procfs::{ProcDir, status::Status};
use crate::restore::{TaskCx, TaskImage, read::in_use};
use crate::task::{
    attributes, creds, lsm::Labels, misc, more::More, rlimits, rseq, sched, seccomp, sigaction, sigqueue,
    timers,
};

/// `CAP_SYS_RESOURCE`.
const CAP_SYS_RESOURCE: u64 = 1 << 24;

/// What is looked up once for all parts.
pub struct Facts<'a> {
    pub image: &'a TaskImage,
    pub vmas: &'a [pb::VmaEntry],
    pub pages: Option<PageReader>,
    /// Bytes of a signal frame at most.
    pub frame_len: u64,
    mm: &'a pb::MmEntry,
    layout: &'static Layout,
    own: Status,
    own_securebits: u32,
    exe: u32,
    last_pid: u32,
    uffd: u32,
    close: Vec<[u32; 2]>,
    late: Vec<Late>,
    kernel: &'a Kernel,
    seccomp: pb::SeccompEntry,
    attributes: attributes::Own,
    labels: &'a Labels,
    proc: u32,
    slot: u32,
}

impl<'a> Facts<'a> {
    pub fn collect(cx: &TaskCx<'a>, leftovers: Leftovers) -> Result<Facts<'a>> {
        let image = cx.image()?;
        let mm = image.mm.as_ref().ok_or_else(|| Error::bug("a living task without memory"))?;
        let me = ProcDir::own()?;
        let layout = Layout::host();
        let mut close: Vec<[u32; 2]> =
            leftovers.close.iter().map(|(a, b)| [a.unsigned_abs(), b.unsigned_abs()]).collect();
        let mut last_pid = NONE;
        if !cx.kernel.clone3_set_tid && image.threads.len() > 1 {
            last_pid = give(last_pid_file()?);
            close.push([last_pid; 2]);
        }
        // The kernel takes no new executable while the old one is mapped, which it stays if both are one.
        let same = same_file(&leftovers.exe, "/proc/self/exe")?;
        let exe = give(leftovers.exe);
        close.push([exe; 2]);
        let uffd = leftovers.uffd.map_or(NONE, |offer| give(offer.0));
        if uffd != NONE {
            close.push([uffd; 2]);
        }
        let mut cores = (0..image.threads.len()).filter_map(|i| image.thread_core(i)?.thread_core.as_ref());
        let seccomp = if cores.any(|t| t.seccomp_mode == Some(pb::SeccompMode::Filter as i32)) {
            cx.snapshot.dir.read_one(ImageKind::Seccomp, 0)?
        } else {
            pb::SeccompEntry::default()
        };
        let own = Status::read(&me)?;
        let leader = image.more.as_ref().and_then(|more| more.thread(image.pid));
        Ok(Facts {
            attributes: attributes::Own::read(own.cap_eff, leader)?,
            image,
            vmas: &mm.vmas,
            pages: PageReader::open(&cx.snapshot.dir, ImageKind::Pagemap, image.pid.0.unsigned_abs().into())?,
            frame_len: SigFrame::most(layout, image.in_use()) as u64,
            mm,
            layout,
            own,
            own_securebits: securebits()?,
            exe: if same { NONE } else { exe },
            last_pid,
            uffd,
            close,
            late: leftovers.late,
            kernel: cx.kernel,
            seccomp,
            labels: &cx.plan.labels,
            proc: cx.proc.map_or(NONE, RawFd::unsigned_abs),
            slot: cx.task.0,
        })
    }

    fn thread(&self, i: usize) -> Result<(&'a pb::ThreadCoreEntry, &'a pb::ThreadInfoX86)> {
        let core = self.image.thread_core(i);
        core.and_then(|c| Some((c.thread_core.as_ref()?, c.thread_info.as_ref()?)))
            .ok_or_else(|| Error::bug(format!("thread number {i} has no core")))
    }
}

impl Facts<'_> {
    /// The instructions at which the threads go on.
    pub fn ips(&self) -> impl Iterator<Item = u64> {
        (0..self.image.threads.len()).filter_map(|i| Some(self.thread(i).ok()?.1.gpregs.ip))
    }
}

/// Everything about the task as a whole; threads and what depends on addresses are left out.
pub fn fill(facts: &Facts<'_>, arena: &mut Arena) -> Result<TaskArgs> {
    let (tc, mm) = (&facts.image.tc, facts.mm);
    let limits = match &tc.rlimits {
        Some(wanted) => rlimits::restore(wanted, &rlimits::own()?, facts.own.cap_eff & CAP_SYS_RESOURCE != 0),
        None => Vec::new(),
    };
    let more = facts.image.more.as_ref();
    let mut head = TaskArgs {
        build: BUILD,
        pid: facts.image.pid.0,
        flags: flags(facts),
        space_end: crate::arch::TASK_SIZE,
        mm: mm_map(mm, facts.exe),
        auxv: arena.table(auxv(&mm.mm_saved_auxv)),
        close: arena.table(&facts.close),
        late: arena.table(&facts.late),
        personality: more
            .map_or_else(|| misc::restore_personality(tc.personality), |more| more.personality()),
        membarrier: tc.membarrier_registration_mask.unwrap_or(0),
        dumpable: mm.dumpable.map_or(NONE, i32::cast_unsigned),
        last_pid_fd: facts.last_pid,
        uffd: facts.uffd,
        proc: facts.proc,
        slot: facts.slot,
        actions: arena.table(&sigaction::restore(&tc.sigactions)?),
        limits: arena.table(&limits),
        queued: arena.table(&sigqueue::restore(tc.signals_s.as_ref())?),
        last: arena.table(&last(facts)),
        ..TaskArgs::default()
    };
    if let Some(entry) = &tc.timers {
        head.itimers = timers::restore_intervals(entry)?;
        head.timers = arena.table(&timers::restore_posix(entry, facts.kernel.timer_cr_ids)?);
    }
    Ok(head)
}

/// What the leader sets at the very end.
fn last(facts: &Facts<'_>) -> Vec<Setting> {
    let (image, more) = (facts.image, facts.image.more.as_ref());
    let mut calls = keys::settings(image.more.as_deref(), &facts.mm.vmas, &image.execute_only);
    calls.extend(more.map(More::last).unwrap_or_default());
    calls
}

fn flags(facts: &Facts<'_>) -> u32 {
    [
        (facts.kernel.clone3_set_tid, flag::CLONE3),
        (facts.kernel.timer_cr_ids, flag::TIMER_IDS),
        (facts.mm.thp_disabled.unwrap_or(false), flag::THP_DISABLED),
        // Whatever it was for the engine, which is what the task would have without late memory.
        (facts.uffd != NONE && !facts.mm.thp_disabled.unwrap_or(false), flag::THP_BACK),
        (facts.image.tc.child_subreaper.unwrap_or(false), flag::SUBREAPER),
    ]
    .iter()
    .filter(|(on, _)| *on)
    .fold(0, |flags, (_, bit)| flags | bit)
}

fn mm_map(mm: &pb::MmEntry, exe_fd: u32) -> MmMap {
    MmMap {
        start_code: mm.mm_start_code,
        end_code: mm.mm_end_code,
        start_data: mm.mm_start_data,
        end_data: mm.mm_end_data,
        start_brk: mm.mm_start_brk,
        brk: mm.mm_brk,
        start_stack: mm.mm_start_stack,
        arg_start: mm.mm_arg_start,
        arg_end: mm.mm_arg_end,
        env_start: mm.mm_env_start,
        env_end: mm.mm_env_end,
        auxv: 0,
        auxv_size: auxv(&mm.mm_saved_auxv).len() as u32 * 8,
        exe_fd,
    }
}

/// All threads, the leader first, and the tables that only they refer to.
pub fn threads(facts: &Facts<'_>, head: &mut TaskArgs, arena: &mut Arena) -> Result<Vec<ThreadArgs>> {
    let mut tables = Tables::default();
    let mut threads = Vec::with_capacity(facts.image.threads.len());
    for (i, tid) in facts.image.threads.iter().enumerate() {
        let row = thread(facts, i, &mut tables, arena).during(|| format!("thread {tid}"))?;
        threads.push(ThreadArgs { tid: tid.0, ..row });
    }
    head.creds = arena.table(&tables.creds);
    head.filters = arena.table(&tables.filters);
    Ok(threads)
}

fn thread(facts: &Facts<'_>, i: usize, tables: &mut Tables, arena: &mut Arena) -> Result<ThreadArgs> {
    let (core, info) = facts.thread(i)?;
    let mut filters = Vec::new();
    if let (Some(mode), Some(oldest)) = (core.seccomp_mode, core.seccomp_filter)
        && mode == pb::SeccompMode::Filter as i32
    {
        for at in seccomp::restore_chain(&facts.seccomp, oldest)? {
            filters.push(tables.filter(at, facts, arena)?);
        }
    }
    let (policy, priority, nice) = sched::restore(core);
    let regs = &info.gpregs;
    let settings = settings(facts, i, policy, arena)?;
    Ok(ThreadArgs {
        settings: arena.table(&settings),
        creds: tables.creds(core.creds.as_ref(), facts, arena)?,
        fs_base: regs.fs_base,
        gs_base: regs.gs_base,
        selectors: [regs.ds, regs.es, regs.fs, regs.gs].map(|s| s as u16),
        segments: arena.table(&segments(info)?),
        clear_tid: info.clear_tid_addr,
        robust: core.futex_rla,
        robust_len: core.futex_rla_len.into(),
        rseq: rseq::restore(core.rseq_entry.as_ref()),
        queued: arena.table(&sigqueue::restore(core.signals_p.as_ref())?),
        comm: comm(core.comm.as_deref().unwrap_or(&facts.image.tc.comm)),
        seccomp: core.seccomp_mode.unwrap_or(0).cast_unsigned(),
        policy,
        priority,
        nice,
        filters: arena.table(&filters),
        pdeath_sig: core.pdeath_sig.unwrap_or(0),
        tiles: u32::from(in_use(info) & XTILE_DATA != 0),
        ..ThreadArgs::default()
    })
}

/// What the thread sets for itself, the leader also for the process.
fn settings(facts: &Facts<'_>, i: usize, policy: u32, arena: &mut Arena) -> Result<Vec<Setting>> {
    // Images that do not tell leave what threads have from us.
    let Some(more) = &facts.image.more else { return Ok(Vec::new()) };
    let tid = facts.image.threads.get(i).copied().unwrap_or(facts.image.pid);
    let real_time = sched::is_real_time(policy);
    let words = |words: &[u64]| arena.table(words).offset;
    let mut settings = if i == 0 { more.for_process() } else { Vec::new() };
    settings.extend(attributes::restore(tid.0, more.thread(tid), &facts.attributes, real_time, words)?);
    Ok(settings)
}

/// What threads mostly have in common; each different one is stored once.
#[derive(Default)]
struct Tables {
    creds: Vec<Creds>,
    /// Encoded entry -> row.
    known_creds: HashMap<Vec<u8>, u32>,
    filters: Vec<Filter>,
    /// Position in seccomp.img -> row.
    known_filters: HashMap<u32, u32>,
}

impl Tables {
    fn creds(&mut self, entry: Option<&pb::CredsEntry>, facts: &Facts<'_>, arena: &mut Arena) -> Result<u32> {
        let entry = entry.ok_or_else(|| Error::image("the credentials are missing"))?;
        let key = entry.encode_to_vec();
        if let Some(row) = self.known_creds.get(&key) {
            return Ok(*row);
        }
        let creds = creds::restore(entry, &facts.own, facts.own_securebits)?;
        let row = self.creds.len() as u32;
        let label = facts.labels.of(entry)?;
        self.creds.push(Creds {
            groups: arena.table(&entry.groups),
            module: label.module,
            profile: arena.table(&label.profile),
            sockcreate: arena.table(&label.sockcreate),
            ..creds
        });
        self.known_creds.insert(key, row);
        Ok(row)
    }

    fn filter(&mut self, at: u32, facts: &Facts<'_>, arena: &mut Arena) -> Result<u32> {
        if let Some(row) = self.known_filters.get(&at) {
            return Ok(*row);
        }
        let filter = facts.seccomp.seccomp_filters.get(at as usize);
        let (code, flags) =
            seccomp::restore_filter(filter.ok_or_else(|| Error::bug("a filter out of its chain"))?)?;
        let row = self.filters.len() as u32;
        self.filters.push(Filter { code: arena.table(&code), flags });
        self.known_filters.insert(at, row);
        Ok(row)
    }
}

fn segments(info: &pb::ThreadInfoX86) -> Result<Vec<Segment>> {
    let mut segments = Vec::new();
    for entry in &info.tls {
        if let Some(d) = tls_from_image(entry)? {
            segments.push([d.entry_number, d.base_addr, d.limit, d.flags]);
        }
    }
    Ok(segments)
}

/// A command name as prctl(2) takes it: up to 15 bytes and a zero.
fn comm(name: &[u8]) -> [u8; 16] {
    let mut comm = [0; 16];
    for (to, from) in comm[..15].iter_mut().zip(name) {
        *to = *from;
    }
    comm
}

/// The frame at address `at` from which thread number `i` gets its registers.
pub fn frame(facts: &Facts<'_>, i: usize, at: u64) -> Result<Vec<u8>> {
    let (core, info) = facts.thread(i)?;
    let regs = Regs::from_image(&info.gpregs)?;
    let tid = facts.image.threads.get(i).copied().unwrap_or(facts.image.pid);
    let leftovers = facts.image.more.as_ref().map_or_else(Vec::new, |more| more.leftovers(tid));
    let xsave = Xsave::from_image(&info.fpregs, &leftovers, facts.layout)?;
    let mask = match (core.blk_sigset, i) {
        (Some(mask), _) => mask,
        (None, 0) => facts.image.tc.blk_sigset,
        (None, _) => return Err(Error::image("its mask of blocked signals is missing")),
    };
    let altstack = core.sas.as_ref().map(|s| AltStack { sp: s.ss_sp, flags: s.ss_flags, size: s.ss_size });
    Ok(SigFrame::build(at, &regs, &xsave, facts.layout, mask, altstack)?.bytes)
}
