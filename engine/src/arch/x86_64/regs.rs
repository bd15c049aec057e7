//! General registers.

use rcriu_images::pb;

use crate::error::{Error, Result};

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

impl Regs {
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
}
