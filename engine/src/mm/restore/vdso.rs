//! The vdso: the kernel's code and data pages in every process.
//!
//! If the dumped one is byte for byte that of this kernel and its pages lie alike, ours is moved to where it
//! was. Otherwise programs must not be left with code that reads another kernel's data pages, but they know
//! the addresses of its functions: the dumped code stays as plain memory with every function turned into a
//! jump to its namesake in ours, which goes to a free place.
//!
//! ```text
//! dumped    |vvar|vdso: clock_gettime: ...|
//! restored       |plain: clock_gettime: jmp --.|      ...     |vvar|vdso|
//!                                             `----------------------^
//! ```

use std::rc::Rc;

use goblin::elf::{Elf, sym::STT_FUNC};
use rcriu_images::{pagemap::PageReader, pb};
use restorer::args::VdsoPart;

use super::{
    Placed, Prepared, READ_WRITE,
    room::{current, no_room},
};
use crate::error::{Context, Error, Result};
use crate::mm::status as st;
use crate::procfs::maps::Map;
use crate::pstree::RealPid;
use crate::sys::map::Mapping;
use crate::sys::vm;

/// A vdso is a few pages; more is a mistake.
const MOST: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// `mov rax, imm64; jmp rax`.
const JUMP: usize = 12;
/// `mov rax, -ENOSYS; ret`: callers go on to the system call.
const ABSENT: [u8; 8] = [0x48, 0xc7, 0xc0, 0xda, 0xff, 0xff, 0xff, 0xc3];

/// Its pieces in one process: data pages and code, as one block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Block {
    start: u64,
    end: u64,
    /// Code.
    text: (u64, u64),
}

impl Block {
    fn shape(&self) -> (u64, u64, u64) {
        (self.end - self.start, self.text.0 - self.start, self.text.1 - self.text.0)
    }
}

/// Ours: the kernel makes one or two data mappings and the code, next to each other.
#[derive(Debug)]
pub struct Own {
    block: Block,
    /// First address and length of each.
    parts: Vec<(u64, u64)>,
    code: Vec<u8>,
}

impl Own {
    /// That of this process and all it forks; an empty one if the kernel gives none.
    pub fn find() -> Result<Own> {
        let names: [&[u8]; 3] = [b"[vdso]", b"[vvar]", b"[vvar_vclock]"];
        let maps = current()?;
        let parts: Vec<&Map> = maps.iter().filter(|m| names.contains(&m.name.as_slice())).collect();
        let (Some(text), Some(first), Some(last)) =
            (parts.iter().find(|m| m.name == b"[vdso]"), parts.first(), parts.last())
        else {
            return Ok(Own { block: Block::default(), parts: Vec::new(), code: Vec::new() });
        };
        let block = Block { start: first.start, end: last.end, text: (text.start, text.end) };
        if text.len() > MOST {
            return Err(Error::host(format!("a vdso of {} bytes is not understood", text.len())));
        }
        let mut code = vec![0; text.len() as usize];
        vm::read(RealPid(std::process::id() as i32), text.start, &mut code)?;
        Ok(Own { block, parts: parts.iter().map(|m| (m.start, m.len())).collect(), code })
    }

    /// Bytes of all parts.
    fn size(&self) -> u64 {
        self.block.end - self.block.start
    }
}

/// The dumped one.
fn dumped(vmas: &[pb::VmaEntry]) -> Option<Block> {
    let text = vmas.iter().find(|v| v.status & st::VDSO != 0)?;
    let parts = || vmas.iter().filter(|v| v.status & (st::VDSO | st::VVAR) != 0);
    Some(Block { start: parts().next()?.start, end: parts().next_back()?.end, text: (text.start, text.end) })
}

impl Prepared {
    /// Bytes needed to park our vdso.
    pub fn vdso_size(&self) -> u64 {
        self.vdso.size()
    }

    /// How our vdso gets to its place; `park` is where it can wait. Empty if the task had none. `ips` are the instructions its threads go on at.
    ///
    /// # Errors
    /// A thread inside a vdso that cannot be put back.
    pub fn place_vdso(
        &mut self,
        vmas: &[pb::VmaEntry],
        pages: Option<&PageReader>,
        park: u64,
        ips: impl IntoIterator<Item = u64>,
    ) -> Result<Vec<VdsoPart>> {
        let Some(theirs) = dumped(vmas) else { return Ok(Vec::new()) };
        let own = Rc::clone(&self.vdso);
        let ours = &own.block;
        if own.parts.is_empty() {
            return Err(Error::host("this kernel gives no vdso").remedy("boot it without vdso=0"));
        }
        let len = theirs.text.1 - theirs.text.0;
        if len > MOST {
            return Err(Error::image(format!("a vdso of {len} bytes makes no sense")));
        }
        let Some(mut code) = pages.map(|p| p.read(theirs.text.0, len)).transpose()?.flatten() else {
            return Err(Error::image("the pages of the vdso are missing"));
        };
        let to = if ours.shape() == theirs.shape() && own.code == code {
            theirs.start
        } else {
            log::info!("The vdso is that of another kernel: its functions will lead to those of this one");
            if ips.into_iter().any(|ip| (theirs.text.0..theirs.text.1).contains(&ip)) {
                return Err(Error::unsupported("a thread was stopped inside the vdso of another kernel"));
            }
            let to = self.room.taken()?.room(own.size(), PAGE).ok_or_else(|| no_room(own.size()))?;
            redirect(&mut code, &own.code, to + (ours.text.0 - ours.start))?;
            self.add_code(theirs.text.0, &code).during(|| "code of the dumped vdso".into())?;
            to
        };
        let part = |&(from, len): &(u64, u64)| {
            let at = from - ours.start;
            VdsoPart { from, park: park + at, to: to + at, len }
        };
        Ok(own.parts.iter().map(part).collect())
    }

