//! `/proc/PID/smaps` (and `maps`): every mapping with its flags, exactly.
//!
//! Parsed by hand because a mapping flag that is not known must be seen, not dropped, and because a task
//! may have 100,000 mappings: the file is read as a stream, by a thread of its own where it is long, and lines
//! that say nothing new are skipped by their first byte.

mod flags;

use std::{
    fs::File,
    io::{ErrorKind, Read},
    sync::mpsc,
    thread,
};

use nix::fcntl::OFlag;

pub use flags::VmFlags;

use super::{ProcDir, hex, number, words};
use crate::error::{Error, Result};

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

/// All mappings of the task with their flags, in order of addresses.
///
/// The kernel takes longer to write a long list than we to parse it: both are then done at the same time.
pub fn smaps(dir: &ProcDir) -> Result<Vec<Map>> {
    smaps_beside(dir, |_| ()).map(|(maps, ())| maps)
}

/// The same, and what `beside` gives, which is told whether there are many mappings: then another thread does it
/// meanwhile.
pub fn smaps_beside<T: Send>(dir: &ProcDir, beside: impl FnOnce(bool) -> T + Send) -> Result<(Vec<Map>, T)> {
    let (mut source, mut parser) = open(dir, "smaps", true)?;
    let mut text = Text::new();
    let more = source.read(&mut text)?;
    parser.feed(text.bytes())?;
    if !more {
        return Ok((parser.end()?, beside(false)));
    }
    let beside = thread::scope(|scope| {
        let beside = scope.spawn(|| beside(true));
        let (full, filled) = mpsc::sync_channel(AHEAD);
        let (emptied, empty) = mpsc::channel();
        scope.spawn(move || {
            loop {
                let mut text = empty.try_recv().unwrap_or_else(|_| Text::new());
                let more = source.read(&mut text);
                let last = !matches!(more, Ok(true));
                // Nobody waits for it any more if what came before was not understood.
                if full.send(more.map(|_| text)).is_err() || last {
                    break;
                }
            }
        });
        filled.iter().try_for_each(|text| -> Result<()> {
            let text = text?;
            parser.feed(text.bytes())?;
            // The reader may have come to the end.
            let _ = emptied.send(text);
            Ok(())
        })?;
        Ok::<_, Error>(beside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })?;
    Ok((parser.end()?, beside))
}

/// All mappings of the task without flags: much cheaper, the page tables are not looked at.
pub fn maps(dir: &ProcDir) -> Result<Vec<Map>> {
    let (mut source, mut parser) = open(dir, "maps", false)?;
    let mut text = Text::new();
    loop {
        let more = source.read(&mut text)?;
        parser.feed(text.bytes())?;
        if !more {
            return parser.end();
        }
    }
}

fn open(dir: &ProcDir, name: &str, flags: bool) -> Result<(Source, Parser)> {
    let file = File::from(dir.file(name, OFlag::O_RDONLY)?);
    let name = format!("/proc/{}/{name}", dir.pid());
    Ok((Source { file, name: name.clone() }, Parser::new(name, flags)))
}

/// Bytes that are read before they are parsed.
const CHUNK: usize = 256 << 10;
/// Of these, bytes that are left free at most: the kernel gives as many records at once as fit in a page.
const ROOM: usize = 8 << 10;
/// Chunks read ahead of the parser.
const AHEAD: usize = 4;

/// A piece of the file.
struct Text {
    room: Vec<u8>,
    len: usize,
}

impl Text {
    fn new() -> Text {
        Text { room: vec![0; CHUNK], len: 0 }
    }

    fn bytes(&self) -> &[u8] {
        &self.room[..self.len]
    }
}

/// The file.
struct Source {
    file: File,
    name: String,
}

impl Source {
    /// Fills `text` anew; false at the end of the file.
    fn read(&mut self, text: &mut Text) -> Result<bool> {
        text.len = 0;
        while text.len <= CHUNK - ROOM {
            match self.file.read(&mut text.room[text.len..]) {
                Ok(0) => return Ok(false),
                Ok(n) => text.len += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::io(format!("read({})", self.name), &e)),
            }
        }
        Ok(true)
    }
}

/// Parses either file as it comes.
struct Parser {
    /// For messages.
    name: String,
    /// Every mapping must have flags.
    flags: bool,
    maps: Vec<Map>,
    /// Whether the last mapping still waits for its flags.
    open: bool,
    /// A line that has begun.
    begun: Vec<u8>,
    /// The last line of flags: most mappings have the same.
    known: (Vec<u8>, VmFlags),
}

impl Parser {
    fn new(name: String, flags: bool) -> Parser {
        let (begun, known) = (Vec::new(), (Vec::new(), VmFlags::default()));
        Parser { name, flags, maps: Vec::new(), open: false, begun, known }
    }

