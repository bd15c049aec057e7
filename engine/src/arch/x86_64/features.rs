//! What this processor can do, in the words that `cpuinfo.img` has: answers of CPUID, in an order of the image's own.
//!
//! Sources: Intel's and AMD's manuals for the leaves; CRIU 4.2 for which of them is which word.
//!
//! # Safety
//! CPUID is executed; x86_64 always has it, and leaves are only read up to the highest that there is.
#![allow(unsafe_code)]
// CPUID became a safe function in later toolchains than the oldest supported one.
#![allow(unused_unsafe)]

use std::arch::x86_64::{__cpuid, __cpuid_count, CpuidResult};

/// Words of the image, and of its first version.
pub const WORDS: usize = 19;
pub const WORDS_OF_FIRST: usize = 12;

/// Which word holds which answer; words 2, 5, 7 and 8 are always zero.
mod word {
    pub const L1_EDX: usize = 0;
    pub const X1_EDX: usize = 1;
    pub const OWN: usize = 3;
    pub const L1_ECX: usize = 4;
    pub const X1_ECX: usize = 6;
    pub const L7_EBX: usize = 9;
    pub const D1_EAX: usize = 10;
    pub const L7_ECX: usize = 11;
    pub const F1_EDX: usize = 12;
    pub const X8_EBX: usize = 13;
    pub const L6_EAX: usize = 14;
    pub const XA_EDX: usize = 15;
    pub const F0_EDX: usize = 16;
    pub const X7_EBX: usize = 17;
    pub const L7_EDX: usize = 18;
}
use word::*;

/// Bits of the word that is no answer: good string instructions, long no-operations, CPUID itself.
const REP_GOOD: u32 = 1 << 16;
const NOPL: u32 = 1 << 20;
const CPUID: u32 = 1 << 25;
/// In leaf 0xf: last level cache monitoring.
const CACHE_MONITORING: u32 = 1 << 1;
const ERMS: u32 = 1 << 9;
const XSAVE: u32 = 1 << 26;
/// Components that the image lists: x87, AVX, bounds, AVX-512 and protection keys. CRIU 4.2 leaves out SSE, which every
/// x86_64 has, and the first half of bounds, and takes no image that has more than it finds itself.
const LISTED: u64 = 0x2ff & !(1 << 8) & !(1 << 1) & !(1 << 3);
/// Which feature each of the first components belongs to.
const OF_COMPONENT: [(usize, u32); 10] = [
    (L1_EDX, 0),
    (L1_EDX, 25),
    (L1_ECX, 28),
    (L7_EBX, 14),
    (L7_EBX, 14),
    (L7_EBX, 16),
    (L7_EBX, 16),
    (L7_EBX, 16),
    (L7_EBX, 25),
    (L7_ECX, 3),
];

