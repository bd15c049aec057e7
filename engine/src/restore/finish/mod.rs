//! The end of a restore: every thread is caught on the last step of its restorer, the restorer's memory goes
//! away, and all are let go.
//!
//! A thread's last step is `rt_sigreturn`. At the exit stop of that call it has its own registers, mask and
//! memory and has not run an instruction of its program yet: whatever still has to be done with the restorer's
//! memory is done from outside, in one thread of each task.

mod caught;
mod guardian;
mod stopped;

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use rcriu_images::pb;

use caught::{Caught, regs, strange};
use guardian::Guardian;
use stopped::Stopped;

use crate::error::{Context, Error, Kind, Result};
use crate::faults;
use crate::interrupt;
use crate::pstree::{RealPid, TaskState};
use crate::restore::read::{Snapshot, TaskImage, TaskIx};
use crate::restore::stages::Area;
use crate::sys::ptrace;
use crate::sys::vm::MemFile;
use crate::sys::wait::{self, Status};
use crate::task::cgroup::{self, Groups};
use crate::task::stop::News;
use crate::task::{dispatch, more, sigqueue};

/// Offset of `rseq_cs` in `struct rseq`.
const RSEQ_CS: u64 = 8;

/// How long one thread is waited for while nothing happens, before all are looked at again.
const LOOK: Duration = Duration::from_millis(2);
/// The same while threads move.
const NAP: Duration = Duration::from_micros(500);

/// A thread we trace.
#[derive(Clone, Copy, Debug)]
struct Thread {
    tid: RealPid,
    task: TaskIx,
    /// Number among the task's threads.
    at: usize,
}

/// All threads of the restored tree, attached. Dropping it detaches nobody: the guard kills them.
#[derive(Debug)]
pub struct Attached<'a> {
    snapshot: &'a Snapshot,
    area: &'a Area,
    threads: Vec<Thread>,
}

impl<'a> Attached<'a> {
    /// Attaches to the leader of every living task: should this process be killed from here on, the kernel kills
    /// them. Seccomp sleeps in them for as long as they are attached.
    ///
    /// Precondition: all tasks are forked, and none will get a signal before it is caught: each would stop.
    pub fn leaders(snapshot: &'a Snapshot, area: &'a Area) -> Result<Self> {
        let mut attached = Attached { snapshot, area, threads: Vec::new() };
        attached.attach(|at| at == 0)?;
        Ok(attached)
    }

    /// Attaches to all other threads.
    ///
    /// Precondition: all threads exist and wait, and none has got its filters yet.
    pub fn others(&mut self) -> Result<()> {
        self.attach(|at| at > 0)?;
        self.threads.sort_by_key(|t| (t.task, t.at));
        Ok(())
    }

    fn attach(&mut self, which: impl Fn(usize) -> bool) -> Result<()> {
        for (task, image) in self.snapshot.alive() {
            let options = options(image) | ptrace::O_EXITKILL;
            for (at, tid) in image.threads.iter().enumerate().filter(|(at, _)| which(*at)) {
                let tid = self.area.real(*tid);
                ptrace::seize(tid, options).during(|| format!("thread {tid}")).during(|| image.name())?;
                self.threads.push(Thread { tid, task, at });
            }
        }
        Ok(())
    }

    /// Puts threads into the control groups in which they were apart from their leader.
    pub fn enter_groups(&self, groups: &Groups) -> Result<()> {
        for thread in self.threads.iter().filter(|t| t.at > 0) {
            let Some(image) = self.snapshot.get(thread.task) else { continue };
            let (leader, own) =
                (cgroup::set_of(&image.core), image.thread_core(thread.at).and_then(cgroup::set_of));
            if let Some((leader, own)) = leader.zip(own) {
                groups.enter_thread(thread.tid, leader, own).during(|| self.name(*thread))?;
            }
        }
        Ok(())
    }

    /// Gives threads what can be given from outside: CPUs, I/O priority, what sched_setattr(2) sets.
    ///
    /// Precondition: the restorer has set policies and priorities.
    pub fn schedule(&self) -> Result<()> {
        more::from_outside(self.snapshot, self.area)
    }

    /// Stops every thread where it waits and lets it go on to its next system call.
    ///
    /// Precondition: all wait for the last stage to open. Afterwards they stop at each call.
    pub fn step_by_calls(&self) -> Result<()> {
        for thread in &self.threads {
            ptrace::interrupt(thread.tid)?;
        }
        self.each_stop(|thread, status| match status {
            Status::EventStop(_) => ptrace::syscall(thread.tid, 0).map(|()| true),
            other => Err(strange(other)),
        })
    }

