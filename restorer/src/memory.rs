//! The address space: the engine's goes, the task's takes its place.
//!
//! # Safety
//! Unmaps everything outside the ranges the engine named; the blob, its stack and the arena are among
//! those that stay.

use blobrt::syscall::{nr, syscall1, syscall2, syscall3, syscall5};
use restorer::{
    args::{MmMap, NONE, Span, flag},
    report::{Call, Object},
};

use crate::{
    fail::{Failed, On},
    image::Task,
};

const MREMAP_MAYMOVE_FIXED: usize = 3;
const PR_SET_MM: usize = 35;
const PR_SET_THP_DISABLE: usize = 41;
const UFFDIO_REGISTER: usize = 0xc020_aa00;
/// Missing pages are reported.
const REGISTER_MISSING: u64 = 1;
const PR_SET_MM_MAP: usize = 14;
/// Size of `struct robust_list_head`.
const ROBUST_HEAD: usize = 24;

/// Takes back what the engine's libc told the kernel about this thread. (The engine itself has given up its
/// restartable sequences area.)
pub fn forget_engine_thread() -> Result<(), Failed> {
    // SAFETY: an empty robust list and no word to clear.
    unsafe {
        syscall2(nr::SET_ROBUST_LIST, 0, ROBUST_HEAD).on(Call::SetRobustList, Object::Robust, 0, 0)?;
        let _ = syscall1(nr::SET_TID_ADDRESS, 0);
    }
    Ok(())
}

/// Moves the vdso out of the way of the unmapping.
pub fn park_vdso(task: &Task) -> Result<(), Failed> {
    task.table(task.args.vdso).iter().try_for_each(|p| remap(p.from, p.park, p.len, Object::Vdso))
}

/// And to its place.
pub fn place_vdso(task: &Task) -> Result<(), Failed> {
    task.table(task.args.vdso).iter().try_for_each(|p| remap(p.park, p.to, p.len, Object::Vdso))
}

/// Unmaps what is between the ranges that stay.
pub fn drop_engine(task: &Task) -> Result<(), Failed> {
    let mut at = 0;
    let end = Span { start: task.args.space_end, end: task.args.space_end };
    for keep in task.table(task.args.keep).iter().chain([&end]) {
        if keep.start > at {
            // SAFETY: outside all that stays.
            unsafe { syscall2(nr::MUNMAP, at as usize, (keep.start - at) as usize) }.on(
                Call::Munmap,
                Object::Old,
                at,
                keep.start,
            )?;
        }
        at = keep.end;
    }
    Ok(())
}

/// Brings the mappings that had to wait to their addresses. They are moved whole: one call each.
pub fn place(task: &Task) -> Result<(), Failed> {
    task.table(task.args.moves).iter().try_for_each(|m| remap(m.from, m.to, m.len, Object::Vma))
}

fn remap(from: u64, to: u64, len: u64, object: Object) -> Result<(), Failed> {
    // SAFETY: nothing that stays is at the destination: the engine checked, and what was its own is
    // gone or, when parking, inside the hole.
    unsafe {
        syscall5(nr::MREMAP, from as usize, len as usize, len as usize, MREMAP_MAYMOVE_FIXED, to as usize)
    }
    .on(Call::Mremap, object, to, to + len)?;
    Ok(())
}

/// Hands the mappings over whose pages come late: from here on touching a missing page waits for its server.
pub fn hand_over(task: &Task) -> Result<(), Failed> {
    for span in task.table(task.args.lazy) {
        // Range, mode, and what the kernel answers.
        let mut register = [span.start, span.end - span.start, REGISTER_MISSING, 0u64];
        let (fd, arg) = (task.args.uffd as usize, (&raw mut register) as usize);
        // SAFETY: the structure is as long as the number says, and alive.
        unsafe { syscall3(nr::IOCTL, fd, UFFDIO_REGISTER, arg) }.on(
            Call::Ioctl,
            Object::Vma,
            span.start,
            span.end,
        )?;
    }
    if task.args.flags & flag::THP_BACK != 0 {
        prctl(PR_SET_THP_DISABLE, 0, Object::Prctl)?;
    }
    Ok(())
}

/// Tells the kernel where code, data, heap, stack, arguments and the executable are.
pub fn describe(task: &Task) -> Result<(), Failed> {
    let map = &raw const task.args.mm;
    // SAFETY: the structure and the vector it points to are in the arena.
    unsafe { syscall5(nr::PRCTL, PR_SET_MM, PR_SET_MM_MAP, map as usize, size_of::<MmMap>(), 0) }.on(
        Call::Prctl,
        Object::MmFields,
        PR_SET_MM_MAP as u64,
        u64::from(task.args.mm.exe_fd != NONE),
    )?;
    Ok(())
}

/// One `prctl` with one argument.
pub fn prctl(option: usize, arg: usize, object: Object) -> Result<usize, Failed> {
    // SAFETY: used with options whose argument is a number or an address in the arena.
    unsafe { syscall5(nr::PRCTL, option, arg, 0, 0, 0) }.on(Call::Prctl, object, option as u64, arg as u64)
}
