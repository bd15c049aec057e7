//! General registers, and what a stop did to the system call the thread was in.

use rcriu_images::pb;

use crate::error::{Error, Result};

/// `-errno` values with which the kernel marks an interrupted call that it will start again.
const ERESTARTSYS: i64 = 512;
const ERESTARTNOINTR: i64 = 513;
const ERESTARTNOHAND: i64 = 514;
const ERESTART_RESTARTBLOCK: i64 = 516;

macro_rules! registers {
    ($($name:ident => $image:ident,)*) => {
        /// The registers of ptrace's `NT_PRSTATUS`, in its order.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
        #[allow(missing_docs)]
        pub struct Regs { $(pub $name: u64,)* }

        impl Regs {
            /// Bytes of the register set.
            pub const LEN: usize = 8 * [$(stringify!($name)),*].len();

            /// From the bytes ptrace gave.
            ///
            /// # Errors
            /// The register set of a 32-bit program is shorter: it is refused by name.
            pub fn from_bytes(bytes: &[u8]) -> Result<Regs> {
                if bytes.len() != Self::LEN {
                    return Err(Error::unsupported(
                        "the thread runs 32-bit code: only 64-bit x86 programs are supported",
                    ));
                }
                let mut words = bytes.as_chunks::<8>().0.iter().map(|w| u64::from_ne_bytes(*w));
                let mut next = || words.next().unwrap_or(0);
                Ok(Regs { $($name: next(),)* })
            }

            /// The bytes for ptrace.
            pub fn to_bytes(&self) -> [u8; Self::LEN] {
                let mut bytes = [0; Self::LEN];
                let words = [$(self.$name),*];
                for (to, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(words) {
                    *to = word.to_ne_bytes();
                }
                bytes
            }

            /// The message of images. [`Regs::settle`] comes first.
            pub fn to_image(&self) -> pb::UserX86RegsEntry {
                #[allow(clippy::needless_update)]
                pb::UserX86RegsEntry {
                    $($image: self.$name,)*
                    mode: Some(pb::UserX86RegsMode::Native as i32),
                    ..Default::default()
                }
            }

            /// From the message of images.
            ///
            /// # Errors
            /// 32-bit registers, which are not supported, and segments no 64-bit program can have.
            pub fn from_image(entry: &pb::UserX86RegsEntry) -> Result<Regs> {
                if entry.mode.is_some_and(|m| m != pb::UserX86RegsMode::Native as i32) {
                    return Err(Error::unsupported(
                        "the thread ran 32-bit code: only 64-bit x86 programs are supported",
                    ));
                }
                let regs = Regs { $($name: entry.$image,)* };
                if regs.cs != USER_CS {
                    return Err(Error::image(format!("code segment {:#x} is not that of 64-bit code", regs.cs)));
                }
                Ok(regs)
            }
        }
    };
}

registers! {
    r15 => r15, r14 => r14, r13 => r13, r12 => r12, rbp => bp, rbx => bx, r11 => r11, r10 => r10, r9 => r9,
    r8 => r8, rax => ax, rcx => cx, rdx => dx, rsi => si, rdi => di, orig_rax => orig_ax, rip => ip, cs => cs,
    eflags => flags, rsp => sp, ss => ss, fs_base => fs_base, gs_base => gs_base, ds => ds, es => es, fs => fs,
    gs => gs,
}

/// Code segment of 64-bit programs.
pub const USER_CS: u64 = 0x33;

/// libc does not have it for x86_64.
const SYS_IO_PGETEVENTS: i64 = 333;

/// Calls that return EINTR on any stop, as after SIGSTOP (signal(7)), though they have done nothing
/// yet, so that they can be made again: epoll_wait and its kin, rt_sigtimedwait, semop and semtimedop,
/// io_getevents and io_pgetevents, and with a timeout on the socket recvfrom, recvmsg, accept, accept4.
const CUT_SHORT: [i64; 12] = [
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_io_getevents,
    SYS_IO_PGETEVENTS,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_accept,
    libc::SYS_accept4,
];

/// What becomes of the system call a thread was stopped in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Interrupted {
    /// It was in none, or the call had its result already.
    No,
    /// It will be made again from its instruction.
    Restarts,
    /// It had begun to wait with a timeout that only the kernel knows: it returns EINTR.
    Eintr,
}

impl Regs {
    /// Whether a stop interrupted a call, judged as the kernel does on the way back to user code.
    pub fn interrupted(&self) -> Interrupted {
        if (self.orig_rax as i64) < 0 {
            return Interrupted::No;
        }
        match -(self.rax as i64) {
            ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => Interrupted::Restarts,
            ERESTART_RESTARTBLOCK => Interrupted::Eintr,
            _ => Interrupted::No,
        }
    }

    /// Has the kernel make a call again that our stop ended with EINTR, unless a signal handler runs
    /// first. A timeout relative to the call's start begins anew. True if there was such a call.
    pub fn make_again(&mut self) -> bool {
        let cut = self.rax == -i64::from(libc::EINTR) as u64 && CUT_SHORT.contains(&(self.orig_rax as i64));
        if cut {
            self.rax = -ERESTARTNOHAND as u64;
        }
        cut
    }

    /// Gives up a restart: the call returns EINTR.
    pub fn give_up_restart(&mut self) {
        self.rax = -i64::from(libc::EINTR) as u64;
    }

