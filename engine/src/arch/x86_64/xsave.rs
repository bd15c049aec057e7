//! The XSAVE area: x87, SSE and everything newer.

use rcriu_images::pb;

use super::layout::{HEADER, LEGACY, Layout};
use crate::error::{Error, Result};

/// Offset of the mask of enabled components that the kernel puts into ptrace's area.
const SW_FEATURES: usize = 464;
/// Offset of the bits that say which components differ from their initial state.
const XSTATE_BV: usize = LEGACY;
/// x87 and SSE, the legacy part.
const FP_SSE: u64 = 3;

/// Components that the message of images has fields for.
const FIELDS: [u32; 7] = [2, 3, 4, 5, 6, 7, 9];

/// State of a component that the message of images has no field for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    /// Component number as in XCR0: 17 and 18 are AMX, 19 is APX.
    pub component: u32,
    /// Its bytes in the processor's form.
    pub bytes: Vec<u8>,
}

/// Tile data: large, hardly ever in use, and to be asked for by a process and its threads.
pub const XTILE_DATA: u64 = 1 << 18;

/// An XSAVE area that is not compacted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Xsave {
    /// Without tile data where that is not in use.
    bytes: Vec<u8>,
    /// Length of the area as the kernel gave it.
    whole: usize,
}

/// Length of the largest area a kernel may give: AMX needs 11 KiB.
pub const MAX_LEN: usize = 64 << 10;

impl Xsave {
    /// From the bytes ptrace gave, at least the legacy part and the header.
    ///
    /// # Errors
    /// A compacted area (no kernel gives one) and one that is too short.
    pub fn from_bytes(bytes: &[u8], layout: &Layout) -> Result<Xsave> {
        if bytes.len() < LEGACY + HEADER || bytes.len() > MAX_LEN {
            return Err(Error::host(format!("an XSAVE area of {} bytes is not understood", bytes.len())));
        }
        let head = Xsave { bytes: bytes[..LEGACY + HEADER].to_vec(), whole: bytes.len() };
        if head.word(XSTATE_BV + 8) != 0 {
            return Err(Error::host("the kernel gave a compacted XSAVE area"));
        }
        let rest = bytes.len().min(match head.in_use() & XTILE_DATA {
            0 => layout.len_for(!XTILE_DATA),
            _ => bytes.len(),
        });
        Ok(Xsave { bytes: bytes[..rest].to_vec(), ..head })
    }

