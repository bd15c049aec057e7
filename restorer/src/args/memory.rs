//! Memory: what stays, what moves, and the addresses that the kernel keeps of a process.

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
    /// Descriptor of the executable, or [`NONE`](super::NONE) to leave it.
    pub exe_fd: u32,
}

const _: () = assert!(size_of::<MmMap>() == 104);
