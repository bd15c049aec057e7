//! Where everything lies in the parasite's mapping.

use parasite::{Control, DATA_LEN, thread::ThreadInfo};

use super::blob::Blob;
use crate::arch::FRAME_ALIGN;

const PAGE: u64 = 4096;

/// Bytes of the parasite's stack. Its deepest command uses less than 2 KiB, of which the kernel only
/// gives pages that are touched.
const STACK: u64 = 16 << 10;

/// Threads that are asked together where there are many.
pub(super) const TOGETHER: usize = 32;

/// Bytes of the stack of one of them, whose end is looked at afterwards: asking one takes a third of it.
const SMALL_STACK: u64 = 4 << 10;

/// What each of several threads that are asked together has for itself, one behind the other:
///
/// ```text
/// | mark | stack | control block | answer | signal frame |
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    /// A word that must stay as it was, at the end of the stack.
    pub mark: u64,
    /// The control block; the stack ends here.
    pub control: u64,
    /// The answer.
    pub data: u64,
    /// The signal frame.
    pub frame: u64,
}

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
    /// Where slots start, the length of one, and how many there are.
    slots: (u64, u64, usize),
}

impl Area {
    /// An area at `base` for `blob` and signal frames of at most `frame_len` bytes, with so many slots.
    pub fn new(base: u64, blob: &Blob, frame_len: u64, slots: usize) -> Area {
        let rw = base + blob.rx_len as u64;
        let control = (rw + blob.rw_len() as u64).next_multiple_of(FRAME_ALIGN);
        let data = (control + size_of::<Control>() as u64).next_multiple_of(FRAME_ALIGN);
        let frame = (data + DATA_LEN as u64).next_multiple_of(FRAME_ALIGN);
        let first = (frame + frame_len).next_multiple_of(FRAME_ALIGN);
        let slot = Slot::at(0).frame + frame_len.next_multiple_of(FRAME_ALIGN);
        let rw_end = (first + slot * slots as u64).next_multiple_of(PAGE);
        // A page that stays read-execute on either side of the stack: an overflow faults, and the kernel
        // does not merge the stack with a neighbour of the target's.
        let stack = rw_end + PAGE;
        let end = stack + STACK + PAGE;
        Area {
            base,
            len: end - base,
            rw: (rw, rw_end - rw),
            control,
            data,
            frame,
            stack: (stack, STACK),
            slots: (first, slot, slots),
        }
    }

    /// The same at another address.
    pub fn at(self, base: u64) -> Area {
        let to = |at: u64| base + (at - self.base);
        Area {
            base,
            len: self.len,
            rw: (to(self.rw.0), self.rw.1),
            control: to(self.control),
            data: to(self.data),
            frame: to(self.frame),
            stack: (to(self.stack.0), self.stack.1),
            slots: (to(self.slots.0), self.slots.1, self.slots.2),
        }
    }

    /// How many slots there are.
    pub fn slot_count(&self) -> usize {
        self.slots.2
    }

    /// All slots, in order.
    pub fn slots(&self) -> impl Iterator<Item = Slot> {
        let (first, len, count) = self.slots;
        (0..count as u64).map(move |n| Slot::at(first + n * len))
    }

    /// Stack pointer to enter with.
    pub fn stack_top(&self) -> u64 {
        self.stack.0 + self.stack.1
    }
}

impl Slot {
    fn at(start: u64) -> Slot {
        let control = start + SMALL_STACK;
        let data = (control + size_of::<Control>() as u64).next_multiple_of(16);
        let frame = (data + size_of::<ThreadInfo>() as u64).next_multiple_of(FRAME_ALIGN);
        Slot { mark: start, control, data, frame }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::infect::blob::PARASITE;

    #[test]
    fn parts_are_aligned_and_apart() {
        let a = Area::new(0x7000_0000, &PARASITE, 3000, 0);
        assert_eq!(a.len % PAGE, 0);
        assert_eq!((a.rw.0 % PAGE, a.rw.1 % PAGE, a.stack.0 % PAGE), (0, 0, 0));
        assert_eq!(a.frame % FRAME_ALIGN, 0);
        assert!(a.rw.0 + PARASITE.rw_len() as u64 <= a.control);
        assert!(a.control + size_of::<Control>() as u64 <= a.data);
        assert!(a.data + DATA_LEN as u64 <= a.frame);
        assert!(a.frame + 3000 <= a.rw.0 + a.rw.1);
        assert!(a.rw.0 + a.rw.1 < a.stack.0 && a.stack_top() < a.base + a.len);
        assert_eq!(a.slots().count(), 0);
    }

    #[test]
    fn slots_lie_behind_each_other_before_the_stack() {
        let a = Area::new(0x7000_0000, &PARASITE, 3000, TOGETHER);
        assert_eq!((a.len % PAGE, a.stack.0 % PAGE, a.slot_count()), (0, 0, TOGETHER));
        let mut from = a.frame + 3000;
        for slot in a.slots() {
            assert!(slot.mark >= from && slot.mark % 8 == 0);
            assert_eq!((slot.control % 16, slot.data % 8, slot.frame % FRAME_ALIGN), (0, 0, 0));
            assert!(slot.control + size_of::<Control>() as u64 <= slot.data);
            assert!(slot.data + size_of::<ThreadInfo>() as u64 <= slot.frame);
            from = slot.frame + 3000;
        }
        assert!(from <= a.rw.0 + a.rw.1 && a.rw.0 + a.rw.1 < a.stack.0);
    }
}
