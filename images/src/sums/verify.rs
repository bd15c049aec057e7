//! Making the sums of a folder, and comparing a folder with its sums.

use std::{collections::BTreeSet, fmt, ops::Range};

use super::{BLOCK, FileSums, Known, Sums, Sweep, has_sums, missing};
use crate::{
    catalog::ImageKind,
    dir::{ImageDir, PARENT_LINK},
    error::{Error, Result},
    packed::Packed,
    pagemap::{PAGE_SIZE, Pagemap, Place},
    pb,
};

/// What is wrong with a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// It is not there.
    Missing,
    /// It came after the dump.
    Extra,
    /// It has another length, in bytes.
    Length { was: u64, is: u64 },
    /// These bytes have another sum. `place` says what they are to whom, where that can be told.
    Content { bytes: Range<u64>, place: Option<String> },
    /// The parent images are not those that the set was made on.
    OtherParent,
}

/// A file that is not as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// File name; that of a file in a parent has `parent/` before it.
    pub file: String,
    pub fault: Fault,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Missing => write!(f, "it is not there"),
            Fault::Extra => write!(f, "it came after the dump: the sums of the set do not know it"),
            Fault::Length { was, is } if is < was => {
                write!(f, "truncated: it had {was} bytes, there are {is}")
            }
            Fault::Length { was, is } => write!(f, "it had {was} bytes, there are {is}"),
            Fault::Content { place: Some(place), .. } => write!(f, "{place}: not as it was written"),
            Fault::Content { bytes, place: None } => {
                write!(f, "bytes {:#x}-{:#x}: not as they were written", bytes.start, bytes.end - 1)
            }
            Fault::OtherParent => write!(f, "these are not the images that the set was made on"),
        }
    }
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.file, self.fault)
    }
}

/// The files of a folder that have sums.
fn files(dir: &ImageDir) -> Result<Vec<(ImageKind, u64)>> {
    Ok(dir.images()?.into_iter().filter(|(kind, _)| has_sums(*kind)).collect())
}

fn sweep(
    dir: &ImageDir,
    images: &[(ImageKind, u64)],
    sweep: Sweep<'_>,
    known: &Known,
) -> Result<Vec<(String, FileSums)>> {
    let mut open = Vec::new();
    for &(kind, id) in images {
        if let Some(file) = dir.open_raw(kind, id)? {
            open.push((kind.file_name(id), file));
        }
    }
    let sums = sweep.files(&open, known)?;
    Ok(open.into_iter().map(|(name, _)| name).zip(sums).collect())
}

/// Sums of all that is in the folder, but of its inventory: that is written last, and must be added. What is `known`
/// already is not read.
pub fn of_folder(dir: &ImageDir, how: Sweep<'_>, known: &Known) -> Result<Sums> {
    let mut images = files(dir)?;
    images.retain(|(kind, _)| *kind != ImageKind::Inventory);
    let files = sweep(dir, &images, how, known)?.into_iter().collect();
    let parent = dir.parent()?.map(|parent| of_inventory(&parent)).transpose()?.flatten();
    Ok(Sums { files, parent })
}

/// Sums of the inventory, if there is one.
fn of_inventory(dir: &ImageDir) -> Result<Option<FileSums>> {
    use std::io::Read;
    let Some(mut file) = dir.open_raw(ImageKind::Inventory, 0)? else { return Ok(None) };
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(|e| Error::sys(ImageKind::Inventory.file_name(0), "read", e))?;
    Ok(Some(FileSums::of(&bytes)))
}

/// Compares a set and its parents with their sums; `None` if neither has any. Sums that are damaged
/// themselves are an error that names them.
///
/// # Errors
/// Files that cannot be read; sums that are missing or damaged.
pub fn verify(dir: &ImageDir, how: Sweep<'_>) -> Result<Option<Vec<Damage>>> {
    let mut found = None;
    let mut before = String::new();
    for dir in dir.chain()? {
        if let Some(damages) = folder(&dir, how)? {
            let all: &mut Vec<Damage> = found.get_or_insert_default();
            all.extend(damages.into_iter().map(|d| Damage { file: format!("{before}{}", d.file), ..d }));
        }
        before.push_str(PARENT_LINK);
        before.push('/');
    }
    Ok(found)
}

