//! What both blobs stand on: raw system calls, the memory routines the compiler expects, the panic
//! handler, a futex, and the shape of an entry point.
//!
//! The crate is compiled twice. Every ordinary cargo command builds a plain library (with std in its
//! own tests); `engine/build.rs` builds it again with `--cfg blob`, and only then do the parts that
//! would shadow libc's or std's (memory routines, panic handler) exist.
//!
//! # Safety
//! Raw system calls, inline assembly and symbols the compiler calls by name. Nothing here keeps
//! state. Blob code built on it has no thread-local storage, no allocator, no formatting, and must
//! not read memory that a caller did not hand to it.
#![cfg_attr(not(test), no_std)]

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!("the blobs exist for x86_64 Linux only");

pub mod abi;
pub mod futex;
pub mod mem;
#[cfg(all(blob, not(test)))]
mod panic;
pub mod syscall;

/// Defines the entry point of a blob: `$name`, placed at the first byte of the code.
///
/// The engine enters with `rdi` = address of the argument structure and `rsp` somewhere in the blob's
/// stack; nothing else is assumed. `$run` is `unsafe extern "C" fn(*mut Args)`. After it returns
/// control runs into `$tail`, one or more assembly lines that must not return.
#[macro_export]
macro_rules! entry {
    ($name:ident, $run:path, $($tail:literal),+ $(,)?) => {
        /// First instruction of the blob.
        ///
        /// # Safety
        /// Jumped to by the engine only, with `rdi` and `rsp` set as `entry!` says.
        #[unsafe(naked)]
        #[unsafe(no_mangle)]
        #[unsafe(link_section = ".text.entry")]
        pub unsafe extern "C" fn $name() {
            ::core::arch::naked_asm!(
                // A landing pad costs nothing today and is needed where user IBT is on.
                "endbr64",
                "xor ebp, ebp",
                "and rsp, -16",
                "cld",
                "call {run}",
                $($tail,)+
                "ud2",
                run = sym $run,
            )
        }
    };
}
