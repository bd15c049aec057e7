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
//!
//! # Safety
//!
//! Tables are plain data; unsafe code here only turns offsets that were checked against the arena into views.

use core::marker::PhantomData;

/// Marks a number that is not there (an index, a mode).
pub const NONE: u32 = u32::MAX;

/// A row of `T` inside the arena.
#[repr(C)]
#[derive(Debug)]
pub struct Table<T> {
    /// Bytes from the start of the arena, a multiple of 8.
    pub offset: u64,
    /// Number of elements.
    pub count: u64,
    of: PhantomData<T>,
}

impl<T> Clone for Table<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Table<T> {}
impl<T> PartialEq for Table<T> {
    fn eq(&self, other: &Self) -> bool {
        (self.offset, self.count) == (other.offset, other.count)
    }
}
impl<T> Eq for Table<T> {}
impl<T> Default for Table<T> {
    fn default() -> Self {
        Table::new(0, 0)
    }
}

impl<T> Table<T> {
    /// The row of `count` elements at `offset`.
    pub const fn new(offset: u64, count: u64) -> Self {
        Table { offset, count, of: PhantomData }
    }

    /// The elements.
    ///
    /// # Safety
    /// `args` heads an arena in which this table was laid out; nobody writes to it during `'a`.
    pub unsafe fn get<'a>(self, args: *const TaskArgs) -> &'a [T] {
        if self.count == 0 {
            return &[];
        }
        // SAFETY: the engine laid the table out inside the arena, aligned to 8.
        unsafe {
            let first = args.cast::<u8>().add(self.offset as usize).cast::<T>();
            core::slice::from_raw_parts(first, self.count as usize)
        }
    }
}

/// Addresses from `start` up to, not including, `end`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Span {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
}

/// A mapping that has to move, whole, to another place.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Move {
    /// Where it is.
    pub from: u64,
    /// Where it goes.
    pub to: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// One part of the block of vvar and vdso mappings.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VdsoPart {
    /// Where the engine's process has it.
    pub from: u64,
    /// Where it waits while everything else is unmapped; inside the hole.
    pub park: u64,
    /// Where it ends up.
    pub to: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// `struct prctl_mm_map` of the kernel (`linux/prctl.h`).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[allow(missing_docs)]
pub struct MmMap {
    pub start_code: u64,
    pub end_code: u64,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub brk: u64,
    pub start_stack: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
    /// Address of the auxiliary vector to copy.
    pub auxv: u64,
    /// Its length in bytes.
    pub auxv_size: u32,
    /// Descriptor of the executable, or [`NONE`] to leave it.
    pub exe_fd: u32,
}

/// A registered restartable sequences area (`rseq(2)`); `len` 0 for none.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RseqArea {
    /// Address of the structure.
    pub addr: u64,
    /// Length it was registered with.
    pub len: u32,
    /// Signature before abort handlers.
    pub sig: u32,
}

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

/// Credentials of a thread.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Creds {
    /// Real, effective, saved, file system user id.
    pub uid: [u32; 4],
    /// Real, effective, saved, file system group id.
    pub gid: [u32; 4],
    /// Capability sets as bit masks.
    pub inheritable: u64,
    /// As above.
    pub permitted: u64,
    /// As above.
    pub effective: u64,
    /// Capabilities to drop from the bounding set.
    pub bounding_drop: u64,
    /// As above.
    pub ambient: u64,
    /// `SECBIT_*`.
    pub securebits: u32,
    /// 1 if `PR_SET_NO_NEW_PRIVS` is to be set.
    pub no_new_privs: u32,
    /// 0 if the engine's own are the same but perhaps for `no_new_privs`.
    pub change: u32,
    /// Padding.
    pub pad: u32,
    /// Supplementary groups, `u32` each.
    pub groups: Table<u32>,
}

/// A seccomp filter.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Filter {
    /// `struct sock_filter` each.
    pub code: Table<u64>,
    /// `SECCOMP_FILTER_FLAG_*`.
    pub flags: u64,
}

/// `struct user_desc`, a segment of the thread's GDT.
pub type Segment = [u32; 4];

