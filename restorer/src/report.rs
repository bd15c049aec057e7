//! How a blob names a failure without formatting: a code for the call, a code for the object.

macro_rules! codes {
    ($(#[$doc:meta])* $enum:ident { $($(#[$vdoc:meta])* $name:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[repr(u32)]
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum $enum {
            /// Not told.
            None = 0,
            $($(#[$vdoc])* $name,)+
        }

        impl $enum {
            const ALL: &'static [(u32, &'static str)] = &[$(($enum::$name as u32, $text),)+];
            /// The text for a code from shared memory; `None` for an unknown one.
            pub fn text(code: u32) -> Option<&'static str> {
                Self::ALL.iter().find(|(c, _)| *c == code).map(|(_, t)| *t)
            }
        }
    };
}

codes! {
    /// The call that failed.
    #[allow(missing_docs)]
    Call {
        Mmap = "mmap", Munmap = "munmap", Mremap = "mremap", Mprotect = "mprotect", Madvise = "madvise",
        Mlock = "mlock", Mseal = "mseal", Prctl = "prctl", ArchPrctl = "arch_prctl", Brk = "brk", Close = "close",
        Clone = "clone", Clone3 = "clone3", LastPid = "write(ns_last_pid)", RtSigaction = "rt_sigaction",
        RtSigprocmask = "rt_sigprocmask", Sigaltstack = "sigaltstack", RtSigqueueinfo = "rt_sigqueueinfo",
        RtTgsigqueueinfo = "rt_tgsigqueueinfo", Setitimer = "setitimer", TimerCreate = "timer_create",
        TimerDelete = "timer_delete", TimerSettime = "timer_settime", Prlimit = "prlimit64", Personality = "personality",
        SchedSetattr = "sched_setattr", SchedSetscheduler = "sched_setscheduler", Setpriority = "setpriority",
        Setgroups = "setgroups", Setresuid = "setresuid", Setresgid = "setresgid", Setfsuid = "setfsuid",
        Setfsgid = "setfsgid", Capset = "capset", Seccomp = "seccomp", Rseq = "rseq", SetRobustList = "set_robust_list",
        Membarrier = "membarrier", Write = "write", Open = "open", Futex = "futex", Ptrace = "ptrace",
        SetThreadArea = "set_thread_area", MapShadowStack = "map_shadow_stack", Build = "build number",
        Gettid = "gettid", Kill = "kill", IoSetup = "io_setup", Wait = "wait4",
        Fcntl = "fcntl", Ioctl = "ioctl", TimerfdSettime = "timerfd_settime",
        SetMempolicy = "set_mempolicy", Mlockall = "mlockall", Other = "a system call",
    }
}

codes! {
    /// What the call was made for. The comment says what the numbers `a` and `b` are.
    Object {
        /// Start and end address.
        Vma = "the mapping",
        /// Start and end address.
        Old = "the engine's own mapping",
        /// Start and end address.
        Vdso = "the vdso",
        /// The heap's end.
        Heap = "the heap",
        /// The `prctl` option.
        MmFields = "the addresses of the memory descriptor",
        /// Descriptor number.
        Fd = "the descriptor",
        /// Thread id.
        Thread = "the thread",
        /// Signal number.
        Action = "the action of signal",
        /// Signal number.
        Queued = "the pending signal",
        /// Which interval timer (0 real, 1 virtual, 2 profiling).
        Itimer = "the interval timer",
        /// Timer id; for a mismatch `b` is the id that the kernel gave.
        PosixTimer = "the POSIX timer",
        /// Number of the resource.
        Rlimit = "the limit of resource",
        /// Policy and priority.
        Sched = "the scheduling policy",
        /// Nice value as a signed number.
        Nice = "the nice value",
        /// Number of the capability.
        Cap = "the capability",
        /// The number wanted.
        Creds = "the credentials",
        /// Nothing: the text says which.
        Label = "the security label",
        /// Index of the filter from the oldest.
        Filter = "the seccomp filter",
        /// Address.
        Rseq = "the restartable sequences area",
        /// Address.
        Altstack = "the alternate signal stack",
        /// The `prctl` option and its argument.
        Prctl = "the process attribute",
        /// The first two arguments.
        Setting = "the setting",
        /// Address.
        Segment = "the segment base",
        /// Address.
        Robust = "the robust futex list",
        /// Bit mask.
        Membarrier = "the membarrier registration",
        /// The number the blob was built with and the one it met.
        Build = "the restorer",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_give_texts_and_unknown_ones_none() {
        assert_eq!(Call::text(Call::Mmap as u32), Some("mmap"));
        assert_eq!(Object::text(Object::Vma as u32), Some("the mapping"));
        assert_eq!(Call::text(0), None);
        assert_eq!(Object::text(9999), None);
    }
}
