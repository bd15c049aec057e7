//! Stopping a whole tree, so that nothing in it changes any more.
//!
//! Tasks are seized in rounds: while some still run, new children appear, children of dying tasks move up to
//! a frozen ancestor. A round lists the children of every task whose list is older than the last seizure;
//! when a round finds nobody new, all lists are final. With `--freeze-cgroup` the group is frozen first, so
//! that there is nothing to race with.

mod group;

use std::{
    collections::{HashMap, HashSet},
    os::fd::AsFd,
    path::Path,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{freezer::Freezer, guardian::Guardian, refuse};
use crate::{
    error::{Context, Error, Kind, Result, SysContext},
    infect::{Ledger, StoppedTask},
    interrupt,
    kernel::Kernel,
    ns::home::{self, Apart, Home},
    options::{Afterwards, DumpOptions},
    procfs::{ProcDir, stat::Stat, status::Status},
    pstree::{RealPid, TaskState},
    spread,
    sys::{pidfd, ptrace, wait},
};

/// How long killed tasks may take to vanish.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// Tasks whose memory is given back with our help.
const FEW: usize = 16;

/// How long stopped tasks may take until they are seen stopped.
const STOP_LIMIT: Duration = Duration::from_secs(1);

/// A task that cannot change any more: stopped by us, or ended.
#[derive(Debug)]
pub struct FrozenTask {
    pub pid: RealPid,
    /// Position of the parent in [`Frozen::tasks`].
    pub parent: Option<usize>,
    pub state: TaskState,
    /// Signal of job control that had stopped it.
    pub stop_signal: Option<i32>,
    /// The hold on its threads; an ended task has none.
    pub stopped: Option<StoppedTask>,
    /// Its namespaces of kinds that may be others than those of the root task.
    pub apart: Apart,
    /// Seizures that had happened when its children were listed; 0 before the first time.
    listed: u64,
}

impl FrozenTask {
    /// Its threads, the leader first, also one that has ended.
    pub fn threads(&self) -> impl Iterator<Item = RealPid> {
        let gone = self.stopped.as_ref().is_none_or(StoppedTask::leader_gone).then_some(self.pid);
        let threads = self.stopped.iter().flat_map(|s| s.threads().iter().map(|t| t.tid()));
        gone.into_iter().chain(threads)
    }
}

/// A tree that stands still. Dropped, every task goes on as it was found.
#[derive(Debug)]
pub struct Frozen {
    tasks: Vec<FrozenTask>,
    known: HashMap<RealPid, usize>,
    /// Threads seized in the freezer group, not yet found in the tree.
    waiting: HashSet<RealPid>,
    /// Threads of the freezer group that are not part of the tree, stopped.
    others: Vec<RealPid>,
    freezer: Option<Freezer>,
    /// Goes last: it stands by until everybody is let go.
    guardian: Guardian,
    seizures: u64,
    deadline: Instant,
    /// Where all tasks must be: known once the root is seized.
    home: Option<Home>,
}

/// Stops the tree of `opts.pid`.
pub fn tree(opts: &DumpOptions, kernel: &Kernel) -> Result<Frozen> {
    watched_tree(opts, kernel, Guardian::start(opts.freeze_cgroup.clone(), kernel)?)
}

/// The same with a guardian that stands by already.
pub fn watched_tree(opts: &DumpOptions, kernel: &Kernel, guardian: Guardian) -> Result<Frozen> {
    let root = RealPid(opts.pid);
    refuse::root(root)?;
    let limit = interrupt::remaining(opts.freeze_timeout);
    let mut frozen = Frozen {
        tasks: Vec::new(),
        known: HashMap::new(),
        waiting: HashSet::new(),
        others: Vec::new(),
        freezer: None,
        guardian,
        seizures: 0,
        home: None,
        deadline: Instant::now() + limit,
    };
    if let Some(folder) = &opts.freeze_cgroup {
        frozen.freeze_group(folder)?;
    }
    frozen.add(root, None, kernel)?;
    while frozen.round(kernel)? {
        interrupt::check()?;
        if Instant::now() > frozen.deadline {
            return Err(Error::host(format!("{} forks faster than it can be stopped", refuse::name(root)))
                .remedy("freeze it through its control group with --freeze-cgroup"));
        }
    }
    frozen.settle_group()?;
    log::info!("Seized {} tasks", frozen.tasks.len());
    Ok(frozen)
}

impl Frozen {
    /// All tasks, in the order they were found; the root is the first.
    pub fn tasks(&self) -> &[FrozenTask] {
        &self.tasks
    }

    /// Where all tasks live.
    pub fn home(&self) -> Result<&Home> {
        self.home.as_ref().ok_or_else(|| Error::bug("a tree without a root"))
    }

    /// The control group that was frozen for the dump, and whether it had been frozen before.
    pub fn group(&self) -> Option<(&Path, bool)> {
        self.freezer.as_ref().map(|f| (f.folder(), f.was_frozen()))
    }

    /// What a guardian is to take away if this process is killed.
    pub fn ledger(&self) -> &Ledger {
        self.guardian.ledger()
    }

    /// The guardian's process, where there is one: a child of ours that never had a second thread.
    pub fn guardian(&self) -> Option<RealPid> {
        self.guardian.pid()
    }

    /// One task, to be infected.
    pub fn task_mut(&mut self, pid: RealPid) -> Result<&mut FrozenTask> {
        let at = self.known.get(&pid).ok_or_else(|| Error::bug(format!("task {pid} is not frozen")))?;
        Ok(&mut self.tasks[*at])
    }

    /// Positions of all tasks, parents before children, each with its parent's place in this order.
    pub fn preorder(&self) -> Vec<(usize, Option<usize>)> {
        let mut children: Vec<Vec<usize>> = vec![Vec::new(); self.tasks.len()];
        for (at, task) in self.tasks.iter().enumerate() {
            if let Some(parent) = task.parent {
                children[parent].push(at);
            }
        }
        let mut order = Vec::with_capacity(self.tasks.len());
        let mut stack = vec![(0, None)];
        while let Some((at, parent)) = stack.pop() {
            let place = order.len();
            order.push((at, parent));
            stack.extend(children[at].iter().rev().map(|child| (*child, Some(place))));
        }
        order
    }

    /// Lists children where the list may have changed; says whether anybody new was found.
    fn round(&mut self, kernel: &Kernel) -> Result<bool> {
        let before = self.tasks.len();
        let mut at = 0;
        while at < self.tasks.len() {
            let task = &mut self.tasks[at];
            if task.state.is_alive() && (task.listed == 0 || task.listed < self.seizures) {
                task.listed = self.seizures;
                let pid = task.pid;
                let dir = ProcDir::open(pid)?;
                let threads: Vec<_> = task.threads().collect();
                for children in spread::map(&threads, |tid| dir.children(*tid))? {
                    for child in children {
                        if !self.known.contains_key(&child) {
                            self.add(child, Some(at), kernel).during(|| format!("child of task {pid}"))?;
                        }
                    }
                }
            }
            at += 1;
        }
        Ok(self.tasks.len() > before)
    }

    /// Seizes one task with all its threads. A child that ends meanwhile is a zombie that its parent, which stands
    /// still, has yet to wait for; one that is gone then is nobody.
    fn add(&mut self, pid: RealPid, parent: Option<usize>, kernel: &Kernel) -> Result<()> {
        let died = |result: &Result<()>| {
            parent.is_some() && result.as_ref().is_err_and(|e| *e.kind() == Kind::TaskDied(pid.0))
        };
        let mut result = self.seize(pid, parent, kernel);
        if died(&result) {
            result = self.seize(pid, parent, kernel);
        }
        if died(&result) { Ok(()) } else { result }
    }

    fn seize(&mut self, pid: RealPid, parent: Option<usize>, kernel: &Kernel) -> Result<()> {
        let dir = ProcDir::open(pid)?;
        let status = Status::read(&dir)?;
        // A pid that was given to somebody else between listing and seizing has another parent.
        let parent_pid = parent.map(|at| self.tasks[at].pid.0);
        let another = |now: &Status| parent_pid.is_some_and(|parent| now.ppid != parent);
        if another(&status) {
            return Err(Error::new(Kind::TaskDied(pid.0)));
        }
        // A leader may end before the other threads: then the task lives on.
        let (state, stop_signal, stopped, apart) = if status.is_zombie() && dir.threads()?.len() <= 1 {
            (TaskState::Dead, None, None, Apart::default())
        } else {
            refuse::task(&dir, status)?;
            let mut stopped = StoppedTask::seize_held(pid, kernel, self.left(), &mut self.waiting)?;
            stopped.watched_by(self.guardian.ledger());
            let now = match stopped.take_status() {
                Some(status) => status,
                None => Status::read(&dir)?,
            };
            if another(&now) {
                return Err(Error::new(Kind::TaskDied(pid.0)));
            }
            // A leader that is gone shows nothing of what it had.
            let live = if stopped.leader_gone() { Some(stopped.live_dir()?) } else { None };
            let live = live.as_ref().unwrap_or(&dir);
            let threads: Vec<_> = stopped.threads().iter().map(|thread| thread.tid()).collect();
            home::check_threads(&dir, &threads)?;
            let apart = match &self.home {
                Some(home) => home.check(live)?,
                None => {
                    let home = Home::of(live, &now)?;
                    let apart = home.check(live)?;
                    self.home = Some(home);
                    apart
                }
            };
            self.seizures += 1;
            match stopped.job_stop() {
                None => (TaskState::Alive, None, Some(stopped), apart),
                Some(signal) => (TaskState::Stopped, Some(signal), Some(stopped), apart),
            }
        };
        log::info!("Seized task {pid}, state {}", state.to_image());
        self.known.insert(pid, self.tasks.len());
        self.tasks.push(FrozenTask { pid, parent, state, stop_signal, stopped, apart, listed: 0 });
        Ok(())
    }

    /// Ends the dump: what becomes of the tree.
    pub fn finish(mut self, afterwards: Afterwards) -> Result<()> {
        match afterwards {
            Afterwards::Run => Ok(()),
            Afterwards::Stop => {
                let alive = self.tasks.iter().filter(|t| t.state.is_alive());
                let pids: Vec<RealPid> = alive.map(|t| t.pid).collect();
                for pid in &pids {
                    kill(Pid::from_raw(pid.0), Signal::SIGSTOP)
                        .call("kill(SIGSTOP)")
                        .during(|| refuse::name(*pid))?;
                }
                drop(self);
                wait_stopped(&pids);
                Ok(())
            }
            Afterwards::Kill => self.kill(),
        }
    }

    /// Kills everything at once, while it is stopped, and waits until it is gone.
    fn kill(&mut self) -> Result<()> {
        let deadline = Instant::now() + KILL_LIMIT;
        for task in self.tasks.iter().filter(|t| t.state.is_alive()) {
            match kill(Pid::from_raw(task.pid.0), Signal::SIGKILL) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(e) => return Err(Error::sys("kill(SIGKILL)", e as i32).during(refuse::name(task.pid))),
            }
        }
        self.release_memory();
        // The first process of a pid namespace ends when nobody else is left there.
        for stopped in self.tasks.iter_mut().rev().filter_map(|t| t.stopped.take()) {
            stopped.kill(deadline.saturating_duration_since(Instant::now()))?;
        }
        Ok(())
    }

    /// Helps tasks that are killed to give back their memory, which takes one processor for each: many have all of them
    /// at work anyway.
    fn release_memory(&self) {
        let alive: Vec<_> = self.tasks.iter().filter(|t| t.state.is_alive()).collect();
        for task in alive.iter().filter(|_| alive.len() <= FEW) {
            // Only help: without it the same takes longer.
            let _ = pidfd::open(task.pid, 0).and_then(|fd| pidfd::release_memory(fd.as_fd()));
        }
    }

    fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }
}