/// One thread.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ThreadArgs {
    /// Its number in its own pid namespace.
    pub tid: i32,
    /// Index into [`TaskArgs::creds`].
    pub creds: u32,
    /// End of the stack it runs the blob on.
    pub stack_top: u64,
    /// The frame it leaves by: address of the return address slot in front of the `ucontext`.
    pub frame: u64,
    /// Base of FS.
    pub fs_base: u64,
    /// Base of GS.
    pub gs_base: u64,
    /// Selectors ds, es, fs, gs; 0 for 64-bit programs.
    pub selectors: [u16; 4],
    /// Segments for `set_thread_area`.
    pub segments: Table<Segment>,
    /// Word that is cleared when the thread ends, 0 for none.
    pub clear_tid: u64,
    /// Head of the robust futex list, 0 for none.
    pub robust: u64,
    /// Its size as told to the kernel.
    pub robust_len: u64,
    /// Restartable sequences.
    pub rseq: RseqArea,
    /// Signals pending for this thread only.
    pub queued: Table<Siginfo>,
    /// Command name, zero-terminated.
    pub comm: [u8; 16],
    /// 0 none, 1 strict, 2 filters.
    pub seccomp: u32,
    /// `SCHED_*`, or [`NONE`].
    pub policy: u32,
    /// Real-time priority.
    pub priority: u32,
    /// Nice value.
    pub nice: i32,
    /// Oldest first: indices into [`TaskArgs::filters`].
    pub filters: Table<u32>,
    /// Signal at the parent's death, 0 for none.
    pub pdeath_sig: u32,
    /// Not 0: tile data (AMX) is in the frame.
    pub tiles: u32,
    /// Settings of its own, made while it still has every right.
    pub settings: Table<Setting>,
}

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

/// A system call of a thread for a setting that only it can make.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Setting {
    /// Number of the call.
    pub call: u32,
    /// Bit N says that argument N is not a number but a place in the arena.
    pub places: u32,
    /// Arguments.
    pub args: [u64; 5],
}

impl Setting {
    /// System call `number`.
    pub fn call(number: i64, args: [u64; 5]) -> Setting {
        Setting { call: number as u32, places: 0, args }
    }

    /// `prctl(2)`.
    pub fn prctl(option: u64, [a, b, c, d]: [u64; 4]) -> Setting {
        Setting { call: blobrt::syscall::nr::PRCTL as u32, places: 0, args: [option, a, b, c, d] }
    }

    /// The same with argument `n` as a place in the arena.
    pub fn pointing(self, n: u32) -> Setting {
        Setting { places: self.places | 1 << n, ..self }
    }
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
    assert!(size_of::<Table<u8>>() == 16);
    assert!(size_of::<MmMap>() == 104);
    assert!(size_of::<RseqArea>() == 16);
    assert!(size_of::<Action>() == 40);
    assert!(size_of::<PosixTimer>() == 64);
    assert!(size_of::<Limit>() == 24);
    assert!(size_of::<Late>() == 48);
    assert!(size_of::<Siginfo>() == 128);
    assert!(size_of::<Creds>() == 104);
    assert!(size_of::<Filter>() == 24);
    assert!(size_of::<Setting>() == 48);
    assert!(size_of::<ThreadArgs>() == 192);
    assert!(size_of::<TaskArgs>() == 496);
    assert!(align_of::<TaskArgs>() == 8 && align_of::<ThreadArgs>() == 8);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_finds_its_elements_from_the_start_of_the_arena() {
        let mut words = vec![0u64; size_of::<TaskArgs>() / 8 + 4];
        let at = size_of::<TaskArgs>() / 8;
        words[at..].copy_from_slice(&[1, 2, 3, 4]);
        let args = words.as_ptr().cast::<TaskArgs>();
        let table: Table<Span> = Table::new(size_of::<TaskArgs>() as u64, 2);
        // SAFETY: both spans lie inside the vector.
        let spans = unsafe { table.get(args) };
        assert_eq!(spans, [Span { start: 1, end: 2 }, Span { start: 3, end: 4 }]);
        // SAFETY: an empty table reads nothing.
        assert!(unsafe { Table::<Span>::new(u64::MAX, 0).get(args) }.is_empty());
    }
}
