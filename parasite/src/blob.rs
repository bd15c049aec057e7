//! The parasite's root: entry points and the way out. A plain, empty program unless built as a blob.
//!
//! # Safety
//! Entered by the engine only, which sets `rdi` to the control block and `rsp` to the blob's stack.
#![cfg_attr(blob, no_std)]
#![cfg_attr(blob, no_main)]

#[cfg(blob)]
mod image {
    use core::{
        arch::naked_asm,
        mem::{offset_of, size_of},
    };

    use parasite::Control;

    /// Three places in one piece of code:
    ///
    /// - `parasite_entry`: runs the command, then leaves.
    /// - `parasite_setup_entry`: entered first, while everything is still read-execute: makes the two
    ///   ranges of the control block writable without touching memory, and goes on like `parasite_entry`; if
    ///   that fails, it leaves with the error in `r13`.
    /// - `parasite_end`: the instruction after the call that ends a visit. Here the engine takes the
    ///   thread back; if it is gone, the thread's own registers are loaded from the signal frame.
    ///
    /// # Safety
    /// See the head of this file.
    #[unsafe(naked)]
    #[unsafe(no_mangle)]
    #[unsafe(link_section = ".text.entry")]
    pub unsafe extern "C" fn parasite_entry() {
        naked_asm!(
            // A landing pad costs nothing today and is needed where user IBT is on.
            "endbr64",
            "mov rbx, rdi",
            "4:",
            "xor ebp, ebp",
            "and rsp, -16",
            "cld",
            // What compiled code uses of the vector registers: the rest is as the thread left it, so that the
            // engine need not put any of it back.
            "sub rsp, 272",
            "stmxcsr [rsp + 256]",
            "movups [rsp + 0], xmm0",
            "movups [rsp + 16], xmm1",
            "movups [rsp + 32], xmm2",
            "movups [rsp + 48], xmm3",
            "movups [rsp + 64], xmm4",
            "movups [rsp + 80], xmm5",
            "movups [rsp + 96], xmm6",
            "movups [rsp + 112], xmm7",
            "movups [rsp + 128], xmm8",
            "movups [rsp + 144], xmm9",
            "movups [rsp + 160], xmm10",
            "movups [rsp + 176], xmm11",
            "movups [rsp + 192], xmm12",
            "movups [rsp + 208], xmm13",
            "movups [rsp + 224], xmm14",
            "movups [rsp + 240], xmm15",
            "mov rdi, rbx",
            "call {run}",
            "movups xmm0, [rsp + 0]",
            "movups xmm1, [rsp + 16]",
            "movups xmm2, [rsp + 32]",
            "movups xmm3, [rsp + 48]",
            "movups xmm4, [rsp + 64]",
            "movups xmm5, [rsp + 80]",
            "movups xmm6, [rsp + 96]",
            "movups xmm7, [rsp + 112]",
            "movups xmm8, [rsp + 128]",
            "movups xmm9, [rsp + 144]",
            "movups xmm10, [rsp + 160]",
            "movups xmm11, [rsp + 176]",
            "movups xmm12, [rsp + 192]",
            "movups xmm13, [rsp + 208]",
            "movups xmm14, [rsp + 224]",
            "movups xmm15, [rsp + 240]",
            "ldmxcsr [rsp + 256]",
            "xor r13d, r13d",
            "jmp 2f",

            ".globl parasite_setup_entry",
            "parasite_setup_entry:",
            "endbr64",
            "mov rbx, rdi",
            "mov eax, {mprotect}",
            "mov rdi, [rbx + {setup}]",
            "mov rsi, [rbx + {setup} + 8]",
            "mov edx, 3",
            "syscall",
            "mov r13, rax",
            "test rax, rax",
            "jnz 2f",
            "mov eax, {mprotect}",
            "mov rdi, [rbx + {setup} + 16]",
            "mov rsi, [rbx + {setup} + 24]",
            "mov edx, 3",
            "syscall",
            "mov r13, rax",
            "test rax, rax",
            "jnz 2f",
            "jmp 4b",

            // tgkill(getpid(), gettid(), end_signal): a signal to this very thread.
            "2:",
            "mov eax, {getpid}",
            "syscall",
            "mov r12, rax",
            "mov eax, {gettid}",
            "syscall",
            "mov rdi, r12",
            "mov rsi, rax",
            "mov rdx, [rbx + {end_signal}]",
            "mov eax, {tgkill}",
            "syscall",

            ".globl parasite_end",
            "parasite_end:",
            // Nobody took the thread back.
            "mov rax, [rbx + {rseq_cs_at}]",
            "test rax, rax",
            "jz 3f",
            "mov rcx, [rbx + {rseq_cs}]",
            "mov [rax], rcx",
            "3:",
            "mov rsp, [rbx + {frame_sp}]",
            "mov eax, {rt_sigreturn}",
            "syscall",
            "ud2",
            run = sym run,
            setup = const offset_of!(Control, setup),
            end_signal = const offset_of!(Control, end_signal),
            rseq_cs_at = const offset_of!(Control, rseq_cs_at),
            rseq_cs = const offset_of!(Control, rseq_cs),
            frame_sp = const offset_of!(Control, frame_sp),
            mprotect = const blobrt::syscall::nr::MPROTECT,
            getpid = const blobrt::syscall::nr::GETPID,
            gettid = const blobrt::syscall::nr::GETTID,
            tgkill = const blobrt::syscall::nr::TGKILL,
            rt_sigreturn = const blobrt::syscall::nr::RT_SIGRETURN,
        )
    }

    /// # Safety
    /// `control` is the control block the engine prepared.
    unsafe extern "C" fn run(control: *mut Control) {
        // SAFETY: the engine passes its block, which nobody else uses meanwhile.
        unsafe { parasite::run(control) }
    }

    const _: () = assert!(size_of::<Control>() < 256);
}

#[cfg(not(blob))]
fn main() {}
