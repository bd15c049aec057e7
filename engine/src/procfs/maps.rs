//! `/proc/PID/smaps` (and `maps`): every mapping with its flags, exactly.
//!
//! Parsed by hand because a mapping flag that is not known must be seen, not dropped, and because a task
//! may have 100,000 mappings: the file is read as a stream, lines that say nothing new are skipped by
//! their first byte.

use std::{
    fs::File,
    io::{BufRead, BufReader},
};

use nix::fcntl::OFlag;

use super::{ProcDir, hex, number, words};
use crate::error::{Error, Result, SysContext};

/// One mapping as the kernel prints it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Map {
    pub start: u64,
    pub end: u64,
    /// `PROT_*` bits.
    pub prot: u32,
    pub shared: bool,
    pub pgoff: u64,
    pub dev: (u32, u32),
    pub ino: u64,
    /// As printed: newlines are `\012`, a deleted file ends in ` (deleted)`. Special mappings have
    /// names in brackets, anonymous ones none.
    pub name: Vec<u8>,
    /// Only `smaps` has them.
    pub flags: VmFlags,
    /// Memory protection key; 0 is the default one.
    pub pkey: u32,
    /// Some page is resident or swapped; always true in `maps`, which does not say.
    pub touched: bool,
    /// Bytes of private pages of its own that are in memory.
    pub anonymous: u64,
    /// Those of them that are mapped by huge page entries.
    pub huge: u64,
}

impl Map {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Never: the kernel has no empty mappings.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }
}

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

/// All mappings of the task with their flags, in order of addresses.
pub fn smaps(dir: &ProcDir) -> Result<Vec<Map>> {
    read(dir, "smaps", true)
}

/// All mappings of the task without flags: much cheaper, the page tables are not looked at.
pub fn maps(dir: &ProcDir) -> Result<Vec<Map>> {
    read(dir, "maps", false)
}

fn read(dir: &ProcDir, name: &str, flags: bool) -> Result<Vec<Map>> {
    let file = File::from(dir.file(name, OFlag::O_RDONLY)?);
    parse(BufReader::with_capacity(256 << 10, file), &format!("/proc/{}/{name}", dir.pid()), flags)
}

/// Parses either file; `name` is for messages, `flags` says that every mapping must have flags.
pub fn parse(mut source: impl BufRead, name: &str, flags: bool) -> Result<Vec<Map>> {
    let mut maps: Vec<Map> = Vec::new();
    let mut line = Vec::with_capacity(256);
    // Whether the last mapping still waits for its flags.
    let mut open = false;
    let strange = |line: &[u8]| Error::host(format!("{name} is not understood: {}", super::excerpt(line)));
    loop {
        line.clear();
        let read = source.read_until(b'\n', &mut line);
        if read.map_err(|e| Error::io(format!("read({name})"), &e))? == 0 {
            break;
        }
        let text = line.strip_suffix(b"\n").unwrap_or(&line);
        match text {
            [b'0'..=b'9' | b'a'..=b'f', ..] => {
                let mut map = header(text).ok_or_else(|| strange(text))?;
                map.touched = !flags;
                if open || maps.last().is_some_and(|last| last.end > map.start) {
                    return Err(strange(text));
                }
                maps.push(map);
                open = flags;
            }
            [b'V', b'm', b'F', b'l', b'a', b'g', b's', b':', rest @ ..] => {
                let last = maps.last_mut().ok_or_else(|| strange(text))?;
                last.flags = VmFlags::parse(rest).ok_or_else(|| strange(text))?;
                // Huge pages are not counted as resident.
                last.touched |= last.flags.any(VmFlags::HUGETLB);
                open = false;
            }
            [
                b'P',
                b'r',
                b'o',
                b't',
                b'e',
                b'c',
                b't',
                b'i',
                b'o',
                b'n',
                b'K',
                b'e',
                b'y',
                b':',
                rest @ ..,
            ] => {
                let last = maps.last_mut().ok_or_else(|| strange(text))?;
                last.pkey = number(super::trim(rest)).ok_or_else(|| strange(text))?;
            }
            [b'R', b's', b's', b':', rest @ ..] | [b'S', b'w', b'a', b'p', b':', rest @ ..] => {
                let last = maps.last_mut().ok_or_else(|| strange(text))?;
                last.touched |= words(rest).next() != Some(b"0");
            }
            [b'A', b'n', b'o', b'n', rest @ ..] => {
                let last = maps.last_mut().ok_or_else(|| strange(text))?;
                if let Some(kib) = rest.strip_prefix(b"ymous:") {
                    last.anonymous = kibibytes(kib).ok_or_else(|| strange(text))?;
                } else if let Some(kib) = rest.strip_prefix(b"HugePages:") {
                    last.huge = kibibytes(kib).ok_or_else(|| strange(text))?;
                }
            }
            _ => {}
        }
    }
    if open { Err(Error::host(format!("{name} ends in the middle of a mapping"))) } else { Ok(maps) }
}

/// `  12 kB` as bytes.
fn kibibytes(text: &[u8]) -> Option<u64> {
    number::<u64>(words(text).next()?)?.checked_mul(1024)
}

