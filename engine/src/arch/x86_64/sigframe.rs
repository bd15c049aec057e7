//! The frame from which rt_sigreturn(2) loads every register.
//!
//! ```text
//! at          +8                                    +312     +440 ..+448             +448+len
//! | return    | flags, link, altstack | sigcontext  | siginfo | pad | XSAVE area     | magic |
//! | address   |                       | signal mask |         |     | (64-aligned)   |       |
//!             ^ stack pointer when rt_sigreturn is called
//! ```
//!
//! Layout: `struct rt_sigframe` and `uapi/asm/sigcontext.h` of the kernel.

use super::{
    layout::{HEADER, LEGACY, Layout},
    regs::Regs,
    xsave::{XTILE_DATA, Xsave},
};
use crate::error::{Error, Result};

/// Alignment of a frame's address.
pub const FRAME_ALIGN: u64 = 64;

const FPSTATE: usize = 448;
const MAGIC1: u32 = 0x4650_5853;
const MAGIC2: u32 = 0x4650_5845;
/// The frame has extended state, its ss is valid, and ss is to be loaded.
const UC_FLAGS: u64 = 1 | 2 | 4;

/// sigaltstack(2) of a thread.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct AltStack {
    /// Lowest address.
    pub sp: u64,
    /// `SS_*` bits.
    pub flags: u32,
    /// Length in bytes.
    pub size: u64,
}

/// A frame, ready to be copied to the address it was made for.
#[derive(Clone, Debug)]
pub struct SigFrame {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Stack pointer with which to call rt_sigreturn.
    pub sp: u64,
}

impl SigFrame {
    /// Bytes that any frame takes at most on this processor, with the components in `mask` beside all but tile data.
    pub fn most(layout: &Layout, mask: u64) -> usize {
        FPSTATE + layout.len_for(!XTILE_DATA | mask) + size_of::<u32>()
    }

    /// Bytes that a frame for `xsave` takes at most.
    pub fn max_len(xsave: &Xsave) -> usize {
        FPSTATE + xsave.bytes().len() + size_of::<u32>()
    }

    /// The code a `ret` goes to when the stack pointer is the frame's address: it has to call
    /// rt_sigreturn.
    pub fn set_return(&mut self, address: u64) {
        self.bytes[..8].copy_from_slice(&address.to_ne_bytes());
    }

