//! What the kernel's flags of a mapping mean for its entry, and those that could not be given back.

use super::{MAP_DROPPABLE, Vma};
use crate::{
    error::{Context, Error, Result},
    mm::status as st,
    procfs::{
        excerpt,
        maps::{Map, VmFlags},
    },
};

const BY_FLAGS: [(u64, i32); 4] = [
    (VmFlags::GROWS_DOWN, libc::MAP_GROWSDOWN),
    (VmFlags::LOCKED, libc::MAP_LOCKED),
    (VmFlags::NO_RESERVE, libc::MAP_NORESERVE),
    (VmFlags::HUGETLB, libc::MAP_HUGETLB),
];

/// madvise(2) numbers of the flags it sets.
const MADVISE: [(u64, i32); 8] = [
    (VmFlags::SEQ_READ, libc::MADV_SEQUENTIAL),
    (VmFlags::RAND_READ, libc::MADV_RANDOM),
    (VmFlags::DONT_COPY, libc::MADV_DONTFORK),
    (VmFlags::DONT_DUMP, libc::MADV_DONTDUMP),
    (VmFlags::MERGEABLE, libc::MADV_MERGEABLE),
    (VmFlags::HUGE_PAGE, libc::MADV_HUGEPAGE),
    (VmFlags::NO_HUGE_PAGE, libc::MADV_NOHUGEPAGE),
    (VmFlags::WIPE_ON_FORK, libc::MADV_WIPEONFORK),
];

/// Completes `flags` of an entry, and its `madv`, by what the kernel's flags tell.
pub(super) fn told_by_flags(map: &Map, mut flags: u32) -> (u32, Option<u64>) {
    for (bit, flag) in BY_FLAGS {
        if map.flags.any(bit) {
            flags |= flag as u32;
        }
    }
    if map.flags.any(VmFlags::DROPPABLE) {
        // A mapping type of its own, in place of MAP_PRIVATE.
        flags = flags & !(libc::MAP_PRIVATE as u32) | MAP_DROPPABLE;
    }
    let madv = MADVISE.iter().filter(|(bit, _)| map.flags.any(*bit)).map(|(_, advice)| 1u64 << advice).sum();
    (flags, (madv != 0).then_some(madv))
}

/// Makes entries of what flags of their mappings tell now; `maps` are those that `vmas` were made of.
///
/// # Errors
/// Flags that cannot be kept, or with which the entry would have been another one.
pub fn refresh(vmas: &mut [Vma], maps: &[Map]) -> Result<()> {
    let kind = (libc::MAP_HUGETLB as u32) | MAP_DROPPABLE;
    let all = BY_FLAGS.iter().fold(0, |all, (_, flag)| all | *flag as u32) & !kind;
    let mut maps = maps.iter().peekable();
    for vma in vmas {
        let entry = &mut vma.entry;
        while maps.next_if(|m| m.start < entry.start).is_some() {}
        let Some(map) = maps.peek().filter(|m| m.start == entry.start) else { continue };
        let during = || format!("mapping {:x}-{:x} {}", map.start, map.end, excerpt(&map.name));
        check_flags(map, entry.status).during(during)?;
        let had = entry.flags;
        (entry.flags, entry.madv) = told_by_flags(map, had & !all);
        if (had ^ entry.flags) & kind != 0 {
            return Err(Error::host(
                "it was mapped a moment before the dump, in huge pages or as droppable memory",
            )
            .remedy("dump again"))
            .during(during);
        }
    }
    Ok(())
}

/// The refusal of memory that is registered with a userfaultfd of the program, or of another one for it.
pub fn foreign_userfaultfd() -> Error {
    Error::unsupported("the range is registered with a userfaultfd, which cannot be kept")
        .remedy("unregister it for the time of the dump")
}

/// Refuses what could not be given back, and warns of what the format cannot say.
pub(super) fn check_flags(map: &Map, status: u32) -> Result<()> {
    // Kernels before 6.10 map the memory of an io_uring as raw page frames.
    let kernels = status & (st::VSYSCALL | st::VDSO | st::VVAR | st::URING) != 0;
    let refuse = |what: &str| Err(Error::unsupported(what.to_owned()));
    if map.flags.any(VmFlags::IO | VmFlags::PFNMAP) && !kernels {
        return refuse("memory of a device cannot be dumped");
    }
    // Write protection alone may be our own tracking of changes, which `track` knows.
    if map.flags.any(VmFlags::UFFD_MISSING | VmFlags::UFFD_MINOR) {
        return Err(foreign_userfaultfd());
    }
    if map.flags.any(VmFlags::SHADOW_STACK) {
        return Err(Error::unsupported("user shadow stacks are not supported")
            .remedy("start the program with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off"));
    }
    if map.flags.any(VmFlags::NON_LINEAR) {
        return refuse("non-linear mappings (remap_file_pages) are not supported");
    }
    if map.flags.any(VmFlags::SYNC) {
        return refuse("MAP_SYNC mappings are not supported");
    }
    if let Some(code) = map.flags.unknown.iter().find(|c| *c != b"??") {
        return Err(Error::unsupported(format!(
            "mapping flag {:?} of this kernel is not known, it might be lost",
            String::from_utf8_lossy(code)
        )));
    }
    Ok(())
}
