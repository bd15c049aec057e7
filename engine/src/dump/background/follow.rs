//! Following tasks whose memory is still to be read: the userfaultfd is not told in time of memory that is
//! unmapped or dropped, so calls that do that wait at their entry until what they take away is put aside.
//!
//! Every system call of these tasks stops twice meanwhile, and costs some microseconds more. A task that ends or
//! executes another program keeps its memory until it is read: its last thread waits on the way out.
//!
//! Flags of mappings are read only now that the tasks run: that walks all page tables. Until they are, calls that
//! could change them wait too.

use std::{
    collections::{HashMap, HashSet},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use super::{
    Kept, Protected,
    calls::{self, Part},
    chunks::Reader,
};
use crate::{
    error::{Error, Kind, Result},
    infect::{self, StoppedTask},
    interrupt,
    procfs::{ProcDir, status::Status as TaskStatus},
    pstree::RealPid,
    sys::{
        kcmp,
        ptrace::{self, O_TRACECLONE, O_TRACEEXEC, O_TRACEEXIT, O_TRACEFORK, O_TRACESYSGOOD, O_TRACEVFORK},
        ptrace_calls::{self, Entry},
        wait::{self, Status},
    },
};

const OPTIONS: u64 = O_TRACESYSGOOD | O_TRACECLONE | O_TRACEFORK | O_TRACEVFORK | O_TRACEEXEC | O_TRACEEXIT;
const EVENT_EXEC: i32 = 4;
const EVENT_EXIT: i32 = 6;
/// So much is put aside at once; a call that takes more away waits until it is read.
const AT_ONCE: u64 = 16 << 20;
/// How often those who wait are looked at.
const LOOK: Duration = Duration::from_millis(2);
/// How long threads may take to stop for the last time.
const LAST_STOP: Duration = Duration::from_secs(10);

/// What whoever reads the memory tells, and is told.
#[derive(Debug, Default)]
pub struct Progress {
    /// Flags of mappings are known, of each task.
    known: Vec<AtomicBool>,
    /// All is read, or reading has failed.
    over: AtomicBool,
    /// Nobody needs it any more.
    stop: AtomicBool,
}

impl Progress {
    /// Of so many tasks.
    pub fn new(tasks: usize) -> Progress {
        Progress { known: (0..tasks).map(|_| AtomicBool::new(false)).collect(), ..Progress::default() }
    }

    /// Flags of mappings are known.
    pub fn known(&self, task: usize) {
        self.known[task].store(true, Ordering::Release);
    }

    fn is_known(&self, task: usize) -> bool {
        self.known[task].load(Ordering::Acquire)
    }

    /// Reading is over when this is dropped, however it ends.
    pub fn until_dropped(&self) -> impl Drop {
        Over(&self.over)
    }

    /// Reading is to end.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
    }

    /// Fails if reading is to end.
    pub fn check(&self) -> Result<()> {
        match self.stop.load(Ordering::Acquire) {
            false => Ok(()),
            true => Err(Error::host("the tasks are not followed any more")),
        }
    }
}

struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// A task to be followed.
pub struct Followed<'a> {
    protected: &'a Protected,
    stopped: Option<StoppedTask>,
    reader: Reader,
    /// Its mappings at the freeze.
    mappings: Vec<(u64, u64)>,
    /// Where brk(2) ended.
    heap: u64,
}

impl<'a> Followed<'a> {
    /// A task that is stopped.
    pub fn new(protected: &'a Protected, stopped: StoppedTask, reader: Reader, kept: &Kept) -> Followed<'a> {
        let heap = kept.maps.iter().rev().find(|m| m.name == b"[heap]").map_or(kept.mm.mm_brk, |m| m.end);
        let mappings = kept.maps.iter().map(|m| (m.start, m.end)).collect();
        Followed { protected, stopped: Some(stopped), reader, mappings, heap }
    }
}

struct Thread {
    /// Position of the task whose memory it has.
    task: usize,
    /// It belongs to that task.
    own: bool,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Runs,
    /// Before a call that has to wait.
    Waits(Entry),
    /// On the way out.
    Leaves,
}

/// Follows tasks. Dropped, they go on by themselves.
pub struct Follower<'a> {
    tasks: Vec<Followed<'a>>,
    progress: &'a Progress,
    threads: HashMap<RealPid, Thread>,
    /// New threads of whose attachment we were told.
    expected: HashSet<RealPid>,
    /// The last of a task has ended although its memory was needed.
    lost: Option<RealPid>,
    /// One that was killed, and how many the kernel had killed for want of memory before.
    killed: Option<RealPid>,
    kills: u64,
}