    /// The bytes up to the end of what may be in use.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes for ptrace, which takes no less than it gives.
    pub fn regset(&self) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes.resize(self.whole.max(bytes.len()), 0);
        bytes
    }

    fn word(&self, at: usize) -> u64 {
        self.bytes[at..].first_chunk().map_or(0, |w| u64::from_ne_bytes(*w))
    }

    /// Components that differ from their initial state.
    pub fn in_use(&self) -> u64 {
        self.word(XSTATE_BV)
    }

    /// Components the kernel has switched on, as it wrote them into the area.
    pub fn features(&self) -> u64 {
        self.word(SW_FEATURES)
    }

    /// Puts the x87 and SSE part in place that another request gave: kernels that copy the area
    /// without filling in initial state leave it undefined while the processor says it is not in use.
    pub fn fill_legacy(&mut self, fxsave: &[u8; LEGACY]) {
        self.bytes[..SW_FEATURES].copy_from_slice(&fxsave[..SW_FEATURES]);
    }

    /// State in use that the message of images has no field for.
    pub fn leftovers(&self, layout: &Layout) -> Result<Vec<Leftover>> {
        let known = FP_SSE | FIELDS.iter().fold(0, |mask, number| mask | 1 << number);
        if self.in_use() & !known == 0 {
            return Ok(Vec::new());
        }
        self.to_image(layout).map(|(_, leftovers)| leftovers)
    }

    /// The message of images, and what it has no field for.
    ///
    /// As in CRIU's images, a component that the processor has is stored whether in use or not;
    /// `xstate_bv` tells.
    pub fn to_image(&self, layout: &Layout) -> Result<(pb::UserX86FpregsEntry, Vec<Leftover>)> {
        let b = &self.bytes;
        let mut xsave = pb::UserX86XsaveEntry { xstate_bv: self.in_use(), ..Default::default() };
        let mut leftovers = Vec::new();
        for number in 2..63 {
            let Some(range) = layout.component(number) else {
                if self.in_use() & 1 << number != 0 {
                    return Err(Error::host(format!("processor state {number} is in use but not described")));
                }
                continue;
            };
            let Some(bytes) = b.get(range) else {
                // The kernel may give less than the processor has, but not for what is in use.
                if self.in_use() & 1 << number != 0 {
                    return Err(Error::host(format!("processor state {number} is missing in the area")));
                }
                continue;
            };
            match number {
                2 => xsave.ymmh_space = words32(bytes),
                3 => xsave.bndreg_state = words64(bytes),
                4 => xsave.bndcsr_state = words64(bytes),
                5 => xsave.opmask_reg = words64(bytes),
                6 => xsave.zmm_upper = words64(bytes),
                7 => xsave.hi16_zmm = words64(bytes),
                9 => xsave.pkru = words32(bytes),
                _ if self.in_use() & 1 << number != 0 => {
                    leftovers.push(Leftover { component: number, bytes: bytes.to_vec() });
                }
                _ => {}
            }
        }
        let half = |at: usize| u32::from(u16::from_ne_bytes([b[at], b[at + 1]]));
        let entry = pb::UserX86FpregsEntry {
            cwd: half(0),
            swd: half(2),
            twd: half(4),
            fop: half(6),
            rip: self.word(8),
            rdp: self.word(16),
            mxcsr: self.word(24) as u32,
            mxcsr_mask: (self.word(24) >> 32) as u32,
            st_space: words32(&b[32..160]),
            xmm_space: words32(&b[160..416]),
            xsave: Some(xsave),
            ..Default::default()
        };
        Ok((entry, leftovers))
    }

    /// An area for this processor from the message of images and what came beside it.
    ///
    /// # Errors
    /// State in use that this processor does not have or that the image does not hold, and fields of
    /// the wrong length or with bits that would fault.
    pub fn from_image(
        entry: &pb::UserX86FpregsEntry,
        leftovers: &[Leftover],
        layout: &Layout,
    ) -> Result<Xsave> {
        let mut b = vec![0u8; LEGACY + HEADER];
        for (at, value, what) in
            [(0, entry.cwd, "cwd"), (2, entry.swd, "swd"), (4, entry.twd, "twd"), (6, entry.fop, "fop")]
        {
            let value = u16::try_from(value)
                .map_err(|_| Error::image(format!("x87 register {what} is {value:#x}: too large")))?;
            b[at..at + 2].copy_from_slice(&value.to_ne_bytes());
        }
        b[8..16].copy_from_slice(&entry.rip.to_ne_bytes());
        b[16..24].copy_from_slice(&entry.rdp.to_ne_bytes());
        if entry.mxcsr > 0xffff {
            return Err(Error::image(format!("SSE control register {:#x} has reserved bits", entry.mxcsr)));
        }
        b[24..28].copy_from_slice(&entry.mxcsr.to_ne_bytes());
        b[28..32].copy_from_slice(&entry.mxcsr_mask.to_ne_bytes());
        put32(&mut b[32..160], &entry.st_space, "st_space")?;
        put32(&mut b[160..416], &entry.xmm_space, "xmm_space")?;

        let mut area = Xsave { bytes: b, whole: 0 };
        let mut used = FP_SSE;
        if let Some(x) = &entry.xsave {
            let wanted = x.xstate_bv & !FP_SSE;
            area.bytes.resize(layout.len_for(wanted), 0);
            for number in (2..64).filter(|n| wanted & 1 << n != 0) {
                let Some(range) = layout.component(number) else {
                    return Err(Error::host(format!(
                        "the thread used processor state {}, which this processor or kernel lacks",
                        name(number)
                    ))
                    .remedy("restore on a machine with the processor features of the one it was dumped on"));
                };
                let room = &mut area.bytes[range];
                match number {
                    2 => put32(room, &x.ymmh_space, "ymmh_space")?,
                    3 => put64(room, &x.bndreg_state, "bndreg_state")?,
                    4 => put64(room, &x.bndcsr_state, "bndcsr_state")?,
                    5 => put64(room, &x.opmask_reg, "opmask_reg")?,
                    6 => put64(room, &x.zmm_upper, "zmm_upper")?,
                    7 => put64(room, &x.hi16_zmm, "hi16_zmm")?,
                    9 => put32(room, &x.pkru, "pkru")?,
                    _ => match leftovers.iter().find(|l| l.component == number) {
                        Some(l) if l.bytes.len() == room.len() => room.copy_from_slice(&l.bytes),
                        Some(l) => {
                            return Err(Error::image(format!(
                                "processor state {} has {} bytes here and {} in the image",
                                name(number),
                                room.len(),
                                l.bytes.len()
                            )));
                        }
                        None => {
                            return Err(Error::image(format!(
                                "the thread used processor state {}, which the image does not hold",
                                name(number)
                            )));
                        }
                    },
                }
            }
            used |= wanted;
        }
        area.bytes[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&used.to_ne_bytes());
        area.bytes[SW_FEATURES..SW_FEATURES + 8].copy_from_slice(&layout.features().to_ne_bytes());
        Ok(area)
    }
}

/// A component's name for messages.
fn name(number: u32) -> String {
    let known = match number {
        2 => "AVX",
        3 => "MPX bounds",
        4 => "MPX configuration",
        5..=7 => "AVX-512",
        9 => "PKRU (protection keys)",
        11 | 12 => "CET",
        17 | 18 => "AMX",
        19 => "APX",
        _ => return number.to_string(),
    };
    format!("{known} ({number})")
}

fn words32(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|w| u32::from_ne_bytes(*w)).collect()
}

fn words64(bytes: &[u8]) -> Vec<u64> {
    bytes.as_chunks::<8>().0.iter().map(|w| u64::from_ne_bytes(*w)).collect()
}

