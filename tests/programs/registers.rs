//! A thread that spins with every register holding a pattern: general, x87, SSE, AVX, AVX-512, mask.
//!
//! # Safety
//!
//! `hold` is our own assembly: it saves what the C ABI asks for, touches only the statics named in it, and
//! is called only with a register level that the CPU was found to have.

use std::arch::{global_asm, is_x86_feature_detected};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Context;

use crate::kit::{Check, mem::word, rest, same};

const GENERAL: usize = 14;
const VECTORS: usize = 32;

#[repr(C, align(64))]
#[derive(Clone, Debug, PartialEq)]
struct Registers {
    vectors: [[u64; 8]; VECTORS],
    masks: [u64; 8],
    general: [u64; GENERAL],
    x87: [u64; 2],
    mxcsr: u32,
    x87_control: u16,
    _pad: u16,
}

const EMPTY: Registers = Registers {
    vectors: [[0; 8]; VECTORS],
    masks: [0; 8],
    general: [0; GENERAL],
    x87: [0; 2],
    mxcsr: 0,
    x87_control: 0,
    _pad: 0,
};

/// Written by one thread at a time: before the spin, by the spin's end, after the join.
struct Slot(UnsafeCell<Registers>);

// SAFETY: see the type.
unsafe impl Sync for Slot {}

static IN: Slot = Slot(UnsafeCell::new(EMPTY));
static OUT: Slot = Slot(UnsafeCell::new(EMPTY));
static SPINNING: AtomicU32 = AtomicU32::new(0);
static RELEASE: AtomicU32 = AtomicU32::new(0);
/// 0: SSE, 1: AVX, 2: AVX-512.
static LEVEL: AtomicU32 = AtomicU32::new(0);

unsafe extern "C" {
    fn rcriu_test_hold();
}

global_asm!(
    ".altmacro",
    ".macro rcriu_each_vector op, reg, count, slot, store",
    "  .set rcriu_i, 0",
    "  .rept \\count",
    "    rcriu_one_vector \\op, \\reg, %rcriu_i, \\slot, \\store",
    "    .set rcriu_i, rcriu_i + 1",
    "  .endr",
    ".endm",
    ".macro rcriu_one_vector op, reg, i, slot, store",
    "  .if \\store",
    "    \\op [\\slot + 64*\\i], \\reg\\i",
    "  .else",
    "    \\op \\reg\\i, [\\slot + 64*\\i]",
    "  .endif",
    ".endm",
    ".pushsection .text.rcriu_test_hold,\"ax\",@progbits",
    ".globl rcriu_test_hold",
    "rcriu_test_hold:",
    "  push rbx",
    "  push rbp",
    "  push r12",
    "  push r13",
    "  push r14",
    "  push r15",
    "  sub rsp, 8",
    "  fnstcw [rsp]",
    "  stmxcsr [rsp + 4]",
    "  lea rsi, [rip + {input}]",
    "  cmp dword ptr [rip + {level}], 1",
    "  jb 2f",
    "  je 3f",
    "  rcriu_each_vector vmovdqu64, zmm, 32, rsi, 0",
    "  kmovq k1, [rsi + 2048 + 8]",
    "  kmovq k2, [rsi + 2048 + 16]",
    "  kmovq k3, [rsi + 2048 + 24]",
    "  kmovq k4, [rsi + 2048 + 32]",
    "  kmovq k5, [rsi + 2048 + 40]",
    "  kmovq k6, [rsi + 2048 + 48]",
    "  kmovq k7, [rsi + 2048 + 56]",
    "  jmp 4f",
    "3:",
    "  rcriu_each_vector vmovdqu, ymm, 16, rsi, 0",
    "  jmp 4f",
    "2:",
    "  rcriu_each_vector movdqu, xmm, 16, rsi, 0",
    "4:",
    "  fldcw [rsi + 2240 + 4]",
    "  ldmxcsr [rsi + 2240]",
    "  fld qword ptr [rsi + 2224]",
    "  fld qword ptr [rsi + 2232]",
    "  mov rax, [rsi + 2112]",
    "  mov rbx, [rsi + 2120]",
    "  mov rcx, [rsi + 2128]",
    "  mov rdx, [rsi + 2136]",
    "  mov rdi, [rsi + 2144]",
    "  mov rbp, [rsi + 2152]",
    "  mov r8, [rsi + 2160]",
    "  mov r9, [rsi + 2168]",
    "  mov r10, [rsi + 2176]",
    "  mov r11, [rsi + 2184]",
    "  mov r12, [rsi + 2192]",
    "  mov r13, [rsi + 2200]",
    "  mov r14, [rsi + 2208]",
    "  mov r15, [rsi + 2216]",
    "  mov dword ptr [rip + {spinning}], 1",
    "5:",
    "  cmp dword ptr [rip + {release}], 0",
    "  je 5b",
    "  lea rsi, [rip + {output}]",
    "  mov [rsi + 2112], rax",
    "  mov [rsi + 2120], rbx",
    "  mov [rsi + 2128], rcx",
    "  mov [rsi + 2136], rdx",
    "  mov [rsi + 2144], rdi",
    "  mov [rsi + 2152], rbp",
    "  mov [rsi + 2160], r8",
    "  mov [rsi + 2168], r9",
    "  mov [rsi + 2176], r10",
    "  mov [rsi + 2184], r11",
    "  mov [rsi + 2192], r12",
    "  mov [rsi + 2200], r13",
    "  mov [rsi + 2208], r14",
    "  mov [rsi + 2216], r15",
    "  fstp qword ptr [rsi + 2232]",
    "  fstp qword ptr [rsi + 2224]",
    "  stmxcsr [rsi + 2240]",
    "  fnstcw [rsi + 2240 + 4]",
    "  cmp dword ptr [rip + {level}], 1",
    "  jb 2f",
    "  je 3f",
    "  rcriu_each_vector vmovdqu64, zmm, 32, rsi, 1",
    "  kmovq [rsi + 2048 + 8], k1",
    "  kmovq [rsi + 2048 + 16], k2",
    "  kmovq [rsi + 2048 + 24], k3",
    "  kmovq [rsi + 2048 + 32], k4",
    "  kmovq [rsi + 2048 + 40], k5",
    "  kmovq [rsi + 2048 + 48], k6",
    "  kmovq [rsi + 2048 + 56], k7",
    "  vzeroupper",
    "  jmp 4f",
    "3:",
    "  rcriu_each_vector vmovdqu, ymm, 16, rsi, 1",
    "  vzeroupper",
    "  jmp 4f",
    "2:",
    "  rcriu_each_vector movdqu, xmm, 16, rsi, 1",
    "4:",
    "  fldcw [rsp]",
    "  ldmxcsr [rsp + 4]",
    "  add rsp, 8",
    "  pop r15",
    "  pop r14",
    "  pop r13",
    "  pop r12",
    "  pop rbp",
    "  pop rbx",
    "  ret",
    ".popsection",
    ".noaltmacro",
    input = sym IN,
    output = sym OUT,
    level = sym LEVEL,
    spinning = sym SPINNING,
    release = sym RELEASE,
);

