//! Flags of a mapping.

use crate::procfs::words;

macro_rules! vm_flags {
    ($($name:ident $code:literal $doc:literal;)*) => {
        #[derive(Clone, Copy)]
        #[allow(non_camel_case_types, clippy::upper_case_acronyms)]
        enum Bit { $($name,)* }

        /// Flags of a mapping as the `VmFlags:` line names them, see Documentation/filesystems/proc.rst.
        #[derive(Clone, PartialEq, Eq, Default)]
        pub struct VmFlags {
            bits: u64,
            /// Codes this program does not know.
            pub unknown: Vec<[u8; 2]>,
        }

        impl VmFlags {
            $(#[doc = $doc] pub const $name: u64 = 1 << Bit::$name as u32;)*

            const CODES: &[(&[u8; 2], u64)] = &[$(($code, Self::$name),)*];
        }
    };
}

vm_flags! {
    READ b"rd" "readable";
    WRITE b"wr" "writable";
    EXEC b"ex" "executable";
    SHARED b"sh" "shared";
    MAY_READ b"mr" "may be made readable";
    MAY_WRITE b"mw" "may be made writable";
    MAY_EXEC b"me" "may be made executable";
    MAY_SHARE b"ms" "may be shared";
    GROWS_DOWN b"gd" "grows down";
    PFNMAP b"pf" "raw page frames, no pages";
    LOCKED b"lo" "locked in memory";
    LOCK_ON_FAULT b"lf" "locked when touched";
    IO b"io" "memory of a device";
    SEQ_READ b"sr" "MADV_SEQUENTIAL";
    RAND_READ b"rr" "MADV_RANDOM";
    DONT_COPY b"dc" "MADV_DONTFORK";
    DONT_EXPAND b"de" "mremap may not enlarge it";
    ACCOUNT b"ac" "accounted";
    NO_RESERVE b"nr" "no swap space is reserved";
    HUGETLB b"ht" "pages of hugetlbfs";
    SYNC b"sf" "MAP_SYNC";
    ARCH_1 b"ar" "architecture specific (PAT on x86)";
    WIPE_ON_FORK b"wf" "MADV_WIPEONFORK";
    DONT_DUMP b"dd" "MADV_DONTDUMP";
    SOFT_DIRTY b"sd" "soft-dirty";
    MIXED_MAP b"mm" "pages and raw page frames";
    HUGE_PAGE b"hg" "MADV_HUGEPAGE";
    NO_HUGE_PAGE b"nh" "MADV_NOHUGEPAGE";
    MERGEABLE b"mg" "MADV_MERGEABLE";
    DENY_WRITE b"dw" "set by exec in Linux before 5.16: nobody may write to the executable, which it says by itself too";
    NON_LINEAR b"nl" "remap_file_pages of old kernels";
    UFFD_MISSING b"um" "userfaultfd: missing pages";
    UFFD_WP b"uw" "userfaultfd: write protection";
    UFFD_MINOR b"ui" "userfaultfd: minor faults";
    SHADOW_STACK b"ss" "user shadow stack";
    SEALED b"sl" "mseal";
    DROPPABLE b"dp" "MAP_DROPPABLE";
    MAYBE_GUARD b"gu" "may have guard pages";
}

impl VmFlags {
    /// Whether any of `bits` is set.
    pub fn any(&self, bits: u64) -> bool {
        self.bits & bits != 0
    }

    /// Parses what follows `VmFlags:`.
    pub fn parse(line: &[u8]) -> Option<VmFlags> {
        let mut flags = VmFlags::default();
        for word in words(line) {
            let code: &[u8; 2] = word.try_into().ok()?;
            match Self::CODES.iter().find(|(c, _)| *c == code) {
                Some((_, bit)) => flags.bits |= bit,
                None => flags.unknown.push(*code),
            }
        }
        Some(flags)
    }

    /// These without `bits`.
    #[must_use]
    pub fn without(mut self, bits: u64) -> VmFlags {
        self.bits &= !bits;
        self
    }

    /// Flags with just these bits, for tests of what is made of them.
    #[cfg(test)]
    pub fn of(bits: u64) -> VmFlags {
        VmFlags { bits, unknown: Vec::new() }
    }
}

impl std::fmt::Debug for VmFlags {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let known = Self::CODES.iter().filter(|(_, bit)| self.any(*bit)).map(|(c, _)| *c);
        let names: Vec<_> =
            known.chain(&self.unknown).map(|c| String::from_utf8_lossy(c).into_owned()).collect();
        f.write_str(&names.join(" "))
    }
}
