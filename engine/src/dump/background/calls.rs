//! What system calls do to memory that is still to be read: which have to wait, and for what part of it.

use crate::sys::ptrace_calls::Entry;

/// Part of the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Nothing,
    /// From the first address to before the second.
    Range(u64, u64),
    All,
}

/// `shmat(2)` over what is there.
const SHM_REMAP: u64 = 0o40000;
const PR_SET_MEMORY_MERGE: u64 = 67;
const MADV_COLLAPSE: i32 = 25;
const MADV_GUARD_INSTALL: i32 = 102;
const MADV_DONTNEED_LOCKED: i32 = 24;
const SYS_MSEAL: i64 = 462;
const SYS_MAP_SHADOW_STACK: i64 = 453;

fn range(start: u64, len: u64) -> Part {
    let end = start.saturating_add(len).checked_next_multiple_of(4096).unwrap_or(u64::MAX);
    if len == 0 { Part::Nothing } else { Part::Range(start & !0xfff, end) }
}

/// Memory whose content the call may take away. `heap` is where brk(2) ended.
pub fn takes(entry: &Entry, heap: u64) -> Part {
    let Entry { nr: Some(nr), args } = entry else { return Part::All };
    let fixed = libc::MAP_FIXED as u64;
    match *nr as i64 {
        libc::SYS_munmap => range(args[0], args[1]),
        libc::SYS_mmap if args[3] & fixed != 0 => range(args[0], args[1]),
        libc::SYS_madvise => match args[2] as i32 {
            libc::MADV_DONTNEED
            | libc::MADV_FREE
            | libc::MADV_REMOVE
            | libc::MADV_HWPOISON
            | libc::MADV_SOFT_OFFLINE
            | MADV_DONTNEED_LOCKED
            | MADV_COLLAPSE
            | MADV_GUARD_INSTALL => range(args[0], args[1]),
            _ => Part::Nothing,
        },
        libc::SYS_mremap => {
            let (start, end) = (args[0] & !0xfff, args[0].saturating_add(args[1]));
            match args[3] & libc::MREMAP_FIXED as u64 {
                0 => range(args[0], args[1]),
                _ => Part::Range(start.min(args[4]), end.max(args[4].saturating_add(args[2]))),
            }
        }
        // A smaller heap; 0 and what is no address only ask.
        libc::SYS_brk if args[0] != 0 && args[0] < heap => Part::Range(args[0] & !0xfff, heap),
        libc::SYS_shmat if args[2] & SHM_REMAP != 0 => Part::All,
        libc::SYS_execve | libc::SYS_execveat | libc::SYS_process_madvise | libc::SYS_remap_file_pages => {
            Part::All
        }
        _ => Part::Nothing,
    }
}

/// Mappings whose flags, or whose being there at all, the call may change.
pub fn changes(entry: &Entry, heap: u64) -> Part {
    let Entry { nr: Some(nr), args } = entry else { return Part::All };
    match *nr as i64 {
        libc::SYS_mprotect
        | libc::SYS_pkey_mprotect
        | libc::SYS_mlock
        | libc::SYS_mlock2
        | libc::SYS_munlock => range(args[0], args[1]),
        // Advice that leaves the mapping as it is.
        libc::SYS_madvise
            if matches!(
                args[2] as i32,
                libc::MADV_DONTNEED
                    | libc::MADV_FREE
                    | libc::MADV_REMOVE
                    | libc::MADV_WILLNEED
                    | libc::MADV_COLD
                    | libc::MADV_PAGEOUT
                    | libc::MADV_POPULATE_READ
                    | libc::MADV_POPULATE_WRITE
            ) =>
        {
            Part::Nothing
        }
        libc::SYS_madvise | SYS_MSEAL => range(args[0], args[1]),
        libc::SYS_mlockall | libc::SYS_munlockall | libc::SYS_userfaultfd | SYS_MAP_SHADOW_STACK => Part::All,
        libc::SYS_prctl if args[0] == PR_SET_MEMORY_MERGE => Part::All,
        _ => takes(entry, heap),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(nr: i64, args: [u64; 5]) -> Entry {
        let [a, b, c, d, e] = args;
        Entry { nr: Some(nr as u64), args: [a, b, c, d, e, 0] }
    }

    #[test]
    fn only_what_takes_memory_away_waits_for_it() {
        let takes = |nr, args| takes(&call(nr, args), 0x9000);
        assert_eq!(takes(libc::SYS_read, [1, 2, 3, 4, 5]), Part::Nothing);
        assert_eq!(takes(libc::SYS_munmap, [0x1000, 0x1001, 0, 0, 0]), Part::Range(0x1000, 0x3000));
        assert_eq!(takes(libc::SYS_munmap, [0x1000, u64::MAX, 0, 0, 0]), Part::Range(0x1000, u64::MAX));
        assert_eq!(takes(libc::SYS_mmap, [0x1000, 0x1000, 3, 0x22, 0]), Part::Nothing);
        assert_eq!(takes(libc::SYS_mmap, [0x1000, 0x1000, 3, 0x32, 0]), Part::Range(0x1000, 0x2000));
        assert_eq!(takes(libc::SYS_madvise, [0x1000, 0x1000, 4, 0, 0]), Part::Range(0x1000, 0x2000));
        assert_eq!(takes(libc::SYS_madvise, [0x1000, 0x1000, 3, 0, 0]), Part::Nothing);
        assert_eq!(takes(libc::SYS_mremap, [0x1000, 0x1000, 0x4000, 1, 0]), Part::Range(0x1000, 0x2000));
        assert_eq!(takes(libc::SYS_mremap, [0x9000, 0x1000, 0x1000, 3, 0x4000]), Part::Range(0x4000, 0xa000));
        assert_eq!(takes(libc::SYS_brk, [0, 0, 0, 0, 0]), Part::Nothing);
        assert_eq!(takes(libc::SYS_brk, [0xa000, 0, 0, 0, 0]), Part::Nothing);
        assert_eq!(takes(libc::SYS_brk, [0x7010, 0, 0, 0, 0]), Part::Range(0x7000, 0x9000));
        assert_eq!(takes(libc::SYS_execve, [0; 5]), Part::All);
        assert_eq!(super::takes(&Entry::default(), 0), Part::All);
    }

    #[test]
    fn what_changes_flags_waits_until_they_are_read() {
        let changes = |nr, args| changes(&call(nr, args), 0);
        assert_eq!(changes(libc::SYS_madvise, [0x1000, 0x1000, 14, 0, 0]), Part::Range(0x1000, 0x2000));
        assert_eq!(changes(libc::SYS_madvise, [0x1000, 0x1000, 3, 0, 0]), Part::Nothing);
        assert_eq!(changes(libc::SYS_madvise, [0x1000, 0x1000, 4, 0, 0]), Part::Nothing);
        assert_eq!(changes(libc::SYS_mlock, [0x1000, 1, 0, 0, 0]), Part::Range(0x1000, 0x2000));
        assert_eq!(changes(libc::SYS_mlockall, [0; 5]), Part::All);
        assert_eq!(changes(libc::SYS_munmap, [0x1000, 1, 0, 0, 0]), Part::Range(0x1000, 0x2000));
        assert_eq!(changes(libc::SYS_prctl, [15, 0, 0, 0, 0]), Part::Nothing);
        assert_eq!(changes(libc::SYS_write, [0; 5]), Part::Nothing);
    }
}
