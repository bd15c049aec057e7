//! The vdso: the kernel's code and data pages in every process.
//!
//! If the dumped one is byte for byte that of this kernel and its pages lie alike, ours is moved to where it
//! was. Programs keep addresses of its functions, so a different one cannot simply be put there.

use rcriu_images::{pagemap::PageReader, pb};
use restorer::args::VdsoPart;

use super::current;
use crate::error::{Error, Result};
use crate::mm::status as st;
use crate::procfs::maps::Map;
use crate::pstree::RealPid;
use crate::sys::vm;

/// A vdso is a few pages; more is a mistake.
const MOST: u64 = 1 << 20;

/// Its pieces in one process: data pages and code, as one block.
#[derive(Debug, PartialEq, Eq)]
struct Block {
    /// First address of all.
    start: u64,
    end: u64,
    /// Code.
    text: (u64, u64),
}

/// Ours: the kernel makes one or two data mappings and the code, next to each other.
fn own(maps: &[Map]) -> Option<(Block, Vec<&Map>)> {
    let named = |m: &&Map| matches!(m.name.as_slice(), b"[vdso]" | b"[vvar]" | b"[vvar_vclock]");
    let parts: Vec<&Map> = maps.iter().filter(named).collect();
    let text = parts.iter().find(|m| m.name == b"[vdso]")?;
    let block = Block { start: parts.first()?.start, end: parts.last()?.end, text: (text.start, text.end) };
    Some((block, parts))
}

/// The dumped one.
fn dumped(vmas: &[pb::VmaEntry]) -> Option<Block> {
    let text = vmas.iter().find(|v| v.status & st::VDSO != 0)?;
    let parts = || vmas.iter().filter(|v| v.status & (st::VDSO | st::VVAR) != 0);
    Some(Block { start: parts().next()?.start, end: parts().next_back()?.end, text: (text.start, text.end) })
}

/// How our vdso gets to where the dumped one was; `park` is where it can wait (as long as it takes). Empty
/// if the task had none.
///
/// # Errors
/// A vdso of another kernel.
pub fn plan(vmas: &[pb::VmaEntry], pages: Option<&PageReader>, park: u64) -> Result<Vec<VdsoPart>> {
    let Some(theirs) = dumped(vmas) else { return Ok(Vec::new()) };
    let maps = current()?;
    let Some((ours, parts)) = own(&maps) else {
        return Err(Error::host("this kernel gives no vdso").remedy("boot it without vdso=0"));
    };
    if !alike(&ours, &theirs, pages)? {
        return Err(Error::unsupported("the vdso of the dumped program is that of another kernel"));
    }
    let part = |m: &&Map| VdsoPart {
        from: m.start,
        park: park + (m.start - ours.start),
        to: theirs.start + (m.start - ours.start),
        len: m.len(),
    };
    Ok(parts.iter().map(part).collect())
}

/// Bytes needed to park ours.
pub fn size() -> Result<u64> {
    Ok(own(&current()?).map_or(0, |(block, _)| block.end - block.start))
}

fn alike(ours: &Block, theirs: &Block, pages: Option<&PageReader>) -> Result<bool> {
    let shape = |b: &Block| (b.end - b.start, b.text.0 - b.start, b.text.1 - b.text.0);
    let len = ours.text.1 - ours.text.0;
    if shape(ours) != shape(theirs) || len > MOST {
        return Ok(false);
    }
    let Some(dumped) = pages.map(|p| p.read(theirs.text.0, len)).transpose()?.flatten() else {
        return Err(Error::image("the pages of the vdso are missing"));
    };
    let mut here = vec![0; len as usize];
    vm::read(RealPid(std::process::id() as i32), ours.text.0, &mut here)?;
    Ok(here == dumped)
}
