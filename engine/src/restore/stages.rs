//! The stages all tasks of a restore pass together, and the first error: one mapping shared by the engine
//! and everything it forks, the only mutable thing they share.
//!
//! The engine opens a stage; tasks (and later their threads, from the blob) report that they have reached its
//! end; when nobody is left the engine opens the next. A task that fails writes the first error and turns the
//! stage into [`Stage::Fail`], at which everybody who waits gives up.
//!
//! # Safety
//! The mapping is as long as [`Shared::size`] says, page aligned, zeroed by the kernel, and lives as long as
//! the [`Area`]; its fields are atomics but for two words written before the area can be shared.
#![allow(unsafe_code)]

mod births;
mod failure;

use std::collections::HashMap;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use restorer::{Shared, Stage, TaskSlot};

use crate::error::{Error, Kind, Result};
use crate::interrupt;
use crate::pstree::{RealPid, VirtPid};
use crate::restore::read::TaskIx;
use crate::sys::{errno, futex};

/// How often a waiting task looks whether the engine still lives.
const LOOK: Duration = Duration::from_secs(1);
/// How soon and how seldom the engine looks whether tasks still live while it waits for them.
const WATCH: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(200));

/// What only engine code shares: for all tasks.
#[repr(C)]
struct Head {
    /// Pages compared with inherited ones, found equal, read from images.
    pages: [AtomicU64; 3],
    /// 1 once helpers and zombies may end. A futex word.
    end: AtomicU32,
    /// How many of `strays` are in use.
    strayed: AtomicU32,
    /// Children that got a wrong number and ended: number of the parent's node in the upper half, plus one.
    strays: [AtomicU64; STRAYS],
    /// 1 while a task does what only one may at a time. A futex word.
    lock: AtomicU32,
    /// 1 once all turns were taken. A futex word.
    turned: AtomicU32,
}

/// More children than this do not get a wrong number before something else is wrong.
const STRAYS: usize = 256;

/// And for each task, while the tree is made.
#[repr(C)]
struct Birth {
    /// 1 once the task has made the process group of its number. A futex word.
    group: AtomicU32,
    /// How many others have joined that group. A futex word.
    joined: AtomicU32,
    /// One more than the number of the turn that is its own now. A futex word.
    turn: AtomicU32,
}

/// The shared mapping.
#[derive(Debug)]
pub struct Area {
    head: NonNull<Shared>,
    engine_head: NonNull<Head>,
    tasks: u32,
    engine: RealPid,
    /// In the engine: what numbers of tasks are here, if they are others in their pid namespace.
    reals: Mutex<Option<HashMap<VirtPid, RealPid>>>,
}

/// Bytes of the second mapping.
fn engine_len(tasks: u32) -> Option<usize> {
    (tasks as usize).checked_mul(size_of::<Birth>())?.checked_add(size_of::<Head>())
}

fn map(len: usize) -> Result<NonNull<libc::c_void>> {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping where the kernel likes it.
    let p = unsafe { libc::mmap(null_mut(), len, prot, flags, -1, 0) };
    match NonNull::new(p) {
        Some(p) if p.as_ptr() != libc::MAP_FAILED => Ok(p),
        _ => Err(Error::sys("mmap", errno::last()).during("area shared by tasks")),
    }
}

impl Area {
    /// Maps the area for so many nodes of the plan. To be called before anything is forked.
    pub fn new(tasks: u32) -> Result<Area> {
        let too_many = || Error::image(format!("pstree.img: {tasks} tasks are too many"));
        let engine_len = engine_len(tasks).ok_or_else(too_many)?;
        let head = map(Shared::size(tasks).ok_or_else(too_many)?)?.cast::<Shared>();
        let engine_head = map(engine_len)?.cast::<Head>();
        // SAFETY: the mapping is as large as the structure, zeroed, and nobody else has it yet.
        unsafe {
            (*head.as_ptr()).build = restorer::BUILD;
            (*head.as_ptr()).tasks = tasks;
        }
        let engine = RealPid(std::process::id() as i32);
        Ok(Area { head, engine_head, tasks, engine, reals: Mutex::new(None) })
    }

    /// Address and length in bytes, for the one who takes the mapping along into the blob.
    pub fn range(&self) -> (u64, u64) {
        let len = Shared::size(self.tasks).unwrap_or(0);
        (self.head.as_ptr().expose_provenance() as u64, len as u64)
    }

    /// The head.
    pub fn shared(&self) -> &Shared {
        // SAFETY: mapped as long as self lives; everything that is written through it is atomic.
        unsafe { self.head.as_ref() }
    }

