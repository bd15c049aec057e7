//! The arguments of the restorer: one arena that the engine fills and the blob reads.
//!
//! Everything lies in one range of addresses, the hole, which no mapping of the task touches and which
//! goes away last:
//!
//! ```text
//! hole
//! | blob code r-x | blob data rw- | Shared rw- | arena rw-                                   | parked |
//!                                              | TaskArgs | tables ... | stacks and frames  | vdso   |
//! ```
//!
//! Inside the arena things are found by offset from its start, never by pointer; addresses in fields
//! are addresses of the task being restored.

mod memory;
mod table;
mod thread;

pub use memory::{MmMap, Move, Span, VdsoPart};
pub use table::Table;
pub use thread::{Creds, Filter, RseqArea, Segment, Setting, ThreadArgs, module};

/// Marks a number that is not there (an index, a mode).
pub const NONE: u32 = u32::MAX;

/// The kernel's view of one signal action.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Action {
    /// Handler, 0 default, 1 ignore.
    pub handler: u64,
    /// `SA_*`.
    pub flags: u64,
    /// Where handlers return to.
    pub restorer: u64,
    /// Signals blocked meanwhile.
    pub mask: u64,
    /// Signal number.
    pub signal: u32,
    /// Padding.
    pub pad: u32,
}

/// `struct itimerval`: interval and rest, each as seconds and microseconds.
pub type Itimer = [u64; 4];

/// A POSIX timer.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PosixTimer {
    /// Its id, which the program knows it by.
    pub id: u32,
    /// `CLOCK_*`, or a CPU clock of a process or thread.
    pub clock: i32,
    /// Signal to send.
    pub signal: u32,
    /// `SIGEV_*`.
    pub notify: u32,
    /// `sigev_value`.
    pub value: u64,
    /// Thread to notify for `SIGEV_THREAD_ID`.
    pub tid: u32,
    /// Padding.
    pub pad: u32,
    /// Interval and rest, each as seconds and nanoseconds.
    pub spec: [u64; 4],
}

/// A resource limit.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Limit {
    /// Soft limit, all ones for none.
    pub soft: u64,
    /// Hard limit.
    pub hard: u64,
    /// `RLIMIT_*`.
    pub resource: u32,
    /// Padding.
    pub pad: u32,
}

/// `siginfo_t` as the kernel gives and takes it.
pub type Siginfo = [u64; 16];

/// A system call on a descriptor with a small structure: what must come when nothing else is opened or closed.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Late {
    /// Number of the call: `fcntl`, `ioctl`, `timerfd_settime`.
    pub call: u32,
    /// Descriptor, the first argument.
    pub fd: u32,
    /// Second argument.
    pub arg: u64,
    /// What the third argument points to.
    pub data: [u64; 4],
}

/// Bits of [`TaskArgs::flags`].
pub mod flag {
    /// `clone3` can choose the thread id; otherwise `ns_last_pid` is written.
    pub const CLONE3: u32 = 1;
    /// `prctl(PR_TIMER_CREATE_RESTORE_IDS)` works; otherwise ids are reached by trying.
    pub const TIMER_IDS: u32 = 2;
    /// Transparent huge pages were switched off for the process.
    pub const THP_DISABLED: u32 = 4;
    /// The process adopts orphans below it.
    pub const SUBREAPER: u32 = 8;
    /// The engine switched transparent huge pages off while it filled memory; they are switched on again.
    pub const THP_BACK: u32 = 16;
}

/// Head of the arena.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct TaskArgs {
    /// [`crate::BUILD`] as the engine knows it.
    pub build: u64,
    /// Address of the [`crate::Shared`] area inside the hole.
    pub shared: u64,
    /// Virtual pid.
    pub pid: i32,
    /// Bits of [`flag`].
    pub flags: u32,
    /// userfaultfd of this address space, or [`NONE`]; in one of the ranges of [`TaskArgs::close`].
    pub uffd: u32,
    /// Descriptor of a /proc that knows the task, for what is written there last, or [`NONE`]; in none of the
    /// ranges of [`TaskArgs::close`].
    pub proc: u32,
    /// Number of this task's [`crate::TaskSlot`].
    pub slot: u32,
    /// Padding.
    pub pad: u32,
    /// Mappings that it serves.
    pub lazy: Table<Span>,
    /// What stays, sorted and disjoint; the hole is among it. All else below [`TaskArgs::space_end`] goes.
    pub keep: Table<Span>,
    /// First address above everything that may be unmapped.
    pub space_end: u64,
    /// Mappings that wait elsewhere.
    pub moves: Table<Move>,
    /// vvar and vdso.
    pub vdso: Table<VdsoPart>,
    /// The memory descriptor's addresses.
    pub mm: MmMap,
    /// The auxiliary vector that [`MmMap::auxv`] gives the address of.
    pub auxv: Table<u64>,
    /// Descriptors to close, first and last of each range, once every task has its memory: tasks that share
    /// a table need them till then.
    pub close: Table<[u32; 2]>,
    /// `personality(2)`.
    pub personality: u32,
    /// `MEMBARRIER_CMD_REGISTER_*` bits.
    pub membarrier: u32,
    /// `PR_SET_DUMPABLE`: 0, 1; 2 keeps what the kernel chose or falls back to 0; [`NONE`] leaves it.
    pub dumpable: u32,
    /// Descriptor of `ns_last_pid`, or [`NONE`]; in one of the ranges of [`TaskArgs::close`].
    pub last_pid_fd: u32,
    /// Signal actions of the process.
    pub actions: Table<Action>,
    /// Real, virtual and profiling interval timer.
    pub itimers: [Itimer; 3],
    /// POSIX timers.
    pub timers: Table<PosixTimer>,
    /// Resource limits.
    pub limits: Table<Limit>,
    /// Signals pending for the process.
    pub queued: Table<Siginfo>,
    /// Calls on descriptors, in order, after [`TaskArgs::close`].
    pub late: Table<Late>,
    /// Distinct credentials.
    pub creds: Table<Creds>,
    /// Distinct seccomp filters.
    pub filters: Table<Filter>,
    /// Threads, the leader first.
    pub threads: Table<ThreadArgs>,
    /// What the leader does at the very end: one-way settings.
    pub last: Table<Setting>,
}

const _: () = {
    assert!(size_of::<Action>() == 40);
    assert!(size_of::<PosixTimer>() == 64);
    assert!(size_of::<Limit>() == 24);
    assert!(size_of::<Late>() == 48);
    assert!(size_of::<Siginfo>() == 128);
    assert!(size_of::<TaskArgs>() == 504);
    assert!(align_of::<TaskArgs>() == 8);
};