    /// Adds a mapping with executable code at `start`.
    fn add_code(&mut self, start: u64, code: &[u8]) -> Result<()> {
        let (prot, len) = ((libc::PROT_READ | libc::PROT_EXEC) as u32, code.len() as u64);
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u32;
        let region = self.room.map(start, len, Mapping { prot: READ_WRITE, flags, file: None })?;
        region.write(region.start(), code)?;
        region.protect(region.start(), len, prot)?;
        let status = st::REGULAR | st::ANON_PRIVATE;
        let vma = pb::VmaEntry { start, end: start + len, prot, flags, status, fd: -1, ..Default::default() };
        let at = self.placed.partition_point(|p| p.vma.start < start);
        self.placed.insert(at, Placed { vma, region, prot, policy: false });
        Ok(())
    }
}

/// A function of a vdso: offset and length.
type Function = (String, usize, usize);

fn functions(image: &[u8], whose: &str) -> Result<Vec<Function>> {
    let elf =
        Elf::parse(image).map_err(|e| Error::image(format!("the {whose} vdso is not understood: {e}")))?;
    let all = elf.dynsyms.iter().filter(|s| s.st_type() == STT_FUNC && s.st_shndx != 0);
    all.map(|s| {
        let name = elf.dynstrtab.get_at(s.st_name).unwrap_or_default().to_owned();
        let inside = s.st_value.checked_add(s.st_size).is_some_and(|end| end <= image.len() as u64);
        match inside {
            true => Ok((name, s.st_value as usize, s.st_size as usize)),
            false => Err(Error::image(format!("function {name} lies outside the {whose} vdso"))),
        }
    })
    .collect()
}

/// Turns each function of `code` into a jump to its namesake in `ours`, which will lie at `base`.
fn redirect(code: &mut [u8], ours: &[u8], base: u64) -> Result<()> {
    let targets = functions(ours, "own")?;
    for (name, at, len) in functions(code, "dumped")? {
        let mut patch = Vec::with_capacity(JUMP);
        match targets.iter().find(|t| t.0 == name) {
            Some((_, target, _)) => {
                patch.extend([0x48, 0xb8]);
                patch.extend((base + *target as u64).to_le_bytes());
                patch.extend([0xff, 0xe0]);
            }
            None => patch.extend(ABSENT),
        }
        if len < patch.len() {
            return Err(Error::unsupported(format!(
                "function {name} of the dumped vdso is too short to redirect"
            )));
        }
        code[at..at + patch.len()].copy_from_slice(&patch);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own_code() -> Vec<u8> {
        Own::find().unwrap().code
    }

    #[test]
    fn every_function_leads_to_its_namesake() {
        let ours = own_code();
        let list = functions(&ours, "own").unwrap();
        assert!(list.iter().any(|f| f.0 == "__vdso_clock_gettime"), "{list:?}");
        let mut code = ours.clone();
        redirect(&mut code, &ours, 0x7000_0000_0000).unwrap();
        for (name, at, _) in list {
            let target = u64::from_le_bytes(code[at + 2..at + 10].try_into().unwrap());
            assert_eq!(target, 0x7000_0000_0000 + at as u64, "{name}");
            assert_eq!((&code[at..at + 2], &code[at + 10..at + 12]), (&[0x48, 0xb8][..], &[0xff, 0xe0][..]));
        }
    }

    #[test]
    fn damaged_code_is_refused() {
        let ours = own_code();
        assert!(redirect(&mut vec![0; 8192], &ours, 0).is_err());
        let mut cut = ours[..ours.len() / 2].to_vec();
        // Either the tables are gone or a function is outside; it must not panic.
        let _ = redirect(&mut cut, &ours, 0);
        for at in (0..ours.len()).step_by(7) {
            let mut bad = ours.clone();
            bad[at] ^= 0xff;
            let _ = redirect(&mut bad, &ours, 0);
        }
    }
}