    /// What the engine must know of a task.
    pub fn slot(&self, ix: TaskIx) -> Result<&TaskSlot> {
        // SAFETY: the area has this many slots and lives as long as self.
        unsafe { Shared::slot(self.head.as_ptr(), ix.0) }.ok_or_else(|| no_such(ix))
    }

    fn birth(&self, ix: TaskIx) -> Result<&Birth> {
        if ix.0 >= self.tasks {
            return Err(no_such(ix));
        }
        // SAFETY: inside the second mapping, which has one for each task behind its head.
        Ok(unsafe { self.engine_head.add(1).cast::<Birth>().add(ix.at()).as_ref() })
    }

    fn engine_head(&self) -> &Head {
        // SAFETY: mapped as long as self lives; everything written through it is atomic.
        unsafe { self.engine_head.as_ref() }
    }

    /// Leaves a child with a wrong number to be reaped by `parent`, whose child it is.
    pub fn add_stray(&self, parent: TaskIx, pid: RealPid) -> Result<()> {
        let head = self.engine_head();
        let at = head.strayed.fetch_add(1, Ordering::Relaxed) as usize;
        let word = head.strays.get(at).ok_or_else(|| Error::host("others fork too fast to get pids"))?;
        word.store((u64::from(parent.0) + 1) << 32 | u64::from(pid.0.cast_unsigned()), Ordering::Release);
        Ok(())
    }

    /// Those of `parent`, complete once all tasks are forked.
    pub fn strays(&self, parent: TaskIx) -> impl Iterator<Item = RealPid> {
        let words = self.engine_head().strays.iter().map(|w| w.load(Ordering::Acquire));
        let of_parent = words.filter(move |w| w >> 32 == u64::from(parent.0) + 1);
        of_parent.map(|w| RealPid((w as u32).cast_signed()))
    }

    /// Adds to the counts of pages: compared with inherited ones, found equal, read from images.
    pub fn count_pages(&self, counts: [u64; 3]) {
        for (word, more) in self.engine_head().pages.iter().zip(counts) {
            word.fetch_add(more, Ordering::Relaxed);
        }
    }

    /// What [`Area::count_pages`] has added up.
    pub fn pages(&self) -> [u64; 3] {
        self.engine_head().pages.each_ref().map(|word| word.load(Ordering::Relaxed))
    }

    // Engine side.

    /// Takes note of what numbers of tasks, in a pid namespace of their own, are here.
    pub fn learn(&self, found: impl IntoIterator<Item = (VirtPid, RealPid)>) {
        self.reals.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default().extend(found);
    }

    /// The number that a task or thread has here; its own where nothing else was learnt.
    pub fn real(&self, virt: VirtPid) -> RealPid {
        let reals = self.reals.lock().unwrap_or_else(PoisonError::into_inner);
        match &*reals {
            None => RealPid(virt.0),
            // 0 is nobody.
            Some(reals) => reals.get(&virt).copied().unwrap_or(RealPid(0)),
        }
    }

    /// Opens `stage`, to be reported by `left` reporters.
    pub fn open(&self, stage: Stage, left: u32) -> Result<()> {
        log::info!("Opening stage {} for {left}", stage.name());
        let shared = self.shared();
        shared.left[stage as usize].store(left, Ordering::Release);
        let open = |now: u32| (now != Stage::Fail as u32).then_some(stage as u32);
        match shared.stage.fetch_update(Ordering::AcqRel, Ordering::Acquire, open) {
            Ok(_) => futex::wake_all(&shared.stage).map(drop),
            Err(_) => Err(self.failure()),
        }
    }

    /// Everybody has his session and group: helpers and zombies end now.
    pub fn let_end(&self) -> Result<()> {
        self.engine_head().end.store(1, Ordering::Release);
        futex::wake_all(&self.engine_head().end).map(drop)
    }

    /// Waits until everybody has reported `stage`. `watch` is asked from time to time whether all tasks live.
    ///
    /// # Errors
    /// The first error of any task, what `watch` finds, an interruption.
    pub fn await_all(&self, stage: Stage, mut watch: impl FnMut() -> Result<()>) -> Result<()> {
        let word = &self.shared().left[stage as usize];
        let mut nap = WATCH.0;
        loop {
            let left = word.load(Ordering::Acquire);
            if self.failed() {
                return Err(self.failure());
            }
            if left == 0 {
                return Ok(());
            }
            interrupt::check()?;
            if !wait(word, left, Instant::now() + interrupt::remaining(nap))? && !self.failed() {
                // One that says why it ends is dead right afterwards.
                watch().map_err(|e| if self.failed() { self.failure() } else { e })?;
                nap = (nap * 2).min(WATCH.1);
            }
        }
    }

