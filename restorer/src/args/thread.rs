//! What one thread gets: registers that no signal frame holds, its rights, and settings that only it can make.

use super::{Siginfo, Table};

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
    /// Which security module [`Creds::profile`] is for, one of [`module`]; says when it is written.
    pub module: u32,
    /// Supplementary groups, `u32` each.
    pub groups: Table<u32>,
    /// What is written to `attr/current`, as the module takes it; empty for nothing.
    pub profile: Table<u8>,
    /// The same for `attr/sockcreate`.
    pub sockcreate: Table<u8>,
}

/// Values of [`Creds::module`].
pub mod module {
    /// Each thread writes its own once it has its other rights.
    pub const APPARMOR: u32 = 1;
    /// A process may only do so while it has one thread: that of the leader is all threads'.
    pub const SELINUX: u32 = 2;
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
    /// Index into [`TaskArgs::creds`](super::TaskArgs::creds).
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
    /// `SCHED_*`, or [`NONE`](super::NONE).
    pub policy: u32,
    /// Real-time priority.
    pub priority: u32,
    /// Nice value.
    pub nice: i32,
    /// Oldest first: indices into [`TaskArgs::filters`](super::TaskArgs::filters).
    pub filters: Table<u32>,
    /// Signal at the parent's death, 0 for none.
    pub pdeath_sig: u32,
    /// Not 0: tile data (AMX) is in the frame.
    pub tiles: u32,
    /// Settings of its own, made while it still has every right.
    pub settings: Table<Setting>,
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

const _: () = {
    assert!(size_of::<RseqArea>() == 16);
    assert!(size_of::<Creds>() == 136);
    assert!(size_of::<Filter>() == 24);
    assert!(size_of::<Setting>() == 48);
    assert!(size_of::<ThreadArgs>() == 192);
    assert!(align_of::<ThreadArgs>() == 8);
};
