//! Mappings as the images have them, checked.

use rcriu_images::pb;

use super::Range;
use crate::arch::TASK_SIZE;
use crate::error::{Error, Result};
use crate::mm::{hugetlb, status as st};

const PAGE: u64 = 4096;
/// The kernel's vsyscall page, the only mapping above user space.
const VSYSCALL: u64 = 0xffff_ffff_ff60_0000;

/// What the restore does with a mapping.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Class {
    /// Private memory, anonymous or over a file.
    Private,
    /// Shared view of a file.
    SharedFile,
    /// Shared anonymous memory number `shmid`.
    SharedAnon,
    /// The vdso's code.
    Vdso,
    /// The vdso's data.
    Vvar,
    /// Guard pages inside other mappings.
    Guard,
    /// Ring of a context for asynchronous I/O.
    AioRing,
    /// System V shared memory number `shmid`.
    Segment,
    /// Rings of the packet socket number `shmid`.
    Socket,
    /// Memory of the io_uring number `shmid`.
    Uring,
    /// Left to the kernel.
    Kernel,
}

/// For messages.
pub fn name(vma: &pb::VmaEntry) -> String {
    format!("mapping {:x}-{:x}", vma.start, vma.end)
}

/// What `vma` is.
///
/// # Errors
/// Kinds that cannot be restored, by name; combinations that make no sense.
pub fn classify(vma: &pb::VmaEntry) -> Result<Class> {
    let has = |bits: u32| vma.status & bits != 0;
    let refuse = |what: &str| Err(Error::unsupported(format!("{what} cannot be restored")));
    if has(st::VSYSCALL) {
        return Ok(Class::Kernel);
    }
    if has(st::GUARD) {
        return Ok(Class::Guard);
    }
    if has(st::AIO_RING) {
        return Ok(Class::AioRing);
    }
    if has(st::SYSVIPC) {
        return Ok(Class::Segment);
    }
    if has(st::SOCKET) {
        return Ok(Class::Socket);
    }
    if has(st::URING) {
        return Ok(Class::Uring);
    }
    if has(st::SHADOW_STACK) {
        return refuse("a user shadow stack");
    }
    if has(st::VDSO) {
        return Ok(Class::Vdso);
    }
    if has(st::VVAR) {
        return Ok(Class::Vvar);
    }
    if !has(st::REGULAR) {
        return refuse(&format!("memory of the unknown kind {:#x}", vma.status));
    }
    match vma.status & (st::FILE_PRIVATE | st::FILE_SHARED | st::ANON_SHARED | st::ANON_PRIVATE) {
        st::FILE_PRIVATE | st::ANON_PRIVATE => Ok(Class::Private),
        st::FILE_SHARED => Ok(Class::SharedFile),
        st::ANON_SHARED => Ok(Class::SharedAnon),
        other => Err(Error::image(format!("status {:#x} has {other:#x}, which makes no sense", vma.status))),
    }
}

/// Checks the mappings of a task: whole pages of user space, ascending, none over another.
pub fn check(vmas: &[pb::VmaEntry]) -> Result<()> {
    let mut end = 0;
    for vma in vmas {
        let bad = |what: &str| Err(Error::image(format!("{}: {what}", name(vma))));
        if vma.start >= vma.end || vma.start % PAGE != 0 || vma.end % PAGE != 0 {
            return bad("not a range of whole pages");
        }
        let whole = hugetlb::alignment(vma);
        if vma.start % whole != 0 || vma.end % whole != 0 {
            return bad("not a range of whole huge pages");
        }
        if vma.end > TASK_SIZE && vma.start != VSYSCALL {
            return bad("outside the address space of this kernel");
        }
        // Guard pages are told as ranges inside other mappings.
        if vma.status & st::GUARD != 0 {
            continue;
        }
        if vma.start < end {
            return bad("overlaps the one before");
        }
        end = vma.end;
    }
    Ok(())
}

/// The addresses of mappings that will be there.
pub fn ranges(vmas: &[pb::VmaEntry]) -> impl Iterator<Item = Range> {
    vmas.iter().filter(|v| v.start != VSYSCALL).map(|v| (v.start, v.end))
}

/// Flags of mmap(2) that make the mapping, but for those that place it.
pub fn map_flags(vma: &pb::VmaEntry) -> u32 {
    const DROPPABLE: u32 = 0x08;
    let known = (libc::MAP_SHARED
        | libc::MAP_PRIVATE
        | libc::MAP_ANONYMOUS
        | libc::MAP_GROWSDOWN
        | libc::MAP_NORESERVE
        | libc::MAP_HUGETLB) as u32;
    vma.flags & (known | hugetlb::SIZE_MASK | DROPPABLE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vma(start: u64, end: u64, status: u32) -> pb::VmaEntry {
        pb::VmaEntry { start, end, status, ..Default::default() }
    }

    #[test]
    fn hostile_ranges_are_refused() {
        let ok = |list: &[pb::VmaEntry]| check(list).map_err(|e| e.to_string());
        assert_eq!(ok(&[vma(0x1000, 0x2000, 1), vma(0x2000, 0x9000, 1)]), Ok(()));
        assert_eq!(ok(&[vma(VSYSCALL, VSYSCALL + PAGE, 4)]), Ok(()));
        assert_eq!(ok(&[vma(0x1000, 0x9000, 1), vma(0x3000, 0x4000, st::GUARD)]), Ok(()));
        for bad in [
            vec![vma(0x1000, 0x1000, 1)],
            vec![vma(0x2000, 0x1000, 1)],
            vec![vma(0x1001, 0x2000, 1)],
            vec![vma(0x1000, u64::MAX, 1)],
            vec![vma(0x7fff_ffff_f000, 0x8000_0000_0000, 1)],
            vec![vma(0x1000, 0x3000, 1), vma(0x2000, 0x4000, 1)],
        ] {
            assert!(check(&bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn kinds_are_told_apart_and_refused_by_name() {
        let class = |status| classify(&vma(0, 4096, status)).map_err(|e| e.to_string());
        assert_eq!(class(st::REGULAR | st::ANON_PRIVATE), Ok(Class::Private));
        assert_eq!(class(st::REGULAR | st::FILE_SHARED | st::MEMFD), Ok(Class::SharedFile));
        assert_eq!(class(st::REGULAR | st::VDSO | st::ANON_PRIVATE), Ok(Class::Vdso));
        assert_eq!(class(st::VSYSCALL | st::ANON_PRIVATE), Ok(Class::Kernel));
        assert_eq!(class(st::AIO_RING), Ok(Class::AioRing));
        assert_eq!(class(st::REGULAR | st::SYSVIPC | st::ANON_SHARED), Ok(Class::Segment));
        assert_eq!(class(st::REGULAR | st::SOCKET), Ok(Class::Socket));
        assert_eq!(class(st::REGULAR | st::URING), Ok(Class::Uring));
        assert!(class(st::REGULAR | st::SHADOW_STACK).unwrap_err().contains("shadow stack"));
        assert!(class(st::REGULAR | st::ANON_PRIVATE | st::FILE_SHARED).is_err());
        assert!(class(0).is_err());
    }
}
