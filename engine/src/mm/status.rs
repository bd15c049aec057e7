//! Bits of `vma_entry.status`: a part of the image format that is not in the schema.

/// Its content is dumped and restored (mappings of the kernel are not).
pub const REGULAR: u32 = 1 << 0;
/// Old images: a stack.
pub const STACK: u32 = 1 << 1;
/// The kernel's vsyscall page.
pub const VSYSCALL: u32 = 1 << 2;
/// The vdso.
pub const VDSO: u32 = 1 << 3;
/// The heap of brk(2).
pub const HEAP: u32 = 1 << 5;
/// Private mapping of the file `shmid`.
pub const FILE_PRIVATE: u32 = 1 << 6;
/// Shared mapping of the file `shmid`.
pub const FILE_SHARED: u32 = 1 << 7;
/// Shared anonymous memory number `shmid`.
pub const ANON_SHARED: u32 = 1 << 8;
/// Private anonymous memory.
pub const ANON_PRIVATE: u32 = 1 << 9;
/// System V shared memory.
pub const SYSVIPC: u32 = 1 << 10;
/// Ring of a packet socket.
pub const SOCKET: u32 = 1 << 11;
/// Data pages of the vdso.
pub const VVAR: u32 = 1 << 12;
/// Ring of native AIO.
pub const AIO_RING: u32 = 1 << 13;
/// The file is a memfd, or anonymous shared memory dumped as one.
pub const MEMFD: u32 = 1 << 14;
/// User shadow stack.
pub const SHADOW_STACK: u32 = 1 << 15;
/// Memory of the io_uring `shmid`: of sets written here, other readers refuse its file.
pub const URING: u32 = 1 << 24;
/// No mapping: a range of guard pages (MADV_GUARD_INSTALL) inside others.
pub const GUARD: u32 = 1 << 16;