    /// Registers for an image or a signal frame, where nobody will restart a call any more: an
    /// interrupted call is set up to be made again, or to return EINTR. A thread that is cured gets its
    /// registers unchanged instead, and the kernel restarts it with the time that is left.
    pub fn settle(&mut self) -> Interrupted {
        let what = self.interrupted();
        match what {
            Interrupted::No => {}
            Interrupted::Restarts => {
                self.rax = self.orig_rax;
                self.rip = self.rip.wrapping_sub(super::SYSCALL_INSN.len() as u64);
            }
            Interrupted::Eintr => self.rax = -i64::from(libc::EINTR) as u64,
        }
        what
    }

    /// Registers with which the thread makes system call `nr` at `insn`, the address of a `syscall`
    /// instruction, and keeps everything else. The stack is not touched.
    pub fn for_syscall(&self, insn: u64, nr: u64, args: [u64; 6]) -> Regs {
        Regs {
            rip: insn,
            rax: nr,
            rdi: args[0],
            rsi: args[1],
            rdx: args[2],
            r10: args[3],
            r8: args[4],
            r9: args[5],
            ..self.detached()
        }
    }

    /// Registers with which the thread enters code at `entry` with one argument and its own stack.
    pub fn for_call(&self, entry: u64, stack: u64, arg: u64) -> Regs {
        Regs { rip: entry, rsp: stack, rdi: arg, rax: 0, ..self.detached() }
    }

    /// The same registers cut off from an interrupted call, so that the kernel restarts nothing, and
    /// without direction and single-step flags.
    fn detached(&self) -> Regs {
        const INTERRUPTS_AND_RESERVED: u64 = 0x202;
        Regs { orig_rax: u64::MAX, eflags: INTERRUPTS_AND_RESERVED, ..*self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Regs {
        let bytes: Vec<u8> = (1..=27u64).flat_map(|w| (w * 0x0101_0101).to_ne_bytes()).collect();
        Regs { cs: USER_CS, ..Regs::from_bytes(&bytes).unwrap() }
    }

    #[test]
    fn bytes_have_the_order_of_user_regs_struct() {
        assert_eq!(Regs::LEN, size_of::<libc::user_regs_struct>());
        let regs = sample();
        assert_eq!(Regs::from_bytes(&regs.to_bytes()).unwrap(), regs);
        let word = |offset: usize| u64::from_ne_bytes(regs.to_bytes()[offset..][..8].try_into().unwrap());
        assert_eq!(word(std::mem::offset_of!(libc::user_regs_struct, rax)), regs.rax);
        assert_eq!(word(std::mem::offset_of!(libc::user_regs_struct, orig_rax)), regs.orig_rax);
        assert_eq!(word(std::mem::offset_of!(libc::user_regs_struct, rip)), regs.rip);
        assert_eq!(word(std::mem::offset_of!(libc::user_regs_struct, rsp)), regs.rsp);
        assert_eq!(word(std::mem::offset_of!(libc::user_regs_struct, fs_base)), regs.fs_base);
        assert_eq!(word(std::mem::offset_of!(libc::user_regs_struct, gs)), regs.gs);
    }

    #[test]
    fn images_bring_registers_back() {
        let regs = sample();
        assert_eq!(Regs::from_image(&regs.to_image()).unwrap(), regs);
        let mut compat = regs.to_image();
        compat.mode = Some(pb::UserX86RegsMode::Compat as i32);
        assert!(Regs::from_image(&compat).is_err());
        let mut odd = regs.to_image();
        odd.cs = 0x10;
        assert!(Regs::from_image(&odd).is_err());
        assert!(Regs::from_bytes(&[0; 68]).is_err());
    }

    #[test]
    fn only_calls_that_did_nothing_are_made_again() {
        let eintr = |nr: i64| Regs { rax: -4i64 as u64, orig_rax: nr as u64, ..sample() };
        let mut epoll = eintr(libc::SYS_epoll_wait);
        assert!(epoll.make_again());
        assert_eq!(epoll.interrupted(), Interrupted::Restarts);
        // Its descriptor is gone already.
        let mut close = eintr(libc::SYS_close);
        assert!(!close.make_again());
        assert_eq!(close, eintr(libc::SYS_close));
        let mut done = Regs { rax: 1, ..eintr(libc::SYS_epoll_wait) };
        assert!(!done.make_again());
    }

    #[test]
    fn interrupted_calls_are_settled() {
        for (rax, expect) in
            [(-512, Interrupted::Restarts), (-513, Interrupted::Restarts), (-514, Interrupted::Restarts)]
        {
            let before = Regs { rax: rax as u64, orig_rax: 0, ..sample() };
            let mut after = before;
            assert_eq!(after.settle(), expect);
            assert_eq!(after, Regs { rax: 0, rip: before.rip - 2, ..before });
        }
        let before = Regs { rax: -516i64 as u64, orig_rax: 230, ..sample() };
        let mut after = before;
        assert_eq!(after.settle(), Interrupted::Eintr);
        assert_eq!(after, Regs { rax: -4i64 as u64, ..before });
        // The same value outside a call, and a finished call.
        for (rax, orig_rax) in [(-512i64, u64::MAX), (5, 0), (-4, 0)] {
            let before = Regs { rax: rax as u64, orig_rax, ..sample() };
            let mut after = before;
            assert_eq!(after.settle(), Interrupted::No);
            assert_eq!(after, before);
        }
    }
}