    /// Whether somebody has failed.
    pub fn failed(&self) -> bool {
        self.shared().current() == Stage::Fail || self.shared().error.is_claimed()
    }

    /// Stops everybody at the next moment they look.
    pub fn stop(&self) {
        let shared = self.shared();
        shared.stage.store(Stage::Fail as u32, Ordering::Release);
        let _ = futex::wake_all(&shared.stage);
        for word in &shared.left {
            let _ = futex::wake_all(word);
        }
    }

    // Task side.

    /// Reports that the caller has reached the end of `stage`.
    pub fn reach(&self, stage: Stage) {
        self.shared().reach(stage);
    }

    /// Waits until the engine opens `stage`.
    ///
    /// # Errors
    /// Somebody else failed, or the engine is gone; either way there is nothing to tell any more.
    pub fn wait_open(&self, stage: Stage) -> Result<()> {
        self.wait_for(&self.shared().stage, |_| self.shared().is_open(stage))
    }

    /// Does something that no two tasks may do at the same time.
    pub fn one_at_a_time<T>(&self, act: impl FnOnce() -> Result<T>) -> Result<T> {
        let lock = &self.engine_head().lock;
        while lock.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            self.wait_for(lock, |word| word == 0)?;
        }
        let done = act();
        lock.store(0, Ordering::Release);
        futex::wake_all(lock)?;
        done
    }

    /// Waits until helpers and zombies may end.
    pub fn wait_end(&self) -> Result<()> {
        self.wait_for(&self.engine_head().end, |word| word == 1)
    }

    fn wait_for(&self, word: &AtomicU32, done: impl Fn(u32) -> bool) -> Result<()> {
        loop {
            let value = word.load(Ordering::Acquire);
            if done(value) {
                return Ok(());
            }
            if self.failed() {
                return Err(Error::host("another task failed"));
            }
            if !wait(word, value, Instant::now() + LOOK)? {
                self.engine_lives()?;
            }
        }
    }

    /// Without the engine nobody would ever end the wait.
    ///
    /// Precondition: /proc is that of the engine, whose number may say nothing in this process's pid namespace.
    fn engine_lives(&self) -> Result<()> {
        match std::path::Path::new(&format!("/proc/{}", self.engine)).exists() {
            true => Ok(()),
            false => Err(Error::new(Kind::TaskDied(self.engine.0))),
        }
    }

    /// Whether there is still something to wait for.
    ///
    /// # Errors
    /// Somebody else failed, or the engine is gone.
    pub fn goes_on(&self) -> Result<()> {
        match self.failed() {
            true => Err(Error::host("another task failed")),
            false => self.engine_lives(),
        }
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        let (_, len) = self.range();
        // SAFETY: both were mapped by new with these lengths and nothing borrowed from self is left.
        unsafe {
            libc::munmap(self.head.as_ptr().cast(), len as usize);
            libc::munmap(self.engine_head.as_ptr().cast(), engine_len(self.tasks).unwrap_or(0));
        }
    }
}

/// Waits while `word` is `value`; a signal counts as the deadline.
fn wait(word: &AtomicU32, value: u32, deadline: Instant) -> Result<bool> {
    match futex::wait_while(word, value, deadline) {
        Err(e) if e.errno() == Some(libc::EINTR) => Ok(false),
        other => other,
    }
}

fn no_such(ix: TaskIx) -> Error {
    Error::bug(format!("the plan has no node {}", ix.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strays_are_their_parents() {
        let area = Area::new(2).unwrap();
        for (parent, pid) in [(0, 11), (1, 12), (0, 13)] {
            area.add_stray(TaskIx(parent), RealPid(pid)).unwrap();
        }
        let of = |parent| area.strays(TaskIx(parent)).map(|p| p.0).collect::<Vec<_>>();
        assert_eq!((of(0), of(1)), (vec![11, 13], vec![12]));
        (3..STRAYS).for_each(|_| area.add_stray(TaskIx(0), RealPid(1)).unwrap());
        assert!(area.add_stray(TaskIx(0), RealPid(1)).is_err());
    }

    #[test]
    fn stages_open_when_all_have_reported() {
        let area = Area::new(2).unwrap();
        area.open(Stage::Forking, 2).unwrap();
        area.wait_open(Stage::Forking).unwrap();
        area.reach(Stage::Forking);
        let mut asked = 0;
        area.await_all(Stage::Forking, || {
            asked += 1;
            area.reach(Stage::Forking);
            Ok(())
        })
        .unwrap();
        assert_eq!(asked, 1);
        assert!(area.slot(TaskIx(1)).is_ok() && area.slot(TaskIx(2)).is_err());
    }
}