    /// Waits until every thread stands at the exit of its `rt_sigreturn`.
    ///
    /// Precondition: the last stage is open.
    pub fn catch(&self) -> Result<()> {
        let mut entered: HashSet<RealPid> = HashSet::new();
        self.each_stop(|thread, status| {
            match status {
                Status::Syscall if entered.contains(&thread.tid) => return Ok(true),
                Status::Syscall => {
                    if regs(thread.tid)?.orig_rax == libc::SYS_rt_sigreturn as u64 {
                        entered.insert(thread.tid);
                    }
                }
                Status::EventStop(_) => {}
                // Somebody's signal, which the restorer does not block. Blocked when the stop ends it goes back
                // into the queue, and the thread gets it with its own mask.
                Status::Signal(signal) => {
                    ptrace::set_sigmask(thread.tid, caught::ALL_BLOCKED)?;
                    return ptrace::syscall(thread.tid, signal).map(|()| false);
                }
                other => return Err(strange(other)),
            }
            ptrace::syscall(thread.tid, 0).map(|()| false)
        })
    }

    /// Calls `f` for each stop of each thread until it says that it is done with the thread.
    ///
    /// Threads may wait for each other, so none is waited for alone for long. Cost: as many polls as threads for each
    /// round, and a round takes place when the first of them has moved.
    fn each_stop(&self, mut f: impl FnMut(Thread, Status) -> Result<bool>) -> Result<()> {
        let mut open: Vec<Thread> = self.threads.clone();
        while !open.is_empty() {
            let mut moved = false;
            let mut rest = Vec::with_capacity(open.len());
            for thread in open {
                let done = match wait::poll(thread.tid).and_then(|s| self.alive(thread, s))? {
                    None => false,
                    Some(status) => {
                        moved = true;
                        f(thread, status).during(|| self.name(thread))?
                    }
                };
                if !done {
                    rest.push(thread);
                }
            }
            open = rest;
            let Some(first) = open.first().copied() else { break };
            if !moved {
                interrupt::check()?;
                if self.area.failed() {
                    return Err(self.area.failure());
                }
            }
            // While one moves many do: so a round finds many stops, and not all are polled for each.
            let soon = Instant::now() + if moved { NAP } else { LOOK };
            if let Some(status) = wait::until(first.tid, soon).and_then(|s| self.alive(first, s))?
                && f(first, status).during(|| self.name(first))?
            {
                open.swap_remove(0);
            }
        }
        Ok(())
    }

    /// A thread that has ended is an error of its own, and why may stand in the shared area.
    fn alive(&self, thread: Thread, status: Option<Status>) -> Result<Option<Status>> {
        match status {
            Some(status) if status.is_end() => {
                if self.area.failed() {
                    return Err(self.area.failure());
                }
                Err(Error::host(format!("it ended unexpectedly: {status:?}")).during(self.name(thread)))
            }
            other => Ok(other),
        }
    }

    fn name(&self, thread: Thread) -> String {
        let task = self.snapshot.get(thread.task).map_or_else(String::new, TaskImage::name);
        format!("{task}, thread {}", thread.tid)
    }

    /// Does what has to be done in each task from outside, and stops those that were stopped.
    ///
    /// Precondition: all threads are caught. Afterwards nothing of the restorer is left.
    pub fn clean(&mut self, leave_stopped: bool) -> Result<()> {
        let stops =
            |image: &TaskImage| image.state == TaskState::Stopped || queues(image).any(sigqueue::stops);
        if !leave_stopped && !self.snapshot.alive().any(|(_, image)| stops(image)) {
            return self.clean_together();
        }
        // Threads of a task stand together; tasks come after their parents, so from the back children are
        // done first: their parents are still caught when they stop.
        let threads = std::mem::take(&mut self.threads);
        let mut kept = Vec::with_capacity(threads.len());
        let mut news: HashMap<TaskIx, Vec<Stopped>> = HashMap::new();
        for group in threads.chunk_by(|a, b| a.task == b.task).rev() {
            let Some((leader, image)) = group.first().zip(self.snapshot.get(group[0].task)) else { continue };
            let mut caught =
                Caught::new(leader.tid, self.area.slot(leader.task)?).during(|| self.name(*leader))?;
            let mut clean = |caught: &mut Caught| {
                let children = news.remove(&leader.task).unwrap_or_default();
                stopped::take_news(caught, image, &children)?;
                caught.unmap()
            };
            clean(&mut caught).and_then(|()| caught.done()).during(|| self.name(*leader))?;
            self.give_back(group, image)?;
            if image.state != TaskState::Stopped && !leave_stopped {
                if queues(image).any(sigqueue::stops) {
                    stopped::send_stop(image, leader.tid, true)?;
                }
                kept.extend(group);
                continue;
            }
            stopped::send_stop(image, leader.tid, leave_stopped).during(|| image.name())?;
            group.iter().try_for_each(|t| ptrace::detach(t.tid, 0)).during(|| image.name())?;
            // Whoever is the root's parent gets the news.
            if stopped::await_stop(leader.tid)?
                && let Some(parent) = image.parent
            {
                let told = News::from_image(image.tc.exit_code);
                news.entry(parent).or_default().push(Stopped { pid: image.pid, news: told });
            }
        }
        self.threads = kept;
        Ok(())
    }