const _: () = assert!(std::mem::offset_of!(Registers, masks) == 2048);
const _: () = assert!(std::mem::offset_of!(Registers, general) == 2112);
const _: () = assert!(std::mem::offset_of!(Registers, x87) == 2224);
const _: () = assert!(std::mem::offset_of!(Registers, mxcsr) == 2240);

/// What the spin is entered with, as far as this CPU has the registers.
fn patterns(level: u32) -> Registers {
    let (count, words) = [(16, 2), (16, 4), (32, 8)][level as usize];
    let mut r = EMPTY;
    for (i, vector) in r.vectors.iter_mut().take(count).enumerate() {
        vector.iter_mut().take(words).enumerate().for_each(|(w, x)| *x = word(71, i * 8 + w));
    }
    if level == 2 {
        r.masks.iter_mut().enumerate().skip(1).for_each(|(i, m)| *m = word(72, i));
    }
    r.general.iter_mut().enumerate().for_each(|(i, g)| *g = word(73, i));
    // Exact in extended precision, so that storing gives back what was loaded.
    r.x87 = [1.5f64.to_bits(), (-42.25f64).to_bits()];
    // Rounding towards zero, flush to zero; all exceptions masked.
    r.mxcsr = 0xff80;
    r.x87_control = 0x0f7f;
    r
}

/// Spins with the registers in use; the widest vectors of this CPU, or those of the level in the argument.
pub fn run(_: &[String]) -> Check {
    let level = if is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512f") {
        2
    } else if is_x86_feature_detected!("avx") {
        1
    } else {
        0
    };
    LEVEL.store(level, Ordering::SeqCst);
    let input = patterns(level);
    // SAFETY: nobody reads it before the thread below starts.
    unsafe { *IN.0.get() = input.clone() };
    // SAFETY: the CPU has the level's registers.
    let spinner = std::thread::Builder::new().spawn(|| unsafe { rcriu_test_hold() }).context("thread")?;
    while SPINNING.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    rest()?;
    RELEASE.store(1, Ordering::SeqCst);
    spinner.join().ok().context("the spinning thread panicked")?;
    // SAFETY: the thread that wrote it has been joined.
    let output = unsafe { &*OUT.0.get() };
    for i in 0..VECTORS {
        same(&format!("vector register {i}"), output.vectors[i], input.vectors[i])?;
    }
    same("mask registers", output.masks, input.masks)?;
    same("general registers", output.general, input.general)?;
    same("x87 registers", output.x87, input.x87)?;
    same("mxcsr", output.mxcsr, input.mxcsr)?;
    same("x87 control word", output.x87_control, input.x87_control)
}
