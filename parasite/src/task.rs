//! What a process can only be asked from inside, as a whole.
//!
//! # Safety
//! Read-only calls with addresses of locals, except for umask, which can only be read by setting it:
//! it is set back by the next instruction.

use blobrt::syscall::{Errno, nr, syscall1, syscall2, syscall3, syscall4, syscall5};

use crate::plain;

plain! {
    /// The process as it sees itself. Fields that are `i64` hold a negative error number where the
    /// kernel has no such call.
    pub struct TaskInfo[112] {
        /// Its pid in its own pid namespace.
        pub pid: i32,
        /// Parent's pid there, 0 if the parent is outside.
        pub ppid: i32,
        /// Process group there, 0 if its leader is outside.
        pub pgid: i32,
        /// Session there, 0 if its leader is outside.
        pub sid: i32,
        /// End of the heap.
        pub brk: u64,
        /// File mode mask.
        pub umask: i64,
        /// `PR_GET_DUMPABLE`.
        pub dumpable: i64,
        /// `PR_GET_THP_DISABLE`.
        pub thp_disabled: i64,
        /// `PR_GET_CHILD_SUBREAPER`.
        pub child_subreaper: i64,
        /// `PR_GET_MDWE`: memory-deny-write-execute bits (Linux 6.3).
        pub mdwe: i64,
        /// `PR_GET_MEMORY_MERGE`: KSM for all memory (Linux 6.4).
        pub memory_merge: i64,
        /// `MEMBARRIER_CMD_GET_REGISTRATIONS` (Linux 6.3).
        pub membarrier: i64,
        /// `ARCH_GET_XCOMP_PERM`: processor state components that were asked for (Linux 5.16).
        pub xcomp_perm: i64,
        /// Bytes of local segment descriptors that modify_ldt(2) tells; 0 for none.
        pub ldt: i64,
        /// Memory protection keys that are allocated, as a bit mask; 0 on a processor without.
        pub pkeys: i64,
        /// Whether new memory is locked (MCL_FUTURE of mlockall(2)): -EBUSY if so, 0 if not.
        pub own_memory: i64,
    }
}

const PR_GET_DUMPABLE: usize = 3;
const PR_GET_CHILD_SUBREAPER: usize = 37;
const PR_GET_THP_DISABLE: usize = 42;
const PR_GET_MDWE: usize = 66;
const PR_GET_MEMORY_MERGE: usize = 68;
const MEMBARRIER_CMD_GET_REGISTRATIONS: usize = 1 << 9;
const MS_INVALIDATE: usize = 2;
const MODIFY_LDT_READ: usize = 0;
/// Keys that x86 has, and what asking for one that is not allocated gives.
const PKEYS: usize = 16;
const ENOMEM: i32 = 12;
const ARCH_GET_XCOMP_PERM: usize = 0x1022;

/// The raw answer of a read-only prctl without further arguments.
pub(crate) fn prctl(option: usize) -> i64 {
    // SAFETY: the options passed here take no address.
    value(unsafe { syscall5(nr::PRCTL, option, 0, 0, 0, 0) })
}

/// A prctl that stores an integer.
pub(crate) fn prctl_int(option: usize) -> i64 {
    let mut v = 0i32;
    // SAFETY: the options passed here store one int.
    match unsafe { syscall5(nr::PRCTL, option, (&raw mut v) as usize, 0, 0, 0) } {
        Ok(_) => i64::from(v),
        Err(e) => -i64::from(e.0),
    }
}

/// The value, or the error number negated.
pub(crate) fn value(r: blobrt::syscall::Result<usize>) -> i64 {
    match r {
        Ok(v) => v as i64,
        Err(e) => -i64::from(e.0),
    }
}

/// Which protection keys are allocated. The kernel looks at the key before it looks for the mapping: where
/// nothing can be mapped, an allocated key gets ENOMEM, another one EINVAL.
fn pkeys() -> i64 {
    /// Inside the kernel's half.
    const NOWHERE: usize = 0xffff_ffff_ffff_d000;
    (1..PKEYS).fold(0, |mask, key| {
        // SAFETY: no user mapping can be there.
        match unsafe { syscall4(nr::PKEY_MPROTECT, NOWHERE, 4096, 0, key) } {
            Err(Errno(ENOMEM)) => mask | 1 << key,
            _ => mask,
        }
    })
}

/// Asks everything.
pub fn read() -> TaskInfo {
    let mut xcomp = 0u64;
    // SAFETY: calls that only read, see the header.
    unsafe {
        let umask = value(syscall1(nr::UMASK, 0));
        let _ = syscall1(nr::UMASK, umask as usize);
        let xcomp_perm = match syscall2(nr::ARCH_PRCTL, ARCH_GET_XCOMP_PERM, (&raw mut xcomp) as usize) {
            Ok(_) => xcomp as i64,
            Err(e) => -i64::from(e.0),
        };
        TaskInfo {
            pid: value(blobrt::syscall::syscall0(nr::GETPID)) as i32,
            ppid: value(blobrt::syscall::syscall0(nr::GETPPID)) as i32,
            pgid: value(syscall1(nr::GETPGID, 0)) as i32,
            sid: value(syscall1(nr::GETSID, 0)) as i32,
            brk: value(syscall1(nr::BRK, 0)) as u64,
            umask,
            dumpable: prctl(PR_GET_DUMPABLE),
            thp_disabled: prctl(PR_GET_THP_DISABLE),
            child_subreaper: prctl_int(PR_GET_CHILD_SUBREAPER),
            mdwe: prctl(PR_GET_MDWE),
            memory_merge: prctl(PR_GET_MEMORY_MERGE),
            membarrier: value(syscall2(nr::MEMBARRIER, MEMBARRIER_CMD_GET_REGISTRATIONS, 0)),
            xcomp_perm,
            ldt: value(syscall3(nr::MODIFY_LDT, MODIFY_LDT_READ, (&raw mut xcomp) as usize, 8)),
            pkeys: pkeys(),
            // Our own stack was mapped just now; pages that are locked are not given up.
            own_memory: value(syscall3(nr::MSYNC, (&raw mut xcomp) as usize & !0xfff, 0x1000, MS_INVALIDATE)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Command, tests::Bench};

    #[test]
    fn a_process_sees_itself() {
        let mut bench = Bench::new(Command::Task);
        assert_eq!(bench.run(), 0);
        let info: TaskInfo = bench.read(0);
        assert_eq!(info.pid as u32, std::process::id());
        let stat = std::fs::read_to_string("/proc/self/status").unwrap();
        let umask = stat.lines().find_map(|l| l.strip_prefix("Umask:\t")).unwrap();
        assert_eq!(info.umask, i64::from_str_radix(umask, 8).unwrap());
        assert!(info.dumpable >= 0 && info.thp_disabled >= 0);
        assert_ne!(info.brk, 0);
    }
}