/// `start-end rwxs pgoff major:minor inode   name`
fn header(line: &[u8]) -> Option<Map> {
    let mut fields = line.splitn(6, |c| *c == b' ');
    let range = fields.next()?;
    let dash = range.iter().position(|c| *c == b'-')?;
    let perms: &[u8; 4] = fields.next()?.try_into().ok()?;
    let pgoff = hex(fields.next()?)?;
    let dev = fields.next()?;
    let colon = dev.iter().position(|c| *c == b':')?;
    let ino = number(fields.next()?)?;
    // Blanks pad the name to a column; the name itself starts with `/` or `[`, never with a blank.
    let name = fields.next().unwrap_or_default().trim_ascii_start();
    let prot = [(b'r', libc::PROT_READ), (b'w', libc::PROT_WRITE), (b'x', libc::PROT_EXEC)]
        .iter()
        .zip(perms)
        .map(|((letter, bit), c)| match c {
            b'-' => Some(0),
            c if c == letter => Some(*bit as u32),
            _ => None,
        })
        .sum::<Option<u32>>()?;
    let map = Map {
        start: hex(&range[..dash])?,
        end: hex(&range[dash + 1..])?,
        prot,
        shared: match perms[3] {
            b's' => true,
            b'p' => false,
            _ => return None,
        },
        pgoff,
        dev: (u32::try_from(hex(&dev[..colon])?).ok()?, u32::try_from(hex(&dev[colon + 1..])?).ok()?),
        ino,
        name: name.to_vec(),
        ..Map::default()
    };
    (map.start < map.end).then_some(map)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &[u8] = b"55f29e350000-55f29e351000 r--p 00001000 fe:01 1234                       /bin/a b (deleted)\n\
        Size:                  4 kB\nRss:                   4 kB\nAnonymous:             8 kB\nAnonHugePages:         2 kB\nTHPeligible:           0\nProtectionKey:         3\n\
        VmFlags: rd mr mw me sd \n\
        7f2f1aa2b000-7f2f1aa31000 rw-s 00000000 00:01 77 /dev/zero\\012 (deleted)\nVmFlags: rd wr sh mr mw me ms zz sd zy \n\
        7f2f1aa31000-7f2f1aa33000 ---p 00000000 00:00 0 \nRss: 0 kB\nSwap:  4 kB\nVmFlags: mr mw me nr lo\n\
        ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\nVmFlags: ex \n";

    #[test]
    fn mappings_and_flags_are_exact() {
        let maps = parse(SMAPS, "smaps", true).unwrap();
        assert_eq!(maps.len(), 4);
        assert_eq!((maps[0].start, maps[0].end, maps[0].prot), (0x55f2_9e35_0000, 0x55f2_9e35_1000, 1));
        assert_eq!((maps[0].dev, maps[0].ino, maps[0].pgoff), ((0xfe, 1), 1234, 0x1000));
        assert_eq!((maps[0].pkey, maps[1].pkey), (3, 0));
        assert_eq!((maps[0].anonymous, maps[0].huge, maps[1].anonymous), (8 << 10, 2 << 10, 0));
        assert!(maps[0].touched && !maps[1].touched && maps[2].touched);
        assert_eq!(maps[0].name, b"/bin/a b (deleted)");
        assert_eq!(maps[1].name, b"/dev/zero\\012 (deleted)");
        assert!(maps[1].shared && maps[1].flags.any(VmFlags::SHARED));
        assert_eq!(maps[1].flags.unknown, [*b"zz", *b"zy"]);
        assert_eq!(format!("{:?}", maps[1].flags), "rd wr sh mr mw me ms sd zz zy");
        assert_eq!((maps[2].prot, maps[2].name.len()), (0, 0));
        assert!(maps[2].flags.any(VmFlags::LOCKED) && maps[2].flags.any(VmFlags::NO_RESERVE));
        assert_eq!((maps[3].name.as_slice(), maps[3].prot), (&b"[vsyscall]"[..], 4));
        assert_eq!(maps[3].start, 0xffff_ffff_ff60_0000);
    }

    #[test]
    fn what_is_not_understood_is_an_error() {
        for bad in [
            &b"55f29e350000-55f29e350000 r--p 0 fe:01 1 x\n"[..],
            b"55f29e350000-55f29e351000 r-wp 0 fe:01 1 x\n",
            b"55f29e350000-55f29e351000 r--q 0 fe:01 1 x\n",
            b"5000-6000 r--p 0 fe:01 1\n4000-5000 r--p 0 fe:01 1\n",
            b"5000-6000 r--p 0 fe:01\n",
            b"VmFlags: rd\n",
            b"5000-6000 r--p 0 0:0 1\nVmFlags: rdx\n",
        ] {
            assert!(parse(bad, "maps", false).is_err(), "{}", bad.escape_ascii());
        }
        assert!(parse(&b"5000-6000 r--p 0 0:0 1\n"[..], "smaps", true).is_err());
        assert_eq!(parse(&b"5000-6000 r--p 0 0:0 1\n"[..], "maps", false).unwrap().len(), 1);
    }

    #[test]
    fn our_own_flags_are_all_known() {
        let me = ProcDir::open(crate::pstree::RealPid(std::process::id() as i32)).unwrap();
        for map in smaps(&me).unwrap() {
            assert_eq!(map.flags.unknown, Vec::<[u8; 2]>::new(), "{map:?}");
        }
    }
}
