//! A panic in a blob ends in `ud2` with its place in registers, where the engine reads it.
//!
//! The message is never looked at, so fat LTO drops all formatting code.
//!
//! # Safety
//! Executes an invalid instruction on purpose; the tracer takes the SIGILL.

use core::{arch::asm, panic::PanicInfo};

use crate::abi::PANIC_MARK;

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let (file, line, column) = match info.location() {
        Some(l) => (l.file(), l.line(), l.column()),
        None => ("", 0, 0),
    };
    // SAFETY: does not return; registers only.
    unsafe {
        asm!(
            "ud2",
            in("rax") PANIC_MARK,
            in("rdi") file.as_ptr(),
            in("rsi") file.len(),
            in("rdx") line as usize,
            in("r8") column as usize,
            options(noreturn, nostack),
        )
    }
}