    /// Parses the next piece, which may end anywhere.
    fn feed(&mut self, mut text: &[u8]) -> Result<()> {
        while let Some(end) = memchr::memchr(b'\n', text) {
            let (line, rest) = (&text[..end], &text[end + 1..]);
            if self.begun.is_empty() {
                self.line(line)?;
            } else {
                self.begun.extend_from_slice(line);
                let whole = std::mem::take(&mut self.begun);
                self.line(&whole)?;
            }
            text = rest;
        }
        self.begun.extend_from_slice(text);
        Ok(())
    }

    /// What was parsed, at the end of the file.
    fn end(mut self) -> Result<Vec<Map>> {
        let last = std::mem::take(&mut self.begun);
        if !last.is_empty() {
            self.line(&last)?;
        }
        if self.open {
            return Err(Error::host(format!("{} ends in the middle of a mapping", self.name)));
        }
        Ok(self.maps)
    }

    fn strange(&self, line: &[u8]) -> Error {
        Error::host(format!("{} is not understood: {}", self.name, super::excerpt(line)))
    }

    fn line(&mut self, text: &[u8]) -> Result<()> {
        match text {
            [b'0'..=b'9' | b'a'..=b'f', ..] => {
                let mut map = header(text).ok_or_else(|| self.strange(text))?;
                map.touched = !self.flags;
                if self.open || self.maps.last().is_some_and(|last| last.end > map.start) {
                    return Err(self.strange(text));
                }
                self.maps.push(map);
                self.open = self.flags;
                Ok(())
            }
            // Labels of what is wanted begin like this.
            [b'V' | b'P' | b'R' | b'S' | b'A', ..] => self.labelled(text).ok_or_else(|| self.strange(text)),
            _ => Ok(()),
        }
    }

    /// A line that tells of the last mapping; `None` if it is not understood.
    fn labelled(&mut self, text: &[u8]) -> Option<()> {
        let last = self.maps.last_mut();
        if let Some(kib) = text.strip_prefix(b"Rss:").or_else(|| text.strip_prefix(b"Swap:")) {
            last?.touched |= words(kib).next() != Some(b"0");
        } else if let Some(kib) = text.strip_prefix(b"Anonymous:") {
            last?.anonymous = kibibytes(kib)?;
        } else if let Some(kib) = text.strip_prefix(b"AnonHugePages:") {
            last?.huge = kibibytes(kib)?;
        } else if let Some(key) = text.strip_prefix(b"ProtectionKey:") {
            last?.pkey = number(super::trim(key))?;
        } else if let Some(flags) = text.strip_prefix(b"VmFlags:") {
            let last = last?;
            if self.known.0 != flags {
                self.known = (flags.to_vec(), VmFlags::parse(flags)?);
            }
            last.flags = self.known.1.clone();
            // Huge pages are not counted as resident.
            last.touched |= last.flags.any(VmFlags::HUGETLB);
            self.open = false;
        }
        Some(())
    }
}

/// Parses either file; `name` is for messages, `flags` says that every mapping must have flags.
#[cfg(test)]
pub fn parse(text: &[u8], name: &str, flags: bool) -> Result<Vec<Map>> {
    let mut parser = Parser::new(name.to_owned(), flags);
    // In pieces, as the kernel may give it.
    text.chunks(7).try_for_each(|piece| parser.feed(piece))?;
    parser.end()
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

    /// More than one piece of the file, which is read by a thread then.
    #[test]
    fn many_mappings_are_read_whole() {
        let page = 4096;
        let count = 3 * CHUNK / 600;
        let memory = memmap2::MmapOptions::new().len(count * page).map_anon().unwrap();
        for n in (0..count).step_by(2) {
            memory.advise_range(memmap2::Advice::Random, n * page, page).unwrap();
        }
        let (start, end) = (memory.as_ptr() as u64, (memory.as_ptr() as usize + count * page) as u64);
        let me = ProcDir::open(crate::pstree::RealPid(std::process::id() as i32)).unwrap();
        for (maps, flags) in [(smaps(&me).unwrap(), true), (super::maps(&me).unwrap(), false)] {
            let ours: Vec<_> = maps.iter().filter(|m| m.start >= start && m.end <= end).collect();
            assert!(ours.len() >= count - 2, "{} of {count}", ours.len());
            assert!(ours.windows(2).all(|pair| pair[0].end == pair[1].start));
            if flags {
                let random = ours.iter().filter(|m| m.flags.any(VmFlags::RAND_READ)).count();
                assert!(random >= count / 2 - 1, "{random} of {count}");
            }
        }
    }

    #[test]
    fn our_own_flags_are_all_known() {
        let me = ProcDir::open(crate::pstree::RealPid(std::process::id() as i32)).unwrap();
        for map in smaps(&me).unwrap() {
            assert_eq!(map.flags.unknown, Vec::<[u8; 2]>::new(), "{map:?}");
        }
    }
}