    /// A frame at address `at` (a multiple of [`FRAME_ALIGN`]) that loads `regs`, the area and the mask
    /// of blocked signals. `regs` must be settled: nothing restarts a call after rt_sigreturn. FS and GS
    /// bases are not part of a frame. With `altstack` `None` the thread keeps the one it has.
    pub fn build(
        at: u64,
        regs: &Regs,
        xsave: &Xsave,
        layout: &Layout,
        mask: u64,
        altstack: Option<AltStack>,
    ) -> Result<SigFrame> {
        if !at.is_multiple_of(FRAME_ALIGN) {
            return Err(Error::bug(format!("signal frame at {at:#x} is not aligned")));
        }
        // The kernel takes an area for plain FXSAVE state if it is longer than the thread's permitted
        // components, so it ends where the last of those does: areas of threads that have not asked for tile data
        // must not mention it.
        let features = (xsave.features() | 3) & layout.features();
        let features = if xsave.in_use() & XTILE_DATA == 0 { features & !XTILE_DATA } else { features };
        let len = layout.len_for(features);
        if xsave.in_use() & !features != 0 {
            return Err(Error::bug(format!("signal frame for state {:#x} of {features:#x}", xsave.in_use())));
        }

        let alt = altstack.unwrap_or(AltStack {
            sp: 0,
            // No such mode: sigaltstack refuses it and rt_sigreturn goes on.
            flags: 0x10,
            size: 0,
        });
        let r = regs;
        let words: [u64; 39] = [
            0,
            UC_FLAGS,
            0,
            alt.sp,
            u64::from(alt.flags),
            alt.size,
            r.r8,
            r.r9,
            r.r10,
            r.r11,
            r.r12,
            r.r13,
            r.r14,
            r.r15,
            r.rdi,
            r.rsi,
            r.rbp,
            r.rbx,
            r.rdx,
            r.rax,
            r.rcx,
            r.rsp,
            r.rip,
            r.eflags,
            (r.cs & 0xffff) | (r.ss & 0xffff) << 48,
            0,
            0,
            0,
            0,
            at + FPSTATE as u64,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            mask,
        ];
        let mut bytes = Vec::with_capacity(FPSTATE + len + 4);
        bytes.extend(words.iter().flat_map(|w| w.to_ne_bytes()));
        bytes.resize(FPSTATE, 0);
        let area = xsave.bytes();
        bytes.extend_from_slice(&area[..area.len().min(len)]);
        bytes.resize(FPSTATE + len, 0);

        // What the kernel keeps in the bytes the processor leaves to software.
        let software = &mut bytes[FPSTATE + 464..FPSTATE + LEGACY];
        software.fill(0);
        software[..4].copy_from_slice(&MAGIC1.to_ne_bytes());
        software[4..8].copy_from_slice(&(len as u32 + 4).to_ne_bytes());
        software[8..16].copy_from_slice(&features.to_ne_bytes());
        software[16..20].copy_from_slice(&(len as u32).to_ne_bytes());
        // Of the header only the bits in use may be set.
        bytes[FPSTATE + LEGACY + 8..FPSTATE + LEGACY + HEADER].fill(0);
        bytes.extend(MAGIC2.to_ne_bytes());
        Ok(SigFrame { bytes, sp: at + 8 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(layout: &Layout, used: u64) -> Xsave {
        let mut bytes = vec![0; layout.len_for(u64::MAX)];
        bytes[464..472].copy_from_slice(&layout.features().to_ne_bytes());
        bytes[512..520].copy_from_slice(&used.to_ne_bytes());
        Xsave::from_bytes(&bytes, layout).unwrap()
    }

    #[test]
    fn words_lie_where_the_kernel_reads_them() {
        let layout = Layout::of(&[(2, 576, 256)]);
        let regs =
            Regs { rip: 0x11, rsp: 0x22, rax: 0x33, cs: 0x33, ss: 0x2b, eflags: 0x246, ..Regs::default() };
        let alt = AltStack { sp: 0x5000, flags: 2, size: 0x2000 };
        let f = SigFrame::build(0x10000, &regs, &area(&layout, 7), &layout, 0xabc, Some(alt)).unwrap();
        assert_eq!(f.sp, 0x10008);
        assert_eq!(f.bytes.len(), 448 + 832 + 4);
        assert!(f.bytes.len() <= SigFrame::max_len(&area(&layout, 7)));
        let uc = 8;
        let field = |at: usize| u64::from_ne_bytes(f.bytes[at..at + 8].try_into().unwrap());
        use std::mem::offset_of;
        let stack = uc + offset_of!(libc::ucontext_t, uc_stack);
        assert_eq!(field(stack), 0x5000);
        assert_eq!(field(stack + offset_of!(libc::stack_t, ss_size)), 0x2000);
        let gregs = uc + offset_of!(libc::ucontext_t, uc_mcontext);
        assert_eq!(field(gregs + 8 * libc::REG_RIP as usize), 0x11);
        assert_eq!(field(gregs + 8 * libc::REG_RSP as usize), 0x22);
        assert_eq!(field(gregs + 8 * libc::REG_RAX as usize), 0x33);
        assert_eq!(field(gregs + 8 * libc::REG_EFL as usize), 0x246);
        assert_eq!(field(gregs + 8 * libc::REG_CSGSFS as usize), 0x002b_0000_0000_0033);
        assert_eq!(field(gregs + offset_of!(libc::mcontext_t, fpregs)), 0x10000 + 448);
        assert_eq!(field(uc + offset_of!(libc::ucontext_t, uc_sigmask)), 0xabc);
    }

    #[test]
    fn tile_data_is_only_mentioned_when_used() {
        let layout = Layout::of(&[(2, 576, 256), (17, 2752, 64), (18, 2816, 8192)]);
        let len = |used| {
            let f = SigFrame::build(0, &Regs::default(), &area(&layout, used), &layout, 0, None).unwrap();
            f.bytes.len() - FPSTATE - 4
        };
        assert_eq!(len(7), 2816);
        assert_eq!(len(0x60007), 2816 + 8192);
        assert!(SigFrame::build(8, &Regs::default(), &area(&layout, 7), &layout, 0, None).is_err());
    }
}