fn folder(dir: &ImageDir, how: Sweep<'_>) -> Result<Option<Vec<Damage>>> {
    let Some(sums) = Sums::read(dir)? else {
        // A damaged inventory is reported by whoever reads it for what it says.
        let inventory = dir.read_opt::<pb::InventoryEntry>(ImageKind::Inventory, 0);
        let promised = inventory.ok().flatten().is_some_and(|i| i.rcriu_sums());
        return if promised { Err(missing()) } else { Ok(None) };
    };
    let mut damages = Vec::new();
    let images = files(dir)?;
    let names: BTreeSet<String> = images.iter().map(|&(kind, id)| kind.file_name(id)).collect();
    for name in sums.files.keys().filter(|name| !names.contains(*name)) {
        damages.push(Damage { file: name.clone(), fault: Fault::Missing });
    }
    for name in names.iter().filter(|name| !sums.files.contains_key(*name)) {
        damages.push(Damage { file: name.clone(), fault: Fault::Extra });
    }
    for (name, is) in sweep(dir, &images, how, &Known::default())? {
        let Some(was) = sums.files.get(&name) else { continue };
        if was.size != is.size {
            let fault = Fault::Length { was: was.size, is: is.size };
            damages.push(Damage { file: name.clone(), fault });
        }
        let blocks = was.blocks.len().min(is.blocks.len());
        let mut bad: Vec<Range<u64>> = Vec::new();
        for block in (0..blocks).filter(|&at| was.blocks[at] != is.blocks[at]) {
            let at = block as u64 * BLOCK;
            let end = (at + BLOCK).min(is.size);
            if was.size != is.size && end % BLOCK != 0 {
                continue;
            }
            match bad.last_mut() {
                Some(last) if last.end == at => last.end = end,
                _ => bad.push(at..end),
            }
        }
        for (bytes, place) in name_places(dir, &name, bad) {
            damages.push(Damage { file: name.clone(), fault: Fault::Content { bytes, place } });
        }
    }
    if let Some(was) = &sums.parent
        && of_inventory_of_parent(dir)?.as_ref() != Some(was)
    {
        damages.push(Damage { file: PARENT_LINK.into(), fault: Fault::OtherParent });
    }
    Ok(Some(damages))
}

fn of_inventory_of_parent(dir: &ImageDir) -> Result<Option<FileSums>> {
    Ok(dir.parent()?.map(|parent| of_inventory(&parent)).transpose()?.flatten())
}

/// Most ranges of a file that are named one by one.
const NAMED: usize = 64;

/// What ranges of bytes of a file with pages are to whom: `task 12, 7f0000000000-7f0000000fff`.
fn name_places(dir: &ImageDir, file: &str, bad: Vec<Range<u64>>) -> Vec<(Range<u64>, Option<String>)> {
    let (maps, blocks) = match ImageKind::from_file_name(file) {
        _ if bad.is_empty() => (Vec::new(), None),
        Some((ImageKind::Pages, id)) => {
            let maps = pagemaps(dir, id);
            let blocks = maps.iter().find_map(|(_, map)| map.blocks.clone());
            (maps, blocks)
        }
        Some((ImageKind::RcriuPages, id)) => {
            (pagemaps(dir, id), Packed::open(dir, id).ok().flatten().map(|packed| packed.blocks))
        }
        _ => (Vec::new(), None),
    };
    let mut named = Vec::new();
    for bytes in bad.iter().take(NAMED).cloned() {
        let pages = blocks.as_ref().map_or(bytes.clone(), |blocks| blocks.pages_of(&bytes));
        named.push((bytes, owners(&maps, &pages)));
    }
    if let (Some(first), Some(last)) = (bad.get(NAMED), bad.last()) {
        let more = bad.len() - NAMED;
        named.push((first.start..last.end, Some(format!("and {more} more ranges of pages"))));
    }
    named
}

/// Whose the pages at these bytes of `pages-ID` are, and where.
pub fn places(dir: &ImageDir, id: u64, pages: &Range<u64>) -> Option<String> {
    owners(&pagemaps(dir, id), pages)
}

fn owners(maps: &[(String, Pagemap)], pages: &Range<u64>) -> Option<String> {
    let mut places = Vec::new();
    for (what, map) in maps {
        for region in &map.regions {
            let Place::Present { first } = region.place else { continue };
            let start = first.saturating_mul(PAGE_SIZE);
            let end = start.saturating_add(region.len());
            let (from, to) = (pages.start.max(start), pages.end.min(end));
            if from < to {
                let at = region.vaddr.saturating_add(from - start);
                places.push(format!("{what}, {at:x}-{:x}", at + (to - from) - 1));
            }
        }
    }
    (!places.is_empty()).then(|| places.join("; "))
}

/// The pagemaps whose pages are in `pages-ID`, and whose they are. Those that cannot be read are reported by
/// their own sums.
fn pagemaps(dir: &ImageDir, id: u64) -> Vec<(String, Pagemap)> {
    let mut maps = Vec::new();
    for (kind, owner) in dir.images().unwrap_or_default() {
        let what = match kind {
            ImageKind::Pagemap => "task",
            ImageKind::ShmemPagemap => "shared memory",
            _ => continue,
        };
        if let Ok(Some(map)) = Pagemap::read(dir, kind, owner)
            && u64::from(map.pages_id) == id
        {
            maps.push((format!("{what} {owner}"), map));
        }
    }
    maps
}

/// The error that a restore fails with.
pub fn as_error(damages: &[Damage]) -> Option<Error> {
    let first = damages.first()?;
    let more = match damages.len() - 1 {
        0 => String::new(),
        1 => " (and one more place)".into(),
        n => format!(" (and {n} more places)"),
    };
    Some(Error::invalid(&first.file, format!("{}{more}", first.fault)))
}
