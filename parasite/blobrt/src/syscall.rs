//! System calls without libc.
//!
//! # Safety
//! A system call can do anything to the process, so the functions that take raw arguments are
//! unsafe: the caller vouches for the arguments as the call's man page states them.

use core::arch::asm;

/// A kernel error number, always in 1..=4095.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Errno(pub i32);

/// Result of a system call.
pub type Result<T> = core::result::Result<T, Errno>;

/// Splits the kernel's answer: -4095..=-1 are errors, everything else (addresses too) is a value.
#[inline(always)]
pub const fn check(ret: usize) -> Result<usize> {
    if ret > usize::MAX - 4095 { Err(Errno(-(ret as isize) as i32)) } else { Ok(ret) }
}

/// One call with up to six arguments; the answer is as the kernel gave it.
///
/// # Safety
/// The arguments must be what the call's man page asks for.
#[inline(always)]
pub unsafe fn syscall6_raw(nr: usize, a: [usize; 6]) -> usize {
    let ret;
    // SAFETY: the kernel clobbers rcx, r11 and rax only; memory is assumed touched.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") nr => ret,
            in("rdi") a[0],
            in("rsi") a[1],
            in("rdx") a[2],
            in("r10") a[3],
            in("r8") a[4],
            in("r9") a[5],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    ret
}

/// Defines one checked function per number of arguments, setting only the registers that count.
macro_rules! calls {
    ($($name:ident($($arg:ident = $reg:tt),*);)+) => {$(
        /// One system call, checked.
        ///
        /// # Safety
        /// The arguments must be what the call's man page asks for.
        #[inline(always)]
        pub unsafe fn $name(nr: usize, $($arg: usize),*) -> Result<usize> {
            let ret: usize;
            // SAFETY: the kernel clobbers rcx, r11 and rax only; memory is assumed touched.
            unsafe {
                asm!(
                    "syscall",
                    inlateout("rax") nr => ret,
                    $(in($reg) $arg,)*
                    lateout("rcx") _,
                    lateout("r11") _,
                    options(nostack),
                );
            }
            check(ret)
        }
    )+};
}

calls! {
    syscall0();
    syscall1(a = "rdi");
    syscall2(a = "rdi", b = "rsi");
    syscall3(a = "rdi", b = "rsi", c = "rdx");
    syscall4(a = "rdi", b = "rsi", c = "rdx", d = "r10");
    syscall5(a = "rdi", b = "rsi", c = "rdx", d = "r10", e = "r8");
    syscall6(a = "rdi", b = "rsi", c = "rdx", d = "r10", e = "r8", f = "r9");
}

/// Numbers of the calls that blobs make (x86_64, from the kernel's `syscall_64.tbl`).
pub mod nr {
    #![allow(missing_docs)]
    macro_rules! numbers {
        ($($name:ident = $nr:literal,)+) => {$(pub const $name: usize = $nr;)+};
    }
    numbers! {
        READ = 0, WRITE = 1, OPEN = 2, CLOSE = 3, LSEEK = 8, MMAP = 9, MPROTECT = 10, MUNMAP = 11, BRK = 12,
        RT_SIGACTION = 13, RT_SIGPROCMASK = 14, RT_SIGRETURN = 15, IOCTL = 16, PREAD64 = 17, PWRITE64 = 18,
        READV = 19, WRITEV = 20, SCHED_YIELD = 24, MREMAP = 25, MADVISE = 28, DUP = 32, DUP2 = 33, NANOSLEEP = 35,
        GETITIMER = 36, SETITIMER = 38, GETPID = 39, SOCKET = 41, CONNECT = 42, SENDMSG = 46, RECVMSG = 47,
        CLONE = 56, EXIT = 60, WAIT4 = 61, KILL = 62, FCNTL = 72, UMASK = 95, GETRLIMIT = 97, GETUID = 102,
        GETGID = 104, SETUID = 105, SETGID = 106, GETEUID = 107, GETEGID = 108, SETPGID = 109, GETPPID = 110,
        SETGROUPS = 116, GETGROUPS = 115, SETRESUID = 117, GETRESUID = 118, SETRESGID = 119, GETRESGID = 120,
        GETPGID = 121, SETFSUID = 122, SETFSGID = 123, GETSID = 124, CAPGET = 125, CAPSET = 126,
        RT_SIGPENDING = 127, RT_SIGQUEUEINFO = 129, SIGALTSTACK = 131, PERSONALITY = 135, SETPRIORITY = 141, SCHED_SETSCHEDULER = 144,
        MLOCK = 149, PRCTL = 157, ARCH_PRCTL = 158, SETRLIMIT = 160, GETTID = 186, TKILL = 200, FUTEX = 202,
        SCHED_SETAFFINITY = 203, SCHED_GETAFFINITY = 204, SET_THREAD_AREA = 205, IO_SETUP = 206, IO_DESTROY = 207, IO_GETEVENTS = 208,
        IO_SUBMIT = 209, SET_TID_ADDRESS = 218, TIMER_CREATE = 222, TIMER_SETTIME = 223, TIMER_GETTIME = 224,
        TIMER_GETOVERRUN = 225, TIMER_DELETE = 226, CLOCK_GETTIME = 228, EXIT_GROUP = 231, TGKILL = 234,
        WAITID = 247, OPENAT = 257, SET_ROBUST_LIST = 273, GET_ROBUST_LIST = 274, VMSPLICE = 278, TIMERFD_SETTIME = 286, DUP3 = 292,
        PREADV = 295, PWRITEV = 296, RT_TGSIGQUEUEINFO = 297, PRLIMIT64 = 302, PROCESS_VM_READV = 310,
        PROCESS_VM_WRITEV = 311, SECCOMP = 317, USERFAULTFD = 323, MEMBARRIER = 324, RSEQ = 334, CLONE3 = 435,
        CLOSE_RANGE = 436, PIDFD_OPEN = 434, PIDFD_GETFD = 438, PROCESS_MADVISE = 440, FUTEX_WAITV = 449,
        MSEAL = 462, MSYNC = 26, MODIFY_LDT = 154, GET_MEMPOLICY = 239, KEYCTL = 250, KCMP = 312, PKEY_MPROTECT = 329,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_and_errors_are_told_apart() {
        assert_eq!(check(0), Ok(0));
        assert_eq!(check(0x7fff_ffff_f000), Ok(0x7fff_ffff_f000));
        assert_eq!(check((-1isize) as usize), Err(Errno(1)));
        assert_eq!(check((-4095isize) as usize), Err(Errno(4095)));
        assert_eq!(check((-4096isize) as usize), Ok((-4096isize) as usize));
    }

    #[test]
    fn calls_reach_the_kernel() {
        // SAFETY: getpid has no arguments; close of an impossible descriptor changes nothing.
        unsafe {
            assert_eq!(syscall0(nr::GETPID).unwrap() as u32, std::process::id());
            assert_eq!(syscall1(nr::CLOSE, usize::MAX), Err(Errno(9)));
        }
    }

    #[test]
    fn all_six_arguments_arrive() {
        // SAFETY: a fresh anonymous mapping, unmapped again.
        unsafe {
            let p = syscall6(nr::MMAP, 0, 4096, 3, 0x22, usize::MAX, 0).unwrap();
            assert_eq!(syscall6_raw(nr::MUNMAP, [p, 4096, 0, 0, 0, 0]), 0);
        }
    }
}
