//! What a thread can only be asked from inside.
//!
//! # Safety
//! Read-only calls with addresses of locals, and an instruction that looks at descriptors.

use blobrt::syscall::{nr, syscall0, syscall2, syscall3, syscall5};

use crate::{
    plain,
    task::{prctl, prctl_int, value},
};

plain! {
    /// The calling thread. Fields that are `i64` hold a negative error number where the kernel has no
    /// such call.
    pub struct ThreadInfo[336] {
        /// Its id in its own pid namespace.
        pub tid: i64,
        /// `PR_GET_TID_ADDRESS`: word cleared and woken at its end; 0 for none. `u64::MAX` where the
        /// kernel cannot tell (no CONFIG_CHECKPOINT_RESTORE).
        pub clear_tid: u64,
        /// Alternate signal stack: lowest address.
        pub altstack_sp: u64,
        /// Its `SS_*` bits. `SS_ONSTACK` is never seen here: the blob runs on a stack of its own.
        pub altstack_flags: u64,
        /// Its length in bytes.
        pub altstack_size: u64,
        /// `PR_GET_PDEATHSIG`.
        pub pdeath_sig: i64,
        /// `PR_GET_SECUREBITS`.
        pub securebits: i64,
        /// `PR_GET_TIMERSLACK`, in nanoseconds.
        pub timer_slack: i64,
        /// `PR_GET_NO_NEW_PRIVS`.
        pub no_new_privs: i64,
        /// `PR_GET_TSC`: 1 allowed, 2 faults.
        pub tsc: i64,
        /// `PR_MCE_KILL_GET`.
        pub mce_kill: i64,
        /// `PR_GET_IO_FLUSHER` (Linux 5.6).
        pub io_flusher: i64,
        /// `PR_GET_SPECULATION_CTRL` of store bypass, indirect branches, L1D flush.
        pub speculation: [i64; 3],
        /// `ARCH_SHSTK_STATUS`: user shadow stack features that are on (Linux 6.6).
        pub shadow_stack: i64,
        /// `PR_GET_KEEPCAPS`.
        pub keep_caps: i64,
        /// `ARCH_GET_CPUID`: 0 if CPUID faults.
        pub cpuid_allowed: i64,
        /// `MPOL_*` with `MPOL_F_*` of the thread's own memory policy.
        pub policy: i64,
        /// Its nodes.
        pub nodes: [u64; NODE_WORDS],
        /// Serial numbers of the thread's, the process's and, if it was asked for, the session's keyring;
        /// -ENOKEY for none.
        pub keyrings: [i64; 3],
        /// What kcmp(2) said about the process it was told to look at: 0, or -EPERM if it may not.
        pub inspection: i64,
        /// Which of its descriptors for thread-local storage are set: bit 0 is the first.
        pub tls: u64,
        /// Name, padded with zeroes.
        pub name: [u8; 16],
    }
}

/// The first descriptor for thread-local storage, and how many there are.
const TLS_FIRST: u32 = 12;
const TLS_COUNT: u32 = 3;
/// Words of a set of NUMA nodes: the most that a kernel can be built for.
pub const NODE_WORDS: usize = 16;

const PR_GET_PDEATHSIG: usize = 2;
const PR_GET_KEEPCAPS: usize = 7;
const PR_GET_NAME: usize = 16;
const PR_GET_TSC: usize = 25;
const PR_GET_SECUREBITS: usize = 27;
const PR_GET_TIMERSLACK: usize = 30;
const PR_MCE_KILL_GET: usize = 34;
const PR_GET_NO_NEW_PRIVS: usize = 39;
const PR_GET_TID_ADDRESS: usize = 40;
const PR_GET_SPECULATION_CTRL: usize = 52;
const ARCH_GET_CPUID: usize = 0x1011;
const KEYCTL_GET_KEYRING_ID: usize = 0;
const KCMP_VM: usize = 1;
const ENOKEY: i64 = 126;
const PR_GET_IO_FLUSHER: usize = 58;
const ARCH_SHSTK_STATUS: usize = 0x5005;

