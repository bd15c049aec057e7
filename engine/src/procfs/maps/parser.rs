//! The text of either file, parsed as it comes.
//!
//! Many mappings of a task differ in their first line only: what the others say is looked at once.

use super::{Map, VmFlags};
use crate::{
    error::{Error, Result},
    procfs::{excerpt, hex, number, trim, words},
};

/// Parses either file as it comes.
pub(super) struct Parser {
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
    bodies: Bodies,
}

/// What followed the first line of some of the last mappings.
#[derive(Default)]
struct Bodies {
    all: Vec<Body>,
    /// The one that makes room next.
    oldest: usize,
}

/// Lines behind the first one of a mapping, up to that with its flags.
struct Body {
    text: Vec<u8>,
    /// What they tell, and nothing else.
    told: Map,
}

/// Bodies kept: a few kinds of mappings take turns.
const BODIES: usize = 8;

impl Bodies {
    /// The one that `text` begins with.
    fn find(&self, text: &[u8]) -> Option<&Body> {
        self.all.iter().find(|body| text.starts_with(&body.text))
    }

    fn add(&mut self, text: &[u8], last: &Map) {
        let Map { touched, pkey, anonymous, huge, .. } = *last;
        let told = Map { touched, pkey, anonymous, huge, flags: last.flags.clone(), ..Map::default() };
        let body = Body { text: text.to_vec(), told };
        if self.all.len() < BODIES {
            return self.all.push(body);
        }
        self.all[self.oldest] = body;
        self.oldest = (self.oldest + 1) % BODIES;
    }
}

impl Body {
    fn tell(&self, map: &mut Map) {
        let Map { touched, pkey, anonymous, huge, .. } = self.told;
        (map.touched, map.pkey, map.anonymous, map.huge) = (touched, pkey, anonymous, huge);
        map.flags = self.told.flags.clone();
    }
}

impl Parser {
    pub fn new(name: String, flags: bool) -> Parser {
        let (begun, known) = (Vec::new(), (Vec::new(), VmFlags::default()));
        Parser { name, flags, maps: Vec::new(), open: false, begun, known, bodies: Bodies::default() }
    }

    /// Parses the next piece, which may end anywhere.
    pub fn feed(&mut self, text: &[u8]) -> Result<()> {
        let mut at = 0;
        // Where the lines behind the first one of the last mapping begin, if they do in this piece.
        let mut body = None;
        while let Some(len) = memchr::memchr(b'\n', &text[at..]) {
            let line = &text[at..at + len];
            at += len + 1;
            let waited = self.open;
            if self.begun.is_empty() {
                self.line(line)?;
            } else {
                self.begun.extend_from_slice(line);
                let whole = std::mem::take(&mut self.begun);
                self.line(&whole)?;
            }
            match (waited, self.open) {
                (false, true) => match self.bodies.find(&text[at..]) {
                    Some(known) => {
                        at += known.text.len();
                        self.maps.last_mut().into_iter().for_each(|last| known.tell(last));
                        self.open = false;
                    }
                    None => body = Some(at),
                },
                (true, false) => {
                    if let (Some(from), Some(last)) = (body.take(), self.maps.last()) {
                        self.bodies.add(&text[from..at], last);
                    }
                }
                _ => {}
            }
        }
        self.begun.extend_from_slice(&text[at..]);
        Ok(())
    }

    /// Mappings of which everything is known that was read.
    pub fn complete(&self) -> &[Map] {
        &self.maps[..self.maps.len() - usize::from(self.open)]
    }

    /// What was parsed, at the end of the file.
    pub fn end(mut self) -> Result<Vec<Map>> {
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
        Error::host(format!("{} is not understood: {}", self.name, excerpt(line)))
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
            last?.pkey = number(trim(key))?;
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

    /// However the text comes, and whether lines are like those of a mapping before or not.
    #[test]
    fn what_is_told_alike_is_not_mixed_up() {
        let mut text = Vec::new();
        for n in 0..200u64 {
            let (rss, flags) = ([4, 0, 8][n as usize % 3], ["rd wr", "rd", "wr zz"][n as usize / 7 % 3]);
            let range = format!("{:x}-{:x} rw-p 00000000 00:00 {n}\n", 0x1000 * n, 0x1000 * (n + 1));
            let told = format!("Rss: {rss} kB\nAnonymous: {} kB\nProtectionKey: {}\n", n / 40, n % 2);
            text.extend(format!("{range}{told}VmFlags: {flags}\n").into_bytes());
        }
        let whole = |size: usize| {
            let mut parser = Parser::new("smaps".into(), true);
            text.chunks(size).for_each(|piece| parser.feed(piece).unwrap());
            parser.end().unwrap()
        };
        // In such small pieces nothing is repeated.
        let slow = whole(3);
        for (n, map) in slow.iter().enumerate() {
            assert_eq!((map.ino, map.pkey, map.anonymous), (n as u64, n as u32 % 2, n as u64 / 40 * 1024));
            assert_eq!((map.touched, map.flags.unknown.len()), (n % 3 != 1, usize::from(n / 7 % 3 == 2)));
        }
        assert!([100, 1000, text.len()].into_iter().all(|size| whole(size) == slow));
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
}
