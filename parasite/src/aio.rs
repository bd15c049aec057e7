//! Rings of asynchronous I/O (io_setup(2)): whether requests are in flight.
//!
//! # Safety
//! Reads the head of the ring, which the kernel maps readable into the process.

use crate::plain;

plain! {
    /// Head of a ring, `struct aio_ring` of the kernel's fs/aio.c.
    pub struct AioRing[32] {
        /// Index in the kernel's table.
        pub id: u32,
        /// Events that fit.
        pub nr: u32,
        /// Next event to be read.
        pub head: u32,
        /// Next place to be written.
        pub tail: u32,
        /// [`MAGIC`].
        pub magic: u32,
        /// Format, 1.
        pub compat_features: u32,
        /// Format, 0.
        pub incompat_features: u32,
        /// Bytes of this head.
        pub header_length: u32,
    }
}

/// Marks a ring.
pub const MAGIC: u32 = 0xa10a_10a1;

/// The head of the ring at `address`.
///
/// # Safety
/// A ring is mapped there.
pub unsafe fn read(address: u64) -> AioRing {
    // SAFETY: the caller says that a ring is there; the kernel may change it meanwhile.
    unsafe { (address as *const AioRing).read_volatile() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Command, tests::Bench};
    use blobrt::syscall::{nr, syscall1, syscall2};

    #[test]
    fn a_fresh_ring_is_empty() {
        let mut context = 0u64;
        // SAFETY: stores one word.
        if unsafe { syscall2(nr::IO_SETUP, 8, (&raw mut context) as usize) }.is_err() {
            eprintln!("SKIP: no io_setup");
            return;
        }
        let mut bench = Bench::new(Command::Aio);
        bench.control.args[0] = context;
        assert_eq!(bench.run(), 0);
        let ring: AioRing = bench.read(0);
        assert_eq!((ring.magic, ring.header_length, ring.head, ring.tail), (MAGIC, 32, 0, 0));
        assert!(ring.nr >= 8);
        // SAFETY: our own context.
        unsafe { syscall1(nr::IO_DESTROY, context as usize) }.unwrap();
    }
}