/// Waits until tasks that were let go with a SIGSTOP have taken it. Only a parent would be told.
fn wait_stopped(pids: &[RealPid]) {
    let deadline = Instant::now() + STOP_LIMIT;
    for pid in pids {
        // One that has gone will not run either.
        while let Ok(stat) = ProcDir::open(*pid).and_then(|dir| Stat::read(&dir)) {
            if matches!(stat.state, b'T' | b't' | b'Z' | b'X') {
                break;
            }
            if Instant::now() > deadline {
                return log::warn!("{} has not stopped yet", refuse::name(*pid));
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

/// Attaches to a thread and asks it to stop, which it does when its group has thawed.
fn attach(tid: RealPid) -> Result<()> {
    match ptrace::seize(tid, ptrace::O_TRACESYSGOOD | ptrace::O_SUSPEND_SECCOMP) {
        // We may not suspend filters; whether it has any is asked when it has stopped.
        Err(e) if matches!(e.errno(), Some(libc::EPERM | libc::EINVAL)) => {
            ptrace::seize(tid, ptrace::O_TRACESYSGOOD)?;
        }
        other => other?,
    }
    ptrace::interrupt(tid)
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // A group that was frozen by somebody else is frozen again before anything can run.
        if let Some(freezer) = &mut self.freezer
            && freezer.was_frozen()
            && let Err(e) = freezer.restore()
        {
            log::error!("Can't freeze the control group again: {e}");
        }
        for tid in self.waiting.drain().chain(self.others.drain(..)) {
            let soon = Instant::now() + Duration::from_secs(1);
            if let Err(e) =
                ptrace::detach(tid, 0).or_else(|_| wait::until(tid, soon).and(ptrace::detach(tid, 0)))
                && !matches!(e.kind(), Kind::TaskDied(_))
            {
                log::error!("Can't let go of {}: {e}", refuse::name(tid));
            }
        }
        // Tasks are let go by their own guards, children before parents.
        while let Some(task) = self.tasks.pop() {
            drop(task);
        }
    }
}
