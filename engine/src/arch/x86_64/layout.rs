//! Where this processor puts each component of an XSAVE area.
//!
//! Places differ between processors (protection keys lie at 2688 on Intel's, at 2432 on some of
//! AMD's), which is why images hold components and not areas.
//!
//! # Safety
//! CPUID is executed; x86_64 always has it, and leaf 0xd is only read if leaf 0 says that it exists.
#![allow(unsafe_code)]
// CPUID became a safe function in later toolchains than the oldest supported one.
#![allow(unused_unsafe)]

use std::{
    arch::x86_64::{__cpuid, __cpuid_count},
    sync::OnceLock,
};

/// Bytes of the part that every area starts with: x87 and SSE state, then the header.
pub const LEGACY: usize = 512;
/// Bytes of the header.
pub const HEADER: usize = 64;

/// Offsets and sizes, in bytes, of an area that is not compacted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// By component number; size 0 for one the processor or kernel lacks. 0 and 1 (x87, SSE) lie in the
    /// legacy part and are not listed.
    components: [(usize, usize); 64],
    /// Components that are on, as XCR0 has them.
    features: u64,
}

impl Layout {
    /// Of the processor this runs on, with what its kernel has switched on. Found out once: in a virtual machine
    /// each question goes to the host.
    pub fn host() -> &'static Layout {
        static HOST: OnceLock<Layout> = OnceLock::new();
        HOST.get_or_init(Layout::ask)
    }

    fn ask() -> Layout {
        let mut layout = Layout { components: [(0, 0); 64], features: 3 };
        // SAFETY: leaf 0 exists wherever CPUID does.
        let highest = unsafe { __cpuid(0) }.eax;
        // SAFETY: leaf 1 exists on every x86_64 processor. Bit 27: the kernel has switched XSAVE on.
        let osxsave = unsafe { __cpuid(1) }.ecx & 1 << 27 != 0;
        if highest < 0xd || !osxsave {
            return layout;
        }
        // SAFETY: leaf 0xd exists.
        let supported = unsafe { __cpuid_count(0xd, 0) };
        layout.features = xcr0() & (u64::from(supported.edx) << 32 | u64::from(supported.eax));
        for number in 2..63 {
            if layout.features & 1 << number == 0 {
                continue;
            }
            // SAFETY: as above; sub-leaves of unsupported components read as zero.
            let leaf = unsafe { __cpuid_count(0xd, number) };
            // Bit 0 of ecx: managed by the kernel only, not part of user areas.
            if leaf.ecx & 1 == 0 {
                layout.components[number as usize] = (leaf.ebx as usize, leaf.eax as usize);
            }
        }
        layout
    }

    /// A layout of given `(number, offset, size)`, for areas of another processor.
    pub fn of(components: &[(u32, usize, usize)]) -> Layout {
        let mut layout = Layout { components: [(0, 0); 64], features: 3 };
        for &(number, offset, size) in components {
            layout.components[number as usize & 63] = (offset, size);
            layout.features |= 1 << (number & 63);
        }
        layout
    }

    /// Components that are on, as XCR0 has them.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Range of component `number` (2 and up) in an area; `None` if there is none.
    pub fn component(&self, number: u32) -> Option<std::ops::Range<usize>> {
        match self.components.get(number as usize) {
            Some(&(offset, size)) if size > 0 => Some(offset..offset + size),
            _ => None,
        }
    }

    /// Length in bytes of an area with the components in `mask`.
    pub fn len_for(&self, mask: u64) -> usize {
        (2..63)
            .filter(|n| mask & 1 << n != 0)
            .filter_map(|n| self.component(n))
            .map(|range| range.end)
            .fold(LEGACY + HEADER, usize::max)
    }
}

/// The extended control register that says which components the kernel has switched on.
fn xcr0() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: only called where CPUID says that the kernel has switched XSAVE on, so XGETBV exists.
    unsafe {
        std::arch::asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack));
    }
    u64::from(high) << 32 | u64::from(low)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn components_do_not_overlap() {
        let layout = Layout::host();
        let mut ranges: Vec<_> = (2..63).filter_map(|n| layout.component(n)).collect();
        ranges.sort_by_key(|r| r.start);
        let mut end = LEGACY + HEADER;
        for range in ranges {
            assert!(range.start >= end, "{layout:?}");
            end = range.end;
        }
        assert_eq!(layout.len_for(u64::MAX), end);
        assert_eq!(layout.len_for(3), 576);
    }
}