fn put32(room: &mut [u8], words: &[u32], what: &str) -> Result<()> {
    put(room, words, what, u32::to_ne_bytes)
}

fn put64(room: &mut [u8], words: &[u64], what: &str) -> Result<()> {
    put(room, words, what, u64::to_ne_bytes)
}

fn put<T: Copy, const N: usize>(
    room: &mut [u8],
    words: &[T],
    what: &str,
    bytes: fn(T) -> [u8; N],
) -> Result<()> {
    if words.len() * N != room.len() {
        let expected = room.len() / N;
        return Err(Error::image(format!("{what} has {} words, this processor {expected}", words.len())));
    }
    for (to, word) in room.as_chunks_mut::<N>().0.iter_mut().zip(words) {
        *to = bytes(*word);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// AVX, AVX-512, protection keys and AMX where Intel has them.
    fn intel() -> Layout {
        Layout::of(&[
            (2, 576, 256),
            (5, 1088, 64),
            (6, 1152, 512),
            (7, 1664, 1024),
            (9, 2688, 8),
            (17, 2752, 64),
            (18, 2816, 8192),
        ])
    }

    fn area(layout: &Layout, used: u64) -> Xsave {
        let mut bytes: Vec<u8> = (0..layout.len_for(u64::MAX)).map(|i| (i * 7 + i / 256) as u8).collect();
        bytes[24..28].copy_from_slice(&0x1f80u32.to_ne_bytes());
        bytes[416..LEGACY + HEADER].fill(0);
        bytes[SW_FEATURES..SW_FEATURES + 8].copy_from_slice(&layout.features().to_ne_bytes());
        bytes[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&used.to_ne_bytes());
        Xsave::from_bytes(&bytes, layout).unwrap()
    }

    #[test]
    fn every_component_survives_an_image() {
        let layout = intel();
        let before = area(&layout, layout.features());
        let (entry, leftovers) = before.to_image(&layout).unwrap();
        let x = entry.xsave.as_ref().unwrap();
        assert_eq!((x.ymmh_space.len(), x.opmask_reg.len(), x.zmm_upper.len()), (64, 8, 64));
        assert_eq!((x.hi16_zmm.len(), x.pkru.len(), x.bndreg_state.len()), (128, 2, 0));
        assert_eq!(leftovers.iter().map(|l| l.component).collect::<Vec<_>>(), [17, 18]);
        let after = Xsave::from_image(&entry, &leftovers, &layout).unwrap();
        // Gaps between components hold nothing.
        for n in (2..63).filter_map(|n| layout.component(n)) {
            assert_eq!(after.bytes()[n.clone()], before.bytes()[n]);
        }
        assert_eq!(after.bytes()[..576], before.bytes()[..576]);
    }

    #[test]
    fn a_component_moves_to_where_the_other_processor_has_it() {
        let before = area(&intel(), 0x207);
        let (entry, leftovers) = before.to_image(&intel()).unwrap();
        assert!(leftovers.is_empty());
        let amd = Layout::of(&[(2, 576, 256), (9, 2432, 8)]);
        let after = Xsave::from_image(&entry, &[], &amd).unwrap();
        assert_eq!(after.bytes()[2432..2440], before.bytes()[2688..2696]);
        assert_eq!(after.bytes().len(), 2440);
        assert_eq!(after.in_use(), 0x207);
    }

    #[test]
    fn state_is_never_lost_silently() {
        let layout = intel();
        let (entry, leftovers) = area(&layout, 0x60007).to_image(&layout).unwrap();
        let e = Xsave::from_image(&entry, &leftovers[..1], &layout).unwrap_err().to_string();
        assert_eq!(e, "the thread used processor state AMX (18), which the image does not hold");
        let small = Layout::of(&[(2, 576, 256)]);
        assert!(Xsave::from_image(&entry, &leftovers, &small).is_err());
        // In use, but nowhere in the area.
        let mut short = area(&layout, 0x60007);
        short.bytes.truncate(2752);
        assert!(short.to_image(&layout).is_err());
        assert!(area(&layout, 0x80007).to_image(&layout).is_err());
    }

    #[test]
    fn hostile_fields_are_refused() {
        let layout = intel();
        let (good, _) = area(&layout, 7).to_image(&layout).unwrap();
        let broken = |change: fn(&mut pb::UserX86FpregsEntry)| {
            let mut entry = good.clone();
            change(&mut entry);
            Xsave::from_image(&entry, &[], &layout).unwrap_err()
        };
        broken(|e| e.cwd = 0x10000);
        broken(|e| e.mxcsr = 0x1_1f80);
        broken(|e| e.st_space.truncate(3));
        broken(|e| e.xmm_space.push(0));
        broken(|e| e.xsave.as_mut().unwrap().ymmh_space.clear());
        broken(|e| e.xsave.as_mut().unwrap().xstate_bv |= 1 << 63);
        assert!(Xsave::from_bytes(&[0; 100], &layout).is_err());
    }
}