/// Features by which programs choose instructions, as /proc/cpuinfo calls them.
pub const INSTRUCTIONS: &[(usize, &[(u32, &str)])] = &[
    (
        L1_EDX,
        &[
            (0, "fpu"),
            (4, "tsc"),
            (8, "cx8"),
            (11, "sep"),
            (15, "cmov"),
            (19, "clflush"),
            (23, "mmx"),
            (24, "fxsr"),
            (25, "sse"),
            (26, "sse2"),
        ],
    ),
    (X1_EDX, &[(11, "syscall"), (22, "mmxext"), (27, "rdtscp"), (30, "3dnowext"), (31, "3dnow")]),
    (OWN, &[(16, "rep_good"), (20, "nopl")]),
    (
        L1_ECX,
        &[
            (0, "pni"),
            (1, "pclmulqdq"),
            (3, "monitor"),
            (9, "ssse3"),
            (13, "cx16"),
            (19, "sse4_1"),
            (20, "sse4_2"),
            (22, "movbe"),
            (23, "popcnt"),
            (25, "aes"),
            (26, "xsave"),
            (27, "osxsave"),
            (28, "avx"),
            (29, "f16c"),
            (30, "rdrand"),
        ],
    ),
    (
        X1_ECX,
        &[
            (5, "abm"),
            (6, "sse4a"),
            (7, "misalignsse"),
            (8, "3dnowprefetch"),
            (11, "xop"),
            (16, "fma4"),
            (21, "tbm"),
        ],
    ),
    (
        L7_EBX,
        &[
            (0, "fsgsbase"),
            (3, "bmi1"),
            (4, "hle"),
            (5, "avx2"),
            (8, "bmi2"),
            (9, "erms"),
            (11, "rtm"),
            (14, "mpx"),
            (16, "avx512f"),
            (17, "avx512dq"),
            (18, "rdseed"),
            (19, "adx"),
            (23, "clflushopt"),
            (26, "avx512pf"),
            (27, "avx512er"),
            (28, "avx512cd"),
            (29, "sha_ni"),
            (30, "avx512bw"),
            (31, "avx512vl"),
        ],
    ),
    (D1_EAX, &[(0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1")]),
    (
        L7_ECX,
        &[
            (1, "avx512vbmi"),
            (6, "avx512_vbmi2"),
            (8, "gfni"),
            (9, "vaes"),
            (10, "vpclmulqdq"),
            (11, "avx512_vnni"),
            (12, "avx512_bitalg"),
            (13, "tme"),
            (14, "avx512_vpopcntdq"),
            (22, "rdpid"),
        ],
    ),
    (X8_EBX, &[(0, "clzero")]),
    (L7_EDX, &[(2, "avx512_4vnniw"), (3, "avx512_4fmaps")]),
];

/// Features without which the x87, SSE and later states of an image have no place.
pub const STATES: &[(usize, u32, &str)] =
    &[(L1_EDX, 0, "fpu"), (L1_EDX, 24, "fxsr"), (L1_ECX, 27, "osxsave"), (D1_EAX, 3, "xsaves")];

/// Whose processors the image knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Vendor {
    Intel,
    Amd,
}

/// A processor.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Features {
    /// `None` for one the image has no number for.
    pub vendor: Option<Vendor>,
    pub family: u32,
    pub model: u32,
    pub stepping: u32,
    /// The model's name.
    pub name: String,
    pub words: [u32; WORDS],
    /// Components of XSAVE areas, as far as the image lists them.
    pub components: u64,
    /// Bytes of an XSAVE area with what is on, and with all that there is.
    pub area: u32,
    pub largest_area: u32,
}

fn leaf(number: u32, part: u32) -> CpuidResult {
    // SAFETY: CPUID has no effect but on the registers it answers in.
    unsafe { __cpuid_count(number, part) }
}

fn highest(of: u32) -> u32 {
    // SAFETY: as above.
    unsafe { __cpuid(of) }.eax
}

impl Features {
    /// Of the processor this runs on.
    pub fn host() -> Features {
        let (basic, extended) = (highest(0), highest(0x8000_0000));
        let has = |number: u32| match number {
            0x8000_0000.. => (0x8000_0000..0x8001_0000).contains(&extended) && number <= extended,
            _ => number <= basic,
        };
        let read = |number, part| {
            if has(number) { leaf(number, part) } else { CpuidResult { eax: 0, ebx: 0, ecx: 0, edx: 0 } }
        };
        let first = leaf(0, 0);
        let id: Vec<u8> = [first.ebx, first.edx, first.ecx].iter().flat_map(|r| r.to_le_bytes()).collect();
        let vendor = match id.as_slice() {
            b"GenuineIntel" => Some(Vendor::Intel),
            b"AuthenticAMD" | b"HygonGenuine" => Some(Vendor::Amd),
            _ => None,
        };
        let (one, seven, x1) = (read(1, 0), read(7, 0), read(0x8000_0001, 0));
        let base = one.eax >> 8 & 0xf;
        let family = if base == 0xf { base + (one.eax >> 20 & 0xff) } else { base };
        let high = if family >= 6 { (one.eax >> 16 & 0xf) << 4 } else { 0 };
        let mut words = [0; WORDS];
        let quality = read(0xf, 0).edx;
        for (word, value) in [
            (L1_EDX, one.edx),
            (L1_ECX, one.ecx),
            (L6_EAX, read(6, 0).eax),
            (L7_EBX, seven.ebx),
            (L7_ECX, seven.ecx),
            (L7_EDX, seven.edx),
            (D1_EAX, read(0xd, 1).eax),
            (F0_EDX, quality),
            (F1_EDX, if quality & CACHE_MONITORING != 0 { read(0xf, 1).edx } else { 0 }),
            (X1_ECX, x1.ecx),
            (X1_EDX, x1.edx),
            (X7_EBX, read(0x8000_0007, 0).ebx),
            (XA_EDX, read(0x8000_000a, 0).edx),
            (X8_EBX, read(0x8000_0008, 0).ebx),
            (OWN, CPUID | NOPL),
        ] {
            words[word] = value;
        }
        if basic < 0xd {
            words[L1_ECX] &= !XSAVE;
        }
        match vendor {
            Some(Vendor::Intel) if family == 15 => words[L7_EBX] &= !ERMS,
            Some(Vendor::Intel) if family == 6 => words[OWN] |= REP_GOOD,
            Some(Vendor::Amd) => {
                // There it says something else.
                words[L1_EDX] &= !(1 << 31);
                let later = matches!(one.eax, 0x0f48..0x0f50 | 0x0f58..);
                if family >= 0x10 || family == 0xf && later {
                    words[OWN] |= REP_GOOD;
                }
            }
            _ => {}
        }
        let areas = if words[L1_ECX] & XSAVE != 0 { Some(leaf(0xd, 0)) } else { None };
        let all = areas.map_or(0, |a| u64::from(a.edx) << 32 | u64::from(a.eax));
        let without = OF_COMPONENT.iter().enumerate().filter(|(_, (word, bit))| words[*word] & 1 << bit == 0);
        let components = without.fold(all & LISTED, |mask, (at, _)| mask & !(1 << at));
        let name: Vec<u8> = (0x8000_0002..=0x8000_0004)
            .map(|number| read(number, 0))
            .flat_map(|r| [r.eax, r.ebx, r.ecx, r.edx])
            .flat_map(u32::to_le_bytes)
            .take_while(|byte| *byte != 0)
            .collect();
        Features {
            vendor,
            family,
            model: (one.eax >> 4 & 0xf) + high,
            stepping: one.eax & 0xf,
            name: String::from_utf8_lossy(&name).trim_start().to_owned(),
            words,
            components,
            area: areas.map_or(0, |a| a.ebx),
            largest_area: areas.map_or(0, |a| a.ecx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_of_this_processor_are_those_that_the_kernel_lists() {
        let (host, info) = (Features::host(), std::fs::read_to_string("/proc/cpuinfo").unwrap());
        let line = |name: &str| {
            let line = info.lines().find(|l| l.split(':').next().is_some_and(|n| n.trim() == name));
            line.and_then(|l| l.split_once(':')).map_or("", |(_, value)| value.trim()).to_owned()
        };
        assert_eq!(line("cpu family"), host.family.to_string());
        assert_eq!(line("model"), host.model.to_string());
        assert_eq!(line("model name"), host.name.trim_end());
        let flags = line("flags");
        for (word, bits) in INSTRUCTIONS {
            for (bit, name) in bits.iter().filter(|(_, name)| *name != "osxsave") {
                // The kernel may switch features off that the processor has, not the other way round.
                let listed = flags.split(' ').any(|flag| flag == *name);
                assert!(!listed || host.words[*word] & 1 << bit != 0, "{name}");
            }
        }
        assert!(host.components & 1 == 1 && host.area >= 576, "{host:?}");
    }
}