impl<'a> Follower<'a> {
    /// Lets the tasks run; their threads are stopped.
    pub fn start(tasks: Vec<Followed<'a>>, progress: &'a Progress) -> Result<Follower<'a>> {
        let mut all = Follower {
            tasks,
            progress,
            threads: HashMap::new(),
            expected: HashSet::new(),
            lost: None,
            killed: None,
            kills: out_of_memory_kills(),
        };
        for task in 0..all.tasks.len() {
            let stopped =
                all.tasks[task].stopped.take().ok_or_else(|| Error::bug("a task that is not stopped"))?;
            for tid in stopped.hand_over()? {
                all.threads.insert(tid, Thread { task, own: true, state: State::Runs });
                // Seccomp is not to sleep any more.
                alive(ptrace::set_options(tid, OPTIONS))?;
                alive(ptrace::syscall(tid, 0))?;
            }
        }
        Ok(all)
    }

    /// Until all is read.
    pub fn run(&mut self) -> Result<()> {
        let mut looked = Instant::now();
        while !self.progress.over.load(Ordering::Acquire) {
            if let Some((tid, status)) = wait::next()? {
                self.stopped(tid, status)?;
            }
            if looked.elapsed() >= LOOK {
                interrupt::check()?;
                self.look_again()?;
                looked = Instant::now();
            }
            if let Some(pid) = self.lost {
                return Err(Error::new(Kind::TaskDied(pid.0)).during("its memory was not read yet"));
            }
        }
        // Then the kernel takes memory away before the task is gone.
        match self.killed {
            Some(pid) if out_of_memory_kills() != self.kills => {
                Err(Error::host(format!("task {pid} was killed when the system ran out of memory")))
            }
            _ => Ok(()),
        }
    }

    fn stopped(&mut self, tid: RealPid, status: Status) -> Result<()> {
        let Some(thread) = self.threads.get_mut(&tid) else {
            // Other children of this process end too.
            return if status.is_end() { Ok(()) } else { self.adopt(tid, status) };
        };
        thread.state = State::Runs;
        let (task, own) = (thread.task, thread.own);
        match status {
            s if s.is_end() => {
                self.threads.remove(&tid);
                if own && !self.threads.values().any(|t| t.own && t.task == task) {
                    self.lost = Some(self.tasks[task].protected.pid);
                }
                Ok(())
            }
            Status::Syscall => match ptrace_calls::entry(tid) {
                Ok(Some(entry)) if !self.may(task, own, &entry)? => {
                    self.state(tid, State::Waits(entry));
                    Ok(())
                }
                Ok(_) => alive(ptrace::syscall(tid, 0)),
                Err(e) => alive(Err(e)),
            },
            Status::Signal(signal) => alive(ptrace::syscall(tid, signal)),
            Status::EventStop(libc::SIGTRAP) => alive(ptrace::syscall(tid, 0)),
            Status::EventStop(_) => alive(ptrace_calls::listen(tid)),
            Status::Event(EVENT_EXIT) if own => {
                if ptrace_calls::event_message(tid).is_ok_and(|code| code & 0x7f == libc::SIGKILL as u64) {
                    self.killed = Some(self.tasks[task].protected.pid);
                }
                self.state(tid, State::Leaves);
                self.leave(tid, task)
            }
            // It shared the memory, and has its own now.
            Status::Event(EVENT_EXEC) if !own => {
                self.threads.remove(&tid);
                alive(ptrace::detach(tid, 0))
            }
            Status::Event(EVENT_EXIT | EVENT_EXEC) => alive(ptrace::syscall(tid, 0)),
            Status::Event(_) => {
                if let Ok(new) = ptrace_calls::event_message(tid) {
                    let new = RealPid(new as i32);
                    if !self.threads.contains_key(&new) {
                        self.expected.insert(new);
                    }
                }
                alive(ptrace::syscall(tid, 0))
            }
            _ => Ok(()),
        }
    }

    fn state(&mut self, tid: RealPid, state: State) {
        if let Some(thread) = self.threads.get_mut(&tid) {
            thread.state = state;
        }
    }

    /// A new thread, or a child that has the memory too, is followed; another child is not.
    fn adopt(&mut self, tid: RealPid, status: Status) -> Result<()> {
        self.expected.remove(&tid);
        let tgid = ProcDir::open(tid).and_then(|dir| TaskStatus::read(&dir)).map_or(0, |s| s.tgid);
        let own = self.tasks.iter().position(|t| t.protected.pid.0 == tgid);
        let task = own.or_else(|| {
            let same = |held: &Followed<'_>| {
                let order = kcmp::compare(held.protected.pid, tid, kcmp::What::Vm);
                matches!(order, Ok(std::cmp::Ordering::Equal))
            };
            self.tasks.iter().position(same)
        });
        match task {
            Some(task) => {
                self.threads.insert(tid, Thread { task, own: own.is_some(), state: State::Runs });
                self.stopped(tid, status)
            }
            None => alive(infect::let_go(tid, status)),
        }
    }

    /// Lets those go on that need not wait any more.
    fn look_again(&mut self) -> Result<()> {
        let waiting: Vec<RealPid> =
            self.threads.iter().filter(|(_, t)| t.state != State::Runs).map(|(tid, _)| *tid).collect();
        for tid in waiting {
            let Some(Thread { task, own, state }) = self.threads.get(&tid) else { continue };
            let (task, own) = (*task, *own);
            match *state {
                State::Waits(entry) => {
                    if self.may(task, own, &entry)? {
                        self.state(tid, State::Runs);
                        alive(ptrace::syscall(tid, 0))?;
                    }
                }
                State::Leaves => self.leave(tid, task)?,
                State::Runs => {}
            }
        }
        Ok(())
    }

    /// A thread on its way out may go if another one keeps the memory, and mappings are known: the files that tell
    /// of them are those of one thread.
    fn leave(&mut self, tid: RealPid, task: usize) -> Result<()> {
        let stays = |(other, t): (&RealPid, &Thread)| {
            *other != tid && t.own && t.task == task && t.state != State::Leaves
        };
        if !self.progress.is_known(task) || !self.threads.iter().any(stays) {
            return Ok(());
        }
        // It keeps nothing any more, so it does not count for others.
        self.threads.remove(&tid);
        alive(ptrace::syscall(tid, 0))
    }

    /// Whether a call may be made, now that what it takes away is put aside if that is little.
    fn may(&mut self, task: usize, own: bool, entry: &Entry) -> Result<bool> {
        let executes = |nr: u64| matches!(nr as i64, libc::SYS_execve | libc::SYS_execveat);
        if entry.nr.is_some_and(executes) {
            // A process of its own lets go of the memory; the task itself waits until nobody looks at it any more.
            return Ok(!own);
        }
        let held = &mut self.tasks[task];
        if !self.progress.is_known(task) {
            let waits = match calls::changes(entry, held.heap) {
                Part::Nothing => false,
                Part::All => true,
                Part::Range(start, end) => {
                    let from = held.mappings.partition_point(|(_, last)| *last <= start);
                    held.mappings.get(from).is_some_and(|(first, _)| *first < end)
                }
            };
            if waits {
                return Ok(false);
            }
        }
        let (start, end) = match calls::takes(entry, held.heap) {
            Part::Nothing => return Ok(true),
            Part::Range(start, end) => (start, end),
            Part::All => (0, u64::MAX),
        };
        let protected = held.protected;
        match protected.chunks.open(start, end) {
            0 => Ok(true),
            bytes if bytes > AT_ONCE => Ok(false),
            _ => {
                let locked = protected.chunks.lock(protected.server.pidfd())?;
                protected.chunks.save_range(start, end, &mut held.reader, &locked)?;
                Ok(true)
            }
        }
    }
}