    /// The same where no task stops and none has to wait for another: they do it beside each other.
    fn clean_together(&self) -> Result<()> {
        let mut tasks = Vec::new();
        for group in self.threads.chunk_by(|a, b| a.task == b.task) {
            let Some((leader, image)) = group.first().zip(self.snapshot.get(group[0].task)) else { continue };
            let caught = Caught::new(leader.tid, self.area.slot(leader.task)?);
            let caught = caught.and_then(|caught| caught.begin_unmap().map(|()| caught));
            tasks.push((group, image, caught.during(|| self.name(*leader))?));
        }
        for (group, _, caught) in &mut tasks {
            caught.enter().during(|| self.name(group[0]))?;
        }
        for (group, image, mut caught) in tasks {
            caught.end_unmap().and_then(|()| caught.done()).during(|| self.name(group[0]))?;
            self.give_back(group, image)?;
        }
        Ok(())
    }

    /// What can only be set in threads that stand still.
    fn give_back(&self, group: &[Thread], image: &TaskImage) -> Result<()> {
        for thread in group {
            self.give_back_rseq(*thread).during(|| self.name(*thread))?;
            let more = image.more.as_ref().and_then(|more| more.thread(image.threads[thread.at]));
            dispatch::restore(thread.tid, more.and_then(|more| more.dispatch.as_ref()))
                .during(|| self.name(*thread))?;
        }
        Ok(())
    }

    fn give_back_rseq(&self, thread: Thread) -> Result<()> {
        let core = self.snapshot.get(thread.task).and_then(|t| t.thread_core(thread.at));
        let rseq = core.and_then(|c| c.thread_core.as_ref()).and_then(|t| t.rseq_entry.as_ref());
        let Some(pb::RseqEntry { rseq_abi_pointer: abi, rseq_cs_pointer: Some(cs), .. }) = rseq else {
            return Ok(());
        };
        if *abi == 0 || *cs == 0 {
            return Ok(());
        }
        let at = abi.checked_add(RSEQ_CS).ok_or_else(|| Error::image("rseq area beyond all addresses"))?;
        MemFile::open(thread.tid)?.write(at, &cs.to_ne_bytes())
    }

    /// Forks the process that kills all tasks should we be killed before [`Attached::keep`].
    ///
    /// Precondition: all threads are caught, none was let go yet.
    pub fn guard(&self) -> Result<Guardian> {
        let leaders = self.threads.iter().filter(|t| t.at == 0);
        Guardian::start(&leaders.map(|t| t.tid).collect::<Vec<_>>())
    }

    /// From here on all tasks stay, even if we are killed.
    pub fn keep(&self, guardian: Guardian) -> Result<()> {
        if guardian.is_there() {
            // Once for each task: all its threads are looked at.
            let options: HashMap<_, _> =
                self.snapshot.alive().map(|(task, image)| (task, options(image))).collect();
            for thread in &self.threads {
                let options = options.get(&thread.task).ok_or_else(|| Error::bug("a thread of no task"))?;
                ptrace::set_options(thread.tid, *options).during(|| self.name(*thread))?;
            }
        }
        faults::point("restore-ready")?;
        guardian.keep();
        Ok(())
    }

    /// Lets all go that do not stand still already.
    ///
    /// # Errors
    /// A thread that died meanwhile is none of ours any more and no error.
    pub fn detach(self) -> Result<()> {
        let mut first = Ok(());
        for thread in &self.threads {
            match ptrace::detach(thread.tid, 0) {
                Err(e) if !matches!(e.kind(), Kind::TaskDied(_)) => {
                    first = first.and(Err(e.during(self.name(*thread))));
                }
                _ => {}
            }
        }
        first
    }
}

/// Signals that were pending, for the process and for each thread.
fn queues(image: &TaskImage) -> impl Iterator<Item = &pb::SignalQueueEntry> {
    let threads = (0..image.threads.len()).filter_map(|i| image.thread_core(i)?.thread_core.as_ref());
    image.tc.signals_s.iter().chain(threads.filter_map(|t| t.signals_p.as_ref()))
}

/// Options for the threads of a task, while they are attached.
fn options(image: &TaskImage) -> u64 {
    ptrace::O_TRACESYSGOOD | if uses_seccomp(image) { ptrace::O_SUSPEND_SECCOMP } else { 0 }
}

fn uses_seccomp(image: &TaskImage) -> bool {
    (0..image.threads.len())
        .filter_map(|i| image.thread_core(i)?.thread_core.as_ref())
        .any(|t| t.seccomp_mode.unwrap_or(0) != 0)
        || image.tc.old_seccomp_mode.unwrap_or(0) != 0
}
