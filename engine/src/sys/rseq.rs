//! Restartable sequences, rseq(2).
//!
//! # Safety
//! Registering memory with the kernel lets it write there on every preemption; see [`set`].
#![allow(unsafe_code)]

use crate::{error::Result, sys::errno};

/// Offset of the pointer to the running critical section in `struct rseq`.
pub const RSEQ_CS_OFFSET: u64 = 8;
/// Offset of the flags in `struct rseq`.
pub const RSEQ_FLAGS_OFFSET: u64 = 16;
/// `RSEQ_CS_FLAG_NO_RESTART_ON_SIGNAL`, obeyed before Linux 6.1 and never used since.
const NO_RESTART_ON_SIGNAL: u32 = 1 << 1;
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
    /// `RSEQ_CS_FLAG_*` bits, all deprecated.
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

    /// Whether it goes on after a signal (or a stop) in its middle.
    pub fn survives_signals(&self) -> bool {
        self.flags & NO_RESTART_ON_SIGNAL != 0
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

// Where glibc (2.35 and later) tells of the area it registers for each thread; null with others. Weak references are
// what serves programs linked statically as well, in which dlsym(3) finds nothing.
std::arch::global_asm!(
    ".weak __rseq_offset",
    ".weak __rseq_size",
    ".pushsection .data.rel.ro.rcriu_own_rseq, \"aw\"",
    ".balign 8",
    ".globl rcriu_own_rseq",
    ".hidden rcriu_own_rseq",
    "rcriu_own_rseq: .quad __rseq_offset, __rseq_size",
    ".popsection",
);

unsafe extern "C" {
    #[link_name = "rcriu_own_rseq"]
    static OWN: [*const libc::c_void; 2];
}

/// Gives up the area that glibc (2.35 and later) registered for the calling thread, if it did. Its length is
/// not told by all versions, so those in use are tried: a wrong one changes nothing.
pub fn unregister_own() -> Result<()> {
    const SIGNATURE: u32 = 0x5305_3053;
    // SAFETY: the two addresses stand in the assembly above, filled in by the linker; where they are not null, a
    // ptrdiff_t and an unsigned int are there.
    let told = unsafe {
        let [offset, size] = OWN;
        offset.cast::<isize>().as_ref().copied().zip(size.cast::<u32>().as_ref().copied())
    };
    let Some((offset, size)) = told else { return Ok(()) };
    if size == 0 {
        return Ok(());
    }
    let area = crate::arch::thread_pointer().wrapping_add_signed(offset as i64);
    let mut result = Ok(());
    for len in [32, size, size.next_multiple_of(32), 20, 28] {
        // SAFETY: nothing is registered, only given up.
        result = unsafe { set(area, len, SIGNATURE, true) };
        match &result {
            Err(e) if e.errno() == Some(libc::EINVAL) => {}
            _ => return result,
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_can_give_up_its_area_once() {
        let again = std::thread::spawn(|| (unregister_own(), unregister_own())).join().unwrap();
        assert_eq!(again.0, Ok(()));
        // The second time there is nothing left, unless the libc never registered.
        assert!(again.1.is_ok() || again.1.unwrap_err().errno() == Some(libc::EINVAL));
    }

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
