//! Where everything lies in the parasite's mapping.

use parasite::{Control, DATA_LEN};

use super::blob::Blob;
use crate::arch::FRAME_ALIGN;

const PAGE: u64 = 4096;

/// Bytes of the parasite's stack. Its deepest command uses less than 2 KiB, of which the kernel only
/// gives pages that are touched.
const STACK: u64 = 16 << 10;

/// Addresses of the mapping; see the picture in the `parasite` crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Area {
    /// Start of the mapping and of the code.
    pub base: u64,
    /// Length of the mapping.
    pub len: u64,
    /// Start and length of what is read-write: blob data to signal frame.
    pub rw: (u64, u64),
    /// The control block.
    pub control: u64,
    /// The data area, [`DATA_LEN`] bytes.
    pub data: u64,
    /// The signal frame.
    pub frame: u64,
    /// Start and length of the stack.
    pub stack: (u64, u64),
}

impl Area {
    /// An area at `base` for `blob` and signal frames of at most `frame_len` bytes.
    pub fn new(base: u64, blob: &Blob, frame_len: u64) -> Area {
        let rw = base + blob.rx_len as u64;
        let control = (rw + blob.rw_len() as u64).next_multiple_of(FRAME_ALIGN);
        let data = (control + size_of::<Control>() as u64).next_multiple_of(FRAME_ALIGN);
        let frame = (data + DATA_LEN as u64).next_multiple_of(FRAME_ALIGN);
        let rw_end = (frame + frame_len).next_multiple_of(PAGE);
        // A page that stays read-execute on either side of the stack: an overflow faults, and the kernel
        // does not merge the stack with a neighbour of the target's.
        let stack = rw_end + PAGE;
        let end = stack + STACK + PAGE;
        Area { base, len: end - base, rw: (rw, rw_end - rw), control, data, frame, stack: (stack, STACK) }
    }

    /// Stack pointer to enter with.
    pub fn stack_top(&self) -> u64 {
        self.stack.0 + self.stack.1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::infect::blob::PARASITE;

    #[test]
    fn parts_are_aligned_and_apart() {
        let a = Area::new(0x7000_0000, &PARASITE, 3000);
        assert_eq!(a.len % PAGE, 0);
        assert_eq!((a.rw.0 % PAGE, a.rw.1 % PAGE, a.stack.0 % PAGE), (0, 0, 0));
        assert_eq!(a.frame % FRAME_ALIGN, 0);
        assert!(a.rw.0 + PARASITE.rw_len() as u64 <= a.control);
        assert!(a.control + size_of::<Control>() as u64 <= a.data);
        assert!(a.data + DATA_LEN as u64 <= a.frame);
        assert!(a.frame + 3000 <= a.rw.0 + a.rw.1);
        assert!(a.rw.0 + a.rw.1 < a.stack.0 && a.stack_top() < a.base + a.len);
    }
}
