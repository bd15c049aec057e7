//! What the engine and every task and thread of a restore share: the stage all of them are in, how
//! many have not reached its end, and the first error.
//!
//! The engine maps one area `MAP_SHARED | MAP_ANONYMOUS` before it forks anything: a [`Shared`], then
//! one [`TaskSlot`] for each task of the plan, in the plan's order. Tasks inherit it by fork; before
//! the old address space goes they map it once more inside the blob's hole, so the futex words stay
//! the same objects to the end.
//!
//! ```text
//! engine                        task (engine code)             each thread (blob)
//! open FORKING     ---------->  fork children
//! await left[FORKING] == 0  <-- reach FORKING
//! open RESTORE     ---------->  files, memory, jump to blob -> move memory, make threads
//! await left[RESTORE] == 0  <-------------------------------- reach RESTORE
//! open RESTORE_SIGCHLD ------------------------------------->  signal actions
//! ...                       <--------------------------------  reach RESTORE_SIGCHLD
//! open RESTORE_CREDS --------------------------------------->  credentials, seccomp
//! seize every thread        <--------------------------------  reach RESTORE_CREDS
//! open COMPLETE    ----------------------------------------->  rt_sigreturn
//! ```
//!
//! # Safety
//!
//! Everything in the area is atomic, so that tasks may use it at the same time.

use core::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};

use blobrt::futex;

/// Moments of a restore that all tasks pass together; the names are those that CRIU's log uses
/// (`CR_STATE_*`).
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Stage {
    /// Nothing is open yet; the root task prepares what all the others need.
    Namespaces = 0,
    /// Tasks are forked. Reported once by every task, helper and zombie.
    Forking = 1,
    /// Files and memory. Reported by every thread, from the blob once its address space is final.
    Restore = 2,
    /// Signal actions, SIGCHLD's among them. Reported by every thread.
    RestoreSigchld = 3,
    /// Credentials and seccomp. Reported by every thread.
    RestoreCreds = 4,
    /// Threads go to their `rt_sigreturn`. Nobody reports it.
    Complete = 5,
    /// Somebody failed: whoever waits ends.
    Fail = u32::MAX,
}

/// Number of stages that have a count in [`Shared::left`].
pub const STAGES: usize = 6;

impl Stage {
    /// Every stage in order, without [`Stage::Fail`].
    pub const ALL: [Stage; STAGES] = [
        Stage::Namespaces,
        Stage::Forking,
        Stage::Restore,
        Stage::RestoreSigchld,
        Stage::RestoreCreds,
        Stage::Complete,
    ];

    /// From the number in [`Shared::stage`]. Everything unknown is a failure.
    pub const fn from_word(word: u32) -> Stage {
        if (word as usize) < STAGES { Self::ALL[word as usize] } else { Stage::Fail }
    }

    /// The name in logs.
    pub const fn name(self) -> &'static str {
        match self {
            Stage::Namespaces => "CR_STATE_PREPARE_NAMESPACES",
            Stage::Forking => "CR_STATE_FORKING",
            Stage::Restore => "CR_STATE_RESTORE",
            Stage::RestoreSigchld => "CR_STATE_RESTORE_SIGCHLD",
            Stage::RestoreCreds => "CR_STATE_RESTORE_CREDS",
            Stage::Complete => "CR_STATE_COMPLETE",
            Stage::Fail => "CR_STATE_FAIL",
        }
    }
}

/// Bytes of text an error carries; longer ones are cut.
pub const ERROR_TEXT: usize = 2048;

const EMPTY: u32 = 0;
const CLAIMED: u32 = 1;
const WRITTEN: u32 = 2;

/// The first error of a restore. Later ones are consequences and are dropped.
///
/// Engine code fills `kind`, `errno` and the text. A blob cannot format: it leaves the text empty and
/// fills `call`, `object`, `a` and `b` with the codes of [`crate::report`].
#[repr(C)]
pub struct ErrorSlot {
    state: AtomicU32,
    /// Stage the task was in ([`Stage`] as a number).
    pub stage: AtomicU32,
    /// Virtual pid of the task.
    pub pid: AtomicI32,
    /// Virtual tid of the thread, 0 when engine code failed.
    pub tid: AtomicI32,
    /// Tag of the engine's error kind; 0 for an error of the blob.
    pub kind: AtomicU32,
    /// `errno` of the failed call, 0 if no call failed.
    pub errno: AtomicI32,
    /// Which system call failed in the blob.
    pub call: AtomicU32,
    /// What sort of object it concerned.
    pub object: AtomicU32,
    /// First number of the object (an address, a signal, a timer id, ...).
    pub a: AtomicU64,
    /// Second number of the object (an end address, a length, ...).
    pub b: AtomicU64,
    text_len: AtomicU32,
    reserved: AtomicU32,
    text: [AtomicU64; ERROR_TEXT / 8],
}

