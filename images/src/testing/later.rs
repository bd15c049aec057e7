//! Sets in the layout of CRIU after 4.2: their pages are packed by LZ4, in blocks that pagemaps list.

use std::{collections::BTreeMap, fs, ops::AddAssign, os::unix::fs::FileExt, path::Path};

use crate::{
    Entry, ImageDir, ImageKind, magic,
    pagemap::{PAGE_SIZE, PE_PAYLOAD_ALIGNED, PE_PRESENT, Pagemap},
    pb,
};

/// `vma_entry.status`: memory that reads as zero where it has no pages.
const ANON_PRIVATE: u32 = 1 << 9;
/// `vma_entry.flags`: `MAP_HUGETLB`.
const HUGETLB: u32 = 0x4_0000;
/// Pages of a hole at most that is stored as zeros.
const HOLE: u64 = 512;

/// Which layout.
#[derive(Debug, Clone, Copy)]
pub enum Layout {
    /// What pagemaps say in `blocks`.
    Blocks,
    /// The first form, with a packed list.
    Regions,
    /// The first form, with a list that is not packed.
    Unpacked,
}

/// What there was.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Blocks that are zeros, stand there as they are, are packed.
    pub zero: usize,
    pub raw: usize,
    pub packed: usize,
    /// Blocks with fewer pages than others.
    pub short: usize,
    /// Entries without blocks.
    pub plain: usize,
}

impl AddAssign for Counts {
    fn add_assign(&mut self, more: Self) {
        self.zero += more.zero;
        self.raw += more.raw;
        self.packed += more.packed;
        self.short += more.short;
        self.plain += more.plain;
    }
}

/// Gives the set in the folder this layout, with `per` pages in a block; its pages must stand there as they are. Small
/// holes of private memory, and what is before the first page of shared memory, become zeros, which CRIU stores.
pub fn rewrite(path: &Path, layout: Layout, per: u32) -> Counts {
    let dir = ImageDir::open(path).unwrap();
    let mut counts = Counts::default();
    for (kind, id) in dir.images().unwrap() {
        if matches!(kind, ImageKind::Pagemap | ImageKind::ShmemPagemap) {
            counts += pagemap(&dir, path, (kind, id), layout, per);
        }
    }
    let mut inventory: pb::InventoryEntry = dir.read_one(ImageKind::Inventory, 0).unwrap();
    inventory.img_version = magic::IMAGES_V1_2;
    inventory.compress = Some(if per > 1 && !matches!(layout, Layout::Blocks) { 2 } else { 1 });
    inventory.compress_block_size = (per > 1).then_some(per * PAGE_SIZE as u32);
    put(&dir, ImageKind::Inventory, 0, &[inventory]);
    counts
}

/// Writes an image.
pub fn put<M: Entry>(dir: &ImageDir, kind: ImageKind, id: u64, entries: &[M]) {
    let mut out = dir.writer(kind, id);
    entries.iter().for_each(|e| out.write(e).unwrap());
    out.finish().unwrap();
}

fn pagemap(dir: &ImageDir, path: &Path, (kind, id): (ImageKind, u64), layout: Layout, per: u32) -> Counts {
    let map = Pagemap::read(dir, kind, id).unwrap().unwrap();
    let plain = path.join(ImageKind::Pages.file_name(map.pages_id.into()));
    let mut stored = BTreeMap::new();
    let mut at = 0;
    let mut reader = dir.reader(kind, id).unwrap().unwrap();
    let head: pb::PagemapHead = reader.one().unwrap();
    let mut entries: Vec<pb::PagemapEntry> = reader.all().unwrap();
    for entry in entries.iter().filter(|e| e.flags() & PE_PRESENT != 0) {
        stored.insert(entry.vaddr, at);
        at += entry.nr_pages() * PAGE_SIZE;
    }
    let old = if at > 0 { Some(fs::File::open(&plain).unwrap()) } else { None };
    if kind == ImageKind::ShmemPagemap {
        entries = from_zero(entries);
    } else if let Some(mm) = dir.read_opt::<pb::MmEntry>(ImageKind::Mm, id).unwrap() {
        entries = filled(entries, &mm.vmas);
    }
    let mut out = dir.writer(kind, id);
    out.write(&head).unwrap();
    let (mut counts, mut pages) = (Counts::default(), Vec::new());
    for mut entry in entries {
        if entry.flags() & PE_PRESENT == 0 {
            out.write(&entry).unwrap();
            continue;
        }
        let mut content = vec![0; (entry.nr_pages() * PAGE_SIZE) as usize];
        let end = entry.vaddr + content.len() as u64;
        for (vaddr, offset) in stored.range(entry.vaddr..end) {
            let len = map.find(*vaddr).unwrap().len().min(end - vaddr) as usize;
            let into = &mut content[(vaddr - entry.vaddr) as usize..][..len];
            old.as_ref().unwrap().read_exact_at(into, *offset).unwrap();
        }
        let (sizes, blocks, mut these) = pack(&content, per);
        let whole = content.chunks(per as usize * PAGE_SIZE as usize).map(<[u8]>::len);
        if sizes.iter().zip(whole).all(|(size, whole)| *size as usize == whole) {
            these = Counts { plain: 1, ..Counts::default() };
            entry.flags = Some(entry.flags() | PE_PAYLOAD_ALIGNED);
            pages.resize(pages.len().next_multiple_of(PAGE_SIZE as usize), 0xee);
            out.write(&entry).unwrap();
        } else {
            write(&mut out, entry, layout, per, sizes);
        }
        pages.extend(blocks);
        counts += these;
    }
    out.finish().unwrap();
    if old.is_some() {
        fs::write(plain, pages).unwrap();
    }
    counts
}