impl Drop for Follower<'_> {
    fn drop(&mut self) {
        let deadline = Instant::now() + LAST_STOP;
        let mut stopping: Vec<RealPid> = self.expected.drain().collect();
        for (tid, thread) in &self.threads {
            let result = match thread.state {
                State::Runs => {
                    stopping.push(*tid);
                    ptrace::interrupt(*tid)
                }
                State::Waits(_) | State::Leaves => ptrace::detach(*tid, 0),
            };
            report(*tid, alive(result));
        }
        for tid in stopping {
            report(tid, alive(let_go(tid, deadline)));
        }
    }
}

/// How often the kernel has killed a process for want of memory.
fn out_of_memory_kills() -> u64 {
    let text = std::fs::read_to_string("/proc/vmstat").unwrap_or_default();
    text.lines().find_map(|l| l.strip_prefix("oom_kill ")?.trim().parse().ok()).unwrap_or(0)
}

fn let_go(tid: RealPid, deadline: Instant) -> Result<()> {
    match wait::until(tid, deadline)? {
        Some(status) if status.is_end() => Ok(()),
        Some(status) => infect::let_go(tid, status),
        None => Err(Error::host("it does not stop to be let go; it is let go when this process ends")),
    }
}

fn report(tid: RealPid, result: Result<()>) {
    if let Err(e) = result {
        log::error!("Thread {tid}: {e}");
    }
}

/// The end of a thread is told by the next wait.
fn alive(result: Result<()>) -> Result<()> {
    match result {
        Err(e) if matches!(e.kind(), Kind::TaskDied(_)) => Ok(()),
        other => other,
    }
}