impl ErrorSlot {
    /// Takes the slot for writing. `false`: somebody else failed first.
    pub fn claim(&self) -> bool {
        self.state.compare_exchange(EMPTY, CLAIMED, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
    /// Publishes what was written after [`ErrorSlot::claim`].
    pub fn publish(&self) {
        self.state.store(WRITTEN, Ordering::Release);
    }
    /// Whether somebody has failed, with or without having finished to write.
    pub fn is_claimed(&self) -> bool {
        self.state.load(Ordering::Acquire) != EMPTY
    }
    /// Whether an error stands here, complete.
    pub fn is_written(&self) -> bool {
        self.state.load(Ordering::Acquire) == WRITTEN
    }
    /// Stores a text; only between claim and publish. Cut at [`ERROR_TEXT`] bytes.
    pub fn set_text(&self, text: &[u8]) {
        let len = if text.len() < ERROR_TEXT { text.len() } else { ERROR_TEXT };
        let (text, _) = text.split_at(len);
        for (word, bytes) in self.text.iter().zip(text.chunks(8)) {
            let mut value = [0u8; 8];
            for (to, from) in value.iter_mut().zip(bytes) {
                *to = *from;
            }
            word.store(u64::from_ne_bytes(value), Ordering::Relaxed);
        }
        self.text_len.store(len as u32, Ordering::Relaxed);
    }
    /// Copies the text out; gives its length.
    pub fn text(&self, out: &mut [u8; ERROR_TEXT]) -> usize {
        for (word, bytes) in self.text.iter().zip(out.chunks_exact_mut(8)) {
            for (to, from) in bytes.iter_mut().zip(word.load(Ordering::Relaxed).to_ne_bytes()) {
                *to = from;
            }
        }
        (self.text_len.load(Ordering::Relaxed) as usize).min(ERROR_TEXT)
    }
}

/// What the engine needs to know about one task to finish it; all zero until the task (or its blob)
/// fills it.
#[repr(C)]
pub struct TaskSlot {
    /// Pid as the engine sees it; filled by whoever forks the task.
    pub pid: AtomicI32,
    /// Number of threads that the blob runs.
    pub threads: AtomicU32,
    /// First address of the hole: blob, arguments, frames. To be unmapped last.
    pub hole: AtomicU64,
    /// Length of the hole in bytes.
    pub hole_len: AtomicU64,
    /// Address of a `syscall` instruction inside the hole, for the remote call that unmaps it.
    pub gadget: AtomicU64,
    /// Threads that have opened what they will write their security label to. A futex word.
    pub labels: AtomicU32,
    /// Padding.
    pub reserved: AtomicU32,
}

/// Head of the shared area.
#[repr(C)]
pub struct Shared {
    /// Build number of the ABI; the blob refuses a different one.
    pub build: u64,
    /// The open stage, a futex word; see [`Stage`].
    pub stage: AtomicU32,
    /// Number of [`TaskSlot`]s that follow.
    pub tasks: u32,
    /// How many have not reported each stage; set by the engine before it opens the stage. A futex word each.
    pub left: [AtomicU32; STAGES],
    /// Held while a task writes `ns_last_pid` and forks or makes a thread by it: 0 free, 1 held, 2 held with
    /// waiters. A futex word.
    pub last_pid_lock: AtomicU32,
    reserved: AtomicU32,
    /// The first error.
    pub error: ErrorSlot,
}

const _: () = {
    assert!(size_of::<TaskSlot>() == 40);
    assert!(size_of::<ErrorSlot>() == 56 + ERROR_TEXT);
    assert!(size_of::<Shared>() == 48 + size_of::<ErrorSlot>());
    assert!(align_of::<Shared>() == 8 && align_of::<TaskSlot>() == 8);
};

impl Shared {
    /// Bytes that the area needs for `tasks` tasks; `None` on overflow.
    pub const fn size(tasks: u32) -> Option<usize> {
        match (tasks as usize).checked_mul(size_of::<TaskSlot>()) {
            Some(slots) => slots.checked_add(size_of::<Shared>()),
            None => None,
        }
    }

    /// The slot of task number `ix`.
    ///
    /// # Safety
    /// `shared` points to a mapped area of [`Shared::size`] bytes that lives as long as `'a`.
    pub unsafe fn slot<'a>(shared: *const Shared, ix: u32) -> Option<&'a TaskSlot> {
        // SAFETY: the caller vouches for the head.
        if ix >= unsafe { (*shared).tasks } {
            return None;
        }
        // SAFETY: inside the area, since ix is below its number of slots.
        Some(unsafe { &*shared.add(1).cast::<TaskSlot>().add(ix as usize) })
    }

    /// The open stage.
    pub fn current(&self) -> Stage {
        Stage::from_word(self.stage.load(Ordering::Acquire))
    }

    /// Reports that the caller has passed `stage`; the last one wakes the engine.
    pub fn reach(&self, stage: Stage) {
        if let Some(left) = self.left.get(stage as usize)
            && left.fetch_sub(1, Ordering::AcqRel) == 1
        {
            futex::wake_all(left);
        }
    }

    /// Blocks until `stage` is open. `false`: the restore has failed.
    pub fn await_open(&self, stage: Stage) -> bool {
        loop {
            let word = self.stage.load(Ordering::Acquire);
            match Stage::from_word(word) {
                Stage::Fail => return false,
                now if now >= stage => return true,
                _ => futex::wait_while(&self.stage, word),
            }
        }
    }

    /// Opens `stage` (or tells all that the restore failed). A failure is never taken back.
    pub fn open(&self, stage: Stage) {
        let (word, fail) = (&self.stage, Stage::Fail as u32);
        let _ = word
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |now| (now != fail).then_some(stage as u32));
        futex::wake_all(word);
    }

    /// Takes [`Shared::last_pid_lock`].
    pub fn lock_last_pid(&self) {
        let word = &self.last_pid_lock;
        if word.compare_exchange(0, 1, Ordering::Acquire, Ordering::Acquire).is_ok() {
            return;
        }
        while word.swap(2, Ordering::Acquire) != 0 {
            futex::wait_while(word, 2);
        }
    }

    /// Gives [`Shared::last_pid_lock`] back.
    pub fn unlock_last_pid(&self) {
        if self.last_pid_lock.swap(0, Ordering::Release) == 2 {
            futex::wake_all(&self.last_pid_lock);
        }
    }

    /// Whether `stage` (or a later one) is open. A failure opens nothing.
    pub fn is_open(&self, stage: Stage) -> bool {
        let now = self.current();
        now != Stage::Fail && now >= stage
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zeroed() -> Box<Shared> {
        // SAFETY: all fields are integers, for which zero bytes are a value.
        unsafe { Box::<Shared>::new_zeroed().assume_init() }
    }

    #[test]
    fn only_the_first_error_is_kept() {
        let shared = zeroed();
        assert!(!shared.error.is_claimed());
        assert!(shared.error.claim());
        assert!(shared.error.is_claimed() && !shared.error.is_written());
        assert!(!shared.error.claim());
        shared.error.set_text("fd 7 of task 12: openat".as_bytes());
        shared.error.publish();
        assert!(shared.error.is_written());
        let mut out = [0; ERROR_TEXT];
        let n = shared.error.text(&mut out);
        assert_eq!(&out[..n], b"fd 7 of task 12: openat");
    }

    #[test]
    fn a_long_text_is_cut() {
        let shared = zeroed();
        shared.error.set_text(&[b'x'; ERROR_TEXT + 100]);
        assert_eq!(shared.error.text(&mut [0; ERROR_TEXT]), ERROR_TEXT);
    }

    #[test]
    fn stages_open_in_order_and_a_failure_opens_none() {
        let shared = zeroed();
        for stage in Stage::ALL {
            shared.stage.store(stage as u32, Ordering::Relaxed);
            assert_eq!(shared.current(), stage);
            for other in Stage::ALL {
                assert_eq!(shared.is_open(other), other <= stage);
            }
        }
        shared.stage.store(Stage::Fail as u32, Ordering::Relaxed);
        assert!(!shared.is_open(Stage::Namespaces));
        shared.stage.store(77, Ordering::Relaxed);
        assert_eq!(shared.current(), Stage::Fail);
    }

    #[test]
    fn a_stage_ends_with_the_last_report_and_a_failure_frees_the_waiters() {
        let shared = zeroed();
        let [first, second] =
            [Stage::Restore, Stage::RestoreSigchld].map(|stage| &shared.left[stage as usize]);
        first.store(3, Ordering::Relaxed);
        second.store(3, Ordering::Relaxed);
        std::thread::scope(|s| {
            for _ in 0..3 {
                s.spawn(|| {
                    shared.reach(Stage::Restore);
                    assert!(shared.await_open(Stage::RestoreSigchld));
                    shared.reach(Stage::RestoreSigchld);
                    assert!(!shared.await_open(Stage::Complete));
                });
            }
            futex::wait_until(first, 0);
            shared.open(Stage::RestoreSigchld);
            futex::wait_until(second, 0);
            shared.open(Stage::Fail);
            shared.open(Stage::Complete);
        });
        assert_eq!(shared.current(), Stage::Fail);
    }

    #[test]
    fn the_lock_excludes() {
        let shared = zeroed();
        let inside = AtomicU32::new(0);
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for _ in 0..1000 {
                        shared.lock_last_pid();
                        assert_eq!(inside.fetch_add(1, Ordering::Relaxed), 0);
                        inside.fetch_sub(1, Ordering::Relaxed);
                        shared.unlock_last_pid();
                    }
                });
            }
        });
    }

    #[test]
    fn slots_follow_the_head() {
        let mut words = vec![0u64; Shared::size(3).unwrap() / 8];
        let shared = words.as_mut_ptr().cast::<Shared>();
        // SAFETY: the vector is as large as size(3) says and outlives the slots.
        unsafe {
            (*shared).tasks = 3;
            Shared::slot(shared, 2).unwrap().hole.store(7, Ordering::Relaxed);
            assert!(Shared::slot(shared, 3).is_none());
        }
        assert_eq!(words[(size_of::<Shared>() + 2 * 40 + 8) / 8], 7);
    }
}
