//! Threads whose registers are full of things that must stay.
//!
//! # Safety
//! Inline assembly on tables and registers of its own; everything it changes is declared.

use std::{
    arch::asm,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use super::{check, ready, wait};

static STOP: AtomicBool = AtomicBool::new(false);

/// Fills every vector register, some general ones and the red zone, spins, and compares. False if
/// anything changed.
pub fn registers_hold(seed: u64, spins: u64) -> bool {
    #[repr(align(32))]
    #[derive(Clone, Copy, PartialEq)]
    struct Vectors([u64; 64]);
    let mut before = Vectors([0; 64]);
    for (i, w) in before.0.iter_mut().enumerate() {
        *w = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(i as u64);
    }
    let mut after = Vectors([0; 64]);
    let (mut general, mut red) = (seed, 0u64);
    // SAFETY: loads and stores stay inside the two tables; the red zone is ours because this block calls
    // nothing; everything changed is declared.
    unsafe {
        asm!(
            ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
            "vmovups ymm\\n, [rsi + 32 * \\n]",
            ".endr",
            "mov [rsp - 8], {seed}",
            "mov [rsp - 120], {seed}",
            "mov r8, {seed}", "mov r9, {seed}", "mov r10, {seed}", "mov r11, {seed}",
            "mov r12, {seed}", "mov r13, {seed}", "mov r14, {seed}", "mov r15, {seed}",
            "2:",
            "dec rcx",
            "jnz 2b",
            ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
            "vmovups [rdi + 32 * \\n], ymm\\n",
            ".endr",
            "xor r9, r8", "xor r10, r8", "or r9, r10", "xor r11, r8", "or r9, r11",
            "xor r12, r8", "or r9, r12", "xor r13, r8", "or r9, r13", "xor r14, r8", "or r9, r14",
            "xor r15, r8", "or r9, r15",
            "mov rax, [rsp - 8]", "xor rax, r8", "or r9, rax",
            "mov rax, [rsp - 120]", "xor rax, r8", "or r9, rax",
            seed = inout(reg) seed => _,
            in("rsi") before.0.as_ptr(),
            in("rdi") after.0.as_mut_ptr(),
            inout("rcx") spins => _,
            out("rax") _,
            out("r8") general, out("r9") red, out("r10") _, out("r11") _,
            out("r12") _, out("r13") _, out("r14") _, out("r15") _,
            out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _,
            out("ymm4") _, out("ymm5") _, out("ymm6") _, out("ymm7") _,
            out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
            out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
            options(nostack),
        );
    }
    after == before && general == seed && red == 0
}

/// Two threads that never leave user space.
pub fn busy() {
    // A group of its own, whose parent is in the same session: stop signals of terminals work.
    // SAFETY: numbers only.
    unsafe { libc::setpgid(0, 0) };
    if !std::is_x86_feature_detected!("avx") {
        ready("skip");
        wait();
        return;
    }
    let spin = |seed: u64| {
        move || {
            while !STOP.load(Ordering::Relaxed) {
                check(registers_hold(seed, 2_000_000), "registers changed");
            }
        }
    };
    let threads: Vec<_> = (1..=2).map(|seed| std::thread::spawn(spin(seed))).collect();
    ready("");
    wait();
    STOP.store(true, Ordering::Relaxed);
    for t in threads {
        t.join().unwrap();
    }
}

/// How often the critical section was aborted.
static ABORTS: AtomicU64 = AtomicU64::new(0);

/// A thread in a restartable sequence that ends only by being aborted: if the kernel forgets about the
/// section, it spins for ever.
pub fn rseq() {
    // SAFETY: looks up a symbol by a constant name.
    let offset = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()) };
    if offset.is_null() {
        ready("skip");
        wait();
        return;
    }
    // SAFETY: glibc declares it as ptrdiff_t.
    let offset = unsafe { offset.cast::<isize>().read() };
    std::thread::spawn(move || section(offset));
    while ABORTS.load(Ordering::Relaxed) == 0 {
        std::thread::yield_now();
    }
    ready(&format!("{}", ABORTS.as_ptr() as u64));
    wait();
}

/// A `struct rseq_cs`, as aligned as the kernel wants it.
#[repr(align(32))]
struct Description([AtomicU64; 4]);

fn section(offset: isize) {
    static DESCRIPTION: Description = Description([const { AtomicU64::new(0) }; 4]);
    // SAFETY: glibc has registered the area at the thread pointer plus offset; the description is static.
    // The signature before the abort handler is glibc's, as the displacement of a ud1.
    unsafe {
        asm!(
            "lea rax, [rip + 2f]",
            "mov [{description} + 8], rax",
            "lea rcx, [rip + 4f]",
            "sub rcx, rax",
            "mov [{description} + 16], rcx",
            "lea rax, [rip + 6f]",
            "mov [{description} + 24], rax",
            "jmp 5f",
            ".byte 0x0f, 0xb9, 0x3d",
            ".long 0x53053053",
            "6:",
            "lock inc qword ptr [{counter}]",
            "5:",
            "mov fs:[{offset} + 8], {description}",
            "2:",
            "pause",
            "jmp 2b",
            "4:",
            offset = in(reg) offset,
            counter = in(reg) ABORTS.as_ptr(),
            description = in(reg) DESCRIPTION.0.as_ptr(),
            out("rax") _,
            out("rcx") _,
        );
    }
}
