//! Restartable sequences on kernels that do not tell a tracer where they are registered (before 5.13).
//!
//! rseq(2) answers EBUSY to who registers the very area that is registered already, and EINVAL to any
//! other, without touching it. C libraries register an area of the minimal size near the thread pointer,
//! so trying the places there finds it.
//!
//! # Safety
//! An area is only registered by the first, decisive try, and given up at once.

use blobrt::syscall::{Errno, nr, syscall4};

/// Length of an area on the kernels in question.
pub const LEN: u32 = 32;
/// Signature that all C libraries use on x86_64.
pub const SIGNATURE: u32 = 0x5305_3053;
/// [`find`]: nothing is registered.
pub const NONE: u64 = 0;
/// [`find`]: something is, at a place unknown.
pub const UNKNOWN: u64 = u64::MAX;

const UNREGISTER: usize = 1;
const EBUSY: Errno = Errno(16);
const ENOSYS: Errno = Errno(38);
/// How far around the thread pointer is looked.
const REACH: u64 = 8 << 10;

#[repr(C, align(32))]
struct Area([u8; LEN as usize]);

/// The address of the calling thread's area, [`NONE`] or [`UNKNOWN`]. `near` is its thread pointer.
pub fn find(near: u64) -> u64 {
    let mut own = Area([0; LEN as usize]);
    let call = |address: u64, flags: usize| {
        // SAFETY: an area that is registered is our own, for an instant; other addresses are only
        // compared.
        unsafe { syscall4(nr::RSEQ, address as usize, LEN as usize, flags, SIGNATURE as usize) }
    };
    let at = (&raw mut own.0) as u64;
    match call(at, 0) {
        Ok(_) => {
            let _ = call(at, UNREGISTER);
            return NONE;
        }
        Err(ENOSYS) => return NONE,
        Err(_) => {}
    }
    let start = near.wrapping_sub(REACH) & !31;
    (0..2 * REACH / 32)
        .map(|i| start.wrapping_add(i * 32))
        .find(|address| call(*address, 0) == Err(EBUSY))
        .unwrap_or(UNKNOWN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_c_librarys_area_is_found() {
        let mut fs = 0u64;
        // SAFETY: ARCH_GET_FS stores one word.
        unsafe { blobrt::syscall::syscall2(nr::ARCH_PRCTL, 0x1003, (&raw mut fs) as usize) }.unwrap();
        match find(fs) {
            UNKNOWN => eprintln!("SKIP: another signature or length"),
            NONE => eprintln!("SKIP: the C library does not use restartable sequences"),
            at => {
                assert!(at.abs_diff(fs) <= REACH);
                assert_eq!(find(fs), at, "asking changes nothing");
            }
        }
    }
}