/// Asks everything. `other` is the process to inspect, 0 for none; `session` says that the session's keyring is
/// to be told: asking gives a thread without one that of its user.
pub fn read(other: u64, session: bool) -> ThreadInfo {
    let mut nodes = [0u64; NODE_WORDS];
    let mut mode = 0i32;
    let keyring = |which: i32| {
        // SAFETY: numbers only; no keyring is made.
        value(unsafe { syscall3(nr::KEYCTL, KEYCTL_GET_KEYRING_ID, which as usize, 0) })
    };
    let mut altstack = [0u64; 3];
    let mut clear_tid = 0u64;
    let mut name = [0u8; 16];
    let mut features = 0u64;
    // SAFETY: calls that only read into locals of the sizes they want: stack_t is three words, a name 16
    // bytes, the others one word.
    unsafe {
        let altstack_ok = syscall2(nr::SIGALTSTACK, 0, altstack.as_mut_ptr() as usize);
        if altstack_ok.is_err() {
            altstack = [0; 3];
        }
        if syscall5(nr::PRCTL, PR_GET_TID_ADDRESS, (&raw mut clear_tid) as usize, 0, 0, 0).is_err() {
            clear_tid = u64::MAX;
        }
        let _ = syscall5(nr::PRCTL, PR_GET_NAME, name.as_mut_ptr() as usize, 0, 0, 0);
        let shadow_stack = match syscall2(nr::ARCH_PRCTL, ARCH_SHSTK_STATUS, (&raw mut features) as usize) {
            Ok(_) => features as i64,
            Err(e) => -i64::from(e.0),
        };
        let speculation = |which| value(syscall5(nr::PRCTL, PR_GET_SPECULATION_CTRL, which, 0, 0, 0));
        ThreadInfo {
            tid: value(syscall0(nr::GETTID)),
            clear_tid,
            altstack_sp: altstack[0],
            // The upper half of the word is padding.
            altstack_flags: altstack[1] & 0xffff_ffff,
            altstack_size: altstack[2],
            pdeath_sig: prctl_int(PR_GET_PDEATHSIG),
            securebits: prctl(PR_GET_SECUREBITS),
            timer_slack: prctl(PR_GET_TIMERSLACK),
            no_new_privs: prctl(PR_GET_NO_NEW_PRIVS),
            tsc: prctl_int(PR_GET_TSC),
            mce_kill: prctl(PR_MCE_KILL_GET),
            io_flusher: prctl(PR_GET_IO_FLUSHER),
            speculation: [speculation(0), speculation(1), speculation(2)],
            shadow_stack,
            keep_caps: prctl(PR_GET_KEEPCAPS),
            cpuid_allowed: value(syscall2(nr::ARCH_PRCTL, ARCH_GET_CPUID, 0)),
            policy: match syscall5(
                nr::GET_MEMPOLICY,
                (&raw mut mode) as usize,
                nodes.as_mut_ptr() as usize,
                64 * NODE_WORDS,
                0,
                0,
            ) {
                Ok(_) => i64::from(mode),
                Err(e) => -i64::from(e.0),
            },
            nodes,
            keyrings: [keyring(-1), keyring(-2), if session { keyring(-3) } else { -ENOKEY }],
            inspection: match other as usize {
                0 => 0,
                pid => value(syscall5(nr::KCMP, pid, pid, KCMP_VM, 0, 0)),
            },
            tls: (0..TLS_COUNT).filter(|n| has_descriptor(TLS_FIRST + n)).fold(0, |set, n| set | 1 << n),
            name,
        }
    }
}

/// Whether there is a descriptor of this number in the global table. Loading its rights fails for an empty one, and
/// for none that a process can set.
fn has_descriptor(number: u32) -> bool {
    // For user code.
    let selector = number << 3 | 3;
    let found: u8;
    // SAFETY: changes a register and flags only.
    unsafe {
        core::arch::asm!(
            "lar {selector:e}, {selector:e}",
            "setz {found}",
            selector = inout(reg) selector => _,
            found = out(reg_byte) found,
            options(nomem, nostack),
        );
    }
    found != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Command, tests::Bench};

    #[test]
    fn a_thread_sees_itself() {
        let info = std::thread::Builder::new()
            .name("seen".into())
            .spawn(|| {
                let mut bench = Bench::new(Command::Thread);
                bench.control.args[0] = u64::from(std::process::id());
                assert_eq!(bench.run(), 0);
                bench.read::<ThreadInfo>(0)
            })
            .unwrap()
            .join()
            .unwrap();
        assert_eq!(&info.name[..5], b"seen\0");
        assert_ne!(info.tid, i64::from(std::process::id()));
        // std gives every thread an alternate stack for its overflow handler.
        assert_ne!(info.altstack_size, 0);
        assert_eq!((info.altstack_flags, info.pdeath_sig), (0, 0));
        // glibc and musl both have the kernel clear a word at the end of a thread.
        assert_ne!(info.clear_tid, 0);
        assert!(info.timer_slack > 0);
        assert_eq!(info.inspection, 0);
        assert!(info.policy <= 0, "the default policy, or no NUMA");
        assert_eq!(info.nodes, [0; NODE_WORDS]);
        assert_eq!(info.tls, 0);
        // The code and the data of every program are described in the same table.
        assert!(has_descriptor(6) && has_descriptor(5));
    }
}
