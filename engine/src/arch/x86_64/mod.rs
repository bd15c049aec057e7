//! x86_64: registers as ptrace(2), images and signal frames have them.
//!
//! Nothing here makes a system call except for asking the processor (CPUID) once; bytes come from and
//! go to whoever is stopped.
//!
//! | form | general registers | x87, SSE, AVX ... |
//! |---|---|---|
//! | ptrace | 27 words, [`Regs`] | XSAVE area, not compacted, [`Xsave`] |
//! | image | `user_x86_regs_entry` | `user_x86_fpregs_entry`, one field per component |
//! | signal frame | 18 words and segments | XSAVE area between two magic numbers |

mod features;
mod layout;
mod own;
mod regs;
mod restart;
mod sigframe;
mod tls;
mod xsave;

pub use features::{Features, INSTRUCTIONS, STATES, Vendor, WORDS, WORDS_OF_FIRST};
pub use layout::Layout;
pub use own::thread_pointer;
pub use regs::Regs;
pub use restart::{Interrupted, Origin};
pub use sigframe::{AltStack, FRAME_ALIGN, SigFrame};
pub use tls::{TLS_ENTRIES, tls_from_image, tls_to_image};
pub use xsave::{Leftover, XTILE_DATA, Xsave};

/// The instruction that enters the kernel.
pub const SYSCALL_INSN: [u8; 2] = [0x0f, 0x05];

/// The same, followed by `ret`.
pub const SYSCALL_RET: [u8; 3] = [0x0f, 0x05, 0xc3];

/// How C libraries end a signal handler: `mov $15, %rax; syscall` (glibc, musl) and the shorter form
/// with `%eax`.
pub const SIGRETURN: [&[u8]; 2] =
    [&[0x48, 0xc7, 0xc0, 15, 0, 0, 0, 0x0f, 0x05], &[0xb8, 15, 0, 0, 0, 0x0f, 0x05]];

/// First address user space cannot have, with 4-level page tables. Mappings above exist only on
/// request, with 5-level tables.
pub const TASK_SIZE: u64 = 0x7fff_ffff_f000;

/// Bytes below the stack pointer that code may use without moving it.
pub const RED_ZONE: u64 = 128;
