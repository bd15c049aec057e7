//! Memory routines: those that LLVM calls by name, in assembly, and a few helpers of our own.
//!
//! The gnu target's compiler_builtins has none of memcpy and its kin (libc has them), so the blobs
//! bring their own. In Rust, LLVM could recognise the loop and turn the body into a call to itself;
//! hence assembly. They exist under `cfg(blob)` only: anywhere else they would shadow libc's.
//!
//! # Safety
//! The exported symbols follow the C contracts of their namesakes.

/// Length of the C string at `s`, without its end.
///
/// # Safety
/// `s` points to readable memory that contains a zero byte.
pub unsafe fn c_len(s: *const u8) -> usize {
    let mut n = 0;
    // SAFETY: the caller promises a zero byte; nothing is read after it.
    while unsafe { s.add(n).read() } != 0 {
        n += 1;
    }
    n
}

#[cfg(all(blob, not(test)))]
mod builtins {
    use core::arch::naked_asm;

    /// C's memcpy.
    #[unsafe(naked)]
    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcpy(dst: *mut u8, src: *const u8, n: usize) -> *mut u8 {
        naked_asm!("mov rax, rdi", "mov rcx, rdx", "rep movsb", "ret")
    }

    /// C's memmove: backwards when the destination starts inside the source.
    #[unsafe(naked)]
    #[unsafe(no_mangle)]
    unsafe extern "C" fn memmove(dst: *mut u8, src: *const u8, n: usize) -> *mut u8 {
        naked_asm!(
            "mov rax, rdi",
            "mov rcx, rdx",
            "mov r8, rdi",
            "sub r8, rsi",
            "cmp r8, rdx",
            "jb 2f",
            "rep movsb",
            "ret",
            "2:",
            "lea rdi, [rdi + rcx - 1]",
            "lea rsi, [rsi + rcx - 1]",
            "std",
            "rep movsb",
            "cld",
            "ret",
        )
    }

    /// C's memset.
    #[unsafe(naked)]
    #[unsafe(no_mangle)]
    unsafe extern "C" fn memset(dst: *mut u8, c: i32, n: usize) -> *mut u8 {
        naked_asm!("mov r8, rdi", "mov eax, esi", "mov rcx, rdx", "rep stosb", "mov rax, r8", "ret")
    }

    /// C's memcmp.
    #[unsafe(naked)]
    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
        naked_asm!(
            "xor ecx, ecx",
            "2:",
            "cmp rcx, rdx",
            "je 3f",
            "movzx eax, byte ptr [rdi + rcx]",
            "movzx r8d, byte ptr [rsi + rcx]",
            "inc rcx",
            "sub eax, r8d",
            "je 2b",
            "ret",
            "3:",
            "xor eax, eax",
            "ret",
        )
    }

    /// BSD's bcmp, which LLVM prefers where only equality counts.
    #[unsafe(naked)]
    #[unsafe(no_mangle)]
    unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
        naked_asm!("jmp {f}", f = sym memcmp)
    }

    /// C's strlen.
    #[unsafe(naked)]
    #[unsafe(no_mangle)]
    unsafe extern "C" fn strlen(s: *const u8) -> usize {
        naked_asm!(
            "xor eax, eax",
            "2:",
            "cmp byte ptr [rdi + rax], 0",
            "je 3f",
            "inc rax",
            "jmp 2b",
            "3:",
            "ret",
        )
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn c_len_stops_at_the_zero() {
        // SAFETY: the literals end in a zero byte.
        unsafe {
            assert_eq!(super::c_len(c"".as_ptr().cast()), 0);
            assert_eq!(super::c_len(c"blob".as_ptr().cast()), 4);
        }
    }
}
