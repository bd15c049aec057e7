//! Restartable sequences, rseq(2).
//!
//! # Safety
//! Registering memory with the kernel lets it write there on every preemption; see [`set`].
#![allow(unsafe_code)]

use crate::{error::Result, sys::errno};

/// Offset of the pointer to the running critical section in `struct rseq`.
pub const RSEQ_CS_OFFSET: u64 = 8;
const RSEQ_FLAG_UNREGISTER: u64 = 1;

/// A critical section, `struct rseq_cs` of the kernel's `uapi/linux/rseq.h`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CriticalSection {
    /// Address of its first instruction.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// Where execution goes on if it is interrupted.
    pub abort: u64,
    /// Flags; all deprecated.
    pub flags: u32,
}

impl CriticalSection {
    /// Bytes of the structure.
    pub const SIZE: usize = 32;

    /// From the structure's bytes.
    pub fn from_bytes(bytes: &[u8; Self::SIZE]) -> Self {
        let word = |at: usize| {
            let mut w = [0; 8];
            w.copy_from_slice(&bytes[at..at + 8]);
            u64::from_ne_bytes(w)
        };
        CriticalSection { flags: (word(0) >> 32) as u32, start: word(8), len: word(16), abort: word(24) }
    }

    /// Whether an instruction at `ip` is inside; the kernel's test.
    pub fn contains(&self, ip: u64) -> bool {
        ip.wrapping_sub(self.start) < self.len
    }
}

/// Registers (or with `unregister` gives up) the calling thread's area.
///
/// # Errors
/// EINVAL if the length or alignment is wrong or, when giving up, another area is registered; EBUSY if
/// this one is registered already; EPERM if the signature differs.
///
/// # Safety
/// `area` points to `len` bytes that stay valid as a `struct rseq` while registered.
pub unsafe fn set(area: u64, len: u32, signature: u32, unregister: bool) -> Result<()> {
    let flags = if unregister { RSEQ_FLAG_UNREGISTER } else { 0 };
    // SAFETY: the caller vouches for the area.
    let ret = unsafe { libc::syscall(libc::SYS_rseq, area, len, flags, signature) };
    errno::check(ret, "rseq").map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_end_before_their_last_byte() {
        let mut bytes = [0u8; CriticalSection::SIZE];
        bytes[8..16].copy_from_slice(&0x1000u64.to_ne_bytes());
        bytes[16..24].copy_from_slice(&0x20u64.to_ne_bytes());
        bytes[24..32].copy_from_slice(&0x2000u64.to_ne_bytes());
        let cs = CriticalSection::from_bytes(&bytes);
        assert_eq!(cs, CriticalSection { start: 0x1000, len: 0x20, abort: 0x2000, flags: 0 });
        assert!(cs.contains(0x1000) && cs.contains(0x101f));
        assert!(!cs.contains(0x1020) && !cs.contains(0xfff));
    }
}