/// Has the first entry of shared memory begin at its start, unless that is far or the memory is of huge pages.
fn from_zero(mut entries: Vec<pb::PagemapEntry>) -> Vec<pb::PagemapEntry> {
    if let Some(first) = entries.first_mut().filter(|e| e.flags() & PE_PRESENT != 0) {
        let (before, pages) = (first.vaddr / PAGE_SIZE, first.nr_pages());
        if before < HOLE && !pages.is_multiple_of(HOLE) {
            first.vaddr = 0;
            (first.nr_pages, first.compat_nr_pages) = (Some(before + pages), (before + pages) as u32);
        }
    }
    entries
}

/// Joins entries between which there are no more than a few pages, all in one mapping that reads as zero there.
fn filled(entries: Vec<pb::PagemapEntry>, vmas: &[pb::VmaEntry]) -> Vec<pb::PagemapEntry> {
    let mut all: Vec<pb::PagemapEntry> = Vec::new();
    for entry in entries {
        let inside = |vma: &&pb::VmaEntry| {
            let plain = vma.status & ANON_PRIVATE != 0 && vma.flags & HUGETLB == 0;
            plain && vma.start <= entry.vaddr && entry.vaddr < vma.end
        };
        let vma = vmas.iter().find(inside);
        match (all.last_mut(), vma) {
            (Some(last), Some(vma))
                if last.flags == entry.flags
                    && entry.flags() & PE_PRESENT != 0
                    && last.vaddr >= vma.start
                    && entry.vaddr - (last.vaddr + last.nr_pages() * PAGE_SIZE) <= HOLE * PAGE_SIZE =>
            {
                let pages = (entry.vaddr - last.vaddr) / PAGE_SIZE + entry.nr_pages();
                (last.nr_pages, last.compat_nr_pages) = (Some(pages), pages as u32);
            }
            _ => all.push(entry),
        }
    }
    all
}

/// Packs pages in blocks: what each takes, and all of them.
pub fn pack(content: &[u8], per: u32) -> (Vec<u32>, Vec<u8>, Counts) {
    let (mut sizes, mut bytes, mut counts) = (Vec::new(), Vec::new(), Counts::default());
    let whole = per as usize * PAGE_SIZE as usize;
    for block in content.chunks(whole) {
        let packed = lz4_flex::block::compress(block);
        counts.short += usize::from(block.len() < whole);
        if crate::packed::is_zero(block) {
            counts.zero += 1;
            sizes.push(0);
        } else if packed.len() >= block.len() / 8 * 7 {
            counts.raw += 1;
            sizes.push(block.len() as u32);
            bytes.extend(block);
        } else {
            counts.packed += 1;
            sizes.push(packed.len() as u32);
            bytes.extend(packed);
        }
    }
    (sizes, bytes, counts)
}

fn write(out: &mut crate::ImageWriter, entry: pb::PagemapEntry, layout: Layout, per: u32, sizes: Vec<u32>) {
    let total = sizes.iter().map(|size| u64::from(*size)).sum();
    if let Layout::Blocks = layout {
        let blocks =
            pb::PagemapBlocks { block_sizes: sizes, total_payload_size: total, pages_per_block: per };
        return out.write(&pb::PagemapEntry { blocks: Some(blocks), ..entry }).unwrap();
    }
    let packed = matches!(layout, Layout::Regions);
    let entry = pb::PagemapRegionEntry {
        vaddr: entry.vaddr,
        compat_nr_pages: entry.compat_nr_pages,
        in_parent: entry.in_parent,
        flags: entry.flags,
        nr_pages: entry.nr_pages,
        compressed_size: if packed { sizes.clone() } else { Vec::new() },
        total_compressed_size: Some(total),
        region_pages: (per > 1).then_some(per),
    };
    let mut bytes = prost::Message::encode_to_vec(&entry);
    if !packed {
        for size in sizes {
            // Field 6, a number.
            bytes.push(6 << 3);
            prost::encoding::encode_varint(size.into(), &mut bytes);
        }
    }
    out.write_raw(&(bytes.len() as u32).to_le_bytes()).unwrap();
    out.write_raw(&bytes).unwrap();
}
