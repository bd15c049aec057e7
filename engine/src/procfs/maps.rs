//! `/proc/PID/smaps` (and `maps`): every mapping with its flags, exactly.
//!
//! Parsed by hand because a mapping flag that is not known must be seen, not dropped, and because a task
//! may have 100,000 mappings: the file is read as a stream, by a thread of its own where it is long, and lines
//! that say nothing new are skipped.

mod flags;
mod listing;
mod parser;

use std::{
    fs::File,
    io::{ErrorKind, Read},
};

use nix::fcntl::OFlag;

pub use self::{
    flags::VmFlags,
    listing::{Came, Listing},
};

use self::parser::Parser;
#[cfg(test)]
pub use self::parser::parse;
use super::ProcDir;
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
pub fn smaps(dir: &ProcDir) -> Result<Vec<Map>> {
    Listing::open(dir)?.finish()
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

#[cfg(test)]
mod tests {
    use super::*;

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
