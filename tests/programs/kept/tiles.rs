//! Tile data (AMX) of threads.
//!
//! # Safety
//!
//! Instructions on tiles, with memory of this program that is as large as a tile, in a process that was given leave to
//! use them.

use std::arch::asm;

use anyhow::Result;
use nix::errno::Errno;

use crate::kit::{Check, same, skip, sys, team};

const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
const XTILE_DATA: u64 = 18;
/// Bytes of a tile: 16 rows of 64.
const TILE: usize = 1024;

#[repr(align(64))]
#[derive(Clone, Copy, PartialEq, Eq)]
struct Block<const N: usize>([u8; N]);

/// Palette 1; tiles 0 and 7 are whole.
fn config() -> Block<64> {
    let mut config = Block([0; 64]);
    config.0[0] = 1;
    for tile in [0, 7] {
        (config.0[16 + 2 * tile], config.0[48 + tile]) = (64, 16);
    }
    config
}

fn pattern(seed: usize) -> Block<TILE> {
    Block(std::array::from_fn(|i| (i * 31 + seed * 7 + i / 64) as u8))
}

/// Sets tiles 0 and 7 to patterns of this thread.
fn load(thread: usize) {
    let (config, zero, seven) = (config(), pattern(thread), pattern(thread + 100));
    // SAFETY: see the header.
    unsafe {
        asm!(
            // ldtilecfg [rax]; tileloadd tmm0, [rcx + rsi]; tileloadd tmm7, [rdx + rsi]
            ".byte 0xc4, 0xe2, 0x78, 0x49, 0x00",
            ".byte 0xc4, 0xe2, 0x7b, 0x4b, 0x04, 0x31",
            ".byte 0xc4, 0xe2, 0x7b, 0x4b, 0x3c, 0x32",
            in("rax") &config,
            in("rcx") &zero,
            in("rdx") &seven,
            in("rsi") 64usize,
            options(nostack),
        );
    }
}

/// What the configuration and the two tiles are now.
fn store() -> (Block<64>, Block<TILE>, Block<TILE>) {
    let (mut config, mut zero, mut seven) = (Block([0; 64]), Block([0; TILE]), Block([0; TILE]));
    // SAFETY: see the header.
    unsafe {
        asm!(
            // sttilecfg [rax]; tilestored [rcx + rsi], tmm0; tilestored [rdx + rsi], tmm7
            ".byte 0xc4, 0xe2, 0x79, 0x49, 0x00",
            ".byte 0xc4, 0xe2, 0x7a, 0x4b, 0x04, 0x31",
            ".byte 0xc4, 0xe2, 0x7a, 0x4b, 0x3c, 0x32",
            in("rax") &mut config,
            in("rcx") &mut zero,
            in("rdx") &mut seven,
            in("rsi") 64usize,
            options(nostack),
        );
    }
    (config, zero, seven)
}

/// Threads have different tiles, every other one none.
pub fn tiles(_: &[String]) -> Check {
    // SAFETY: integers.
    match sys("arch_prctl", unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILE_DATA) }) {
        Err(e) if matches!(e.downcast_ref(), Some(Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ENODEV)) => {
            return Err(skip("the processor has no tiles (AMX)"));
        }
        other => other?,
    };
    let set = |thread: usize| -> Result<()> {
        if thread.is_multiple_of(2) {
            load(thread);
        }
        Ok(())
    };
    let check = |thread: usize, ()| -> Check {
        if !thread.is_multiple_of(2) {
            // It can have them still.
            load(thread);
        }
        let (now, zero, seven) = store();
        same("configuration", now == config(), true)?;
        same("tile 0", zero == pattern(thread), true)?;
        same("tile 7", seven == pattern(thread + 100), true)
    };
    team::run(3, set, check)
}
