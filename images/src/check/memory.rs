//! Mappings and pages.

use super::Check;
use crate::{
    catalog::ImageKind,
    packed::Packed,
    pagemap::{PAGE_SIZE, PageReader, Place, Source, Stored},
    pb::{FdTypes, VmaEntry},
    set::{Finding, Task},
    sums,
};

/// `vma_entry.status` bits.
const FILE_PRIVATE: u32 = 1 << 6;
const FILE_SHARED: u32 = 1 << 7;
const ANON_SHARED: u32 = 1 << 8;
const SYSVIPC: u32 = 1 << 10;
const SOCKET: u32 = 1 << 11;
const MEMFD: u32 = 1 << 14;
/// Of sets written here.
const URING: u32 = 1 << 24;

impl Check<'_> {
    pub(super) fn memory(&mut self) {
        for task in &self.set.tasks {
            self.vmas(task);
        }
        let mut maps: Vec<(ImageKind, u64)> =
            self.images.iter().copied().filter(|(kind, _)| is_pagemap(*kind)).collect();
        maps.sort();
        for (kind, id) in maps {
            self.pagemap(kind, id);
        }
    }

    fn vmas(&mut self, task: &Task) {
        let Some(mm) = &task.mm else { return };
        let id = u64::from(task.pid);
        if !self.is_file(mm.exe_file_id) {
            self.error(
                ImageKind::Mm,
                id,
                format!("executable {:#x} is no open file of the set", mm.exe_file_id),
            );
        }
        let mut end = 0;
        for vma in &mm.vmas {
            let at = format!("mapping {:#x}-{:#x}", vma.start, vma.end);
            if vma.start >= vma.end
                || !vma.start.is_multiple_of(PAGE_SIZE)
                || !vma.end.is_multiple_of(PAGE_SIZE)
            {
                self.error(ImageKind::Mm, id, format!("{at} is no range of pages"));
            } else if vma.start < end {
                self.error(
                    ImageKind::Mm,
                    id,
                    format!("{at} overlaps the one before, which ends at {end:#x}"),
                );
            }
            end = vma.end.max(end);
            if let Some(wrong) = self.backing(vma) {
                self.error(ImageKind::Mm, id, format!("{at}: {wrong}"));
            }
        }
    }

    /// What is wrong with what a mapping maps.
    fn backing(&self, vma: &VmaEntry) -> Option<String> {
        let object = vma.shmid;
        let file = u32::try_from(object).ok();
        let missing = |what: &str| Some(format!("{what} {object:#x} is not in the set"));
        if vma.status & SOCKET != 0 {
            let there = file.is_some_and(|id| self.set.files.contains_key(&(FdTypes::Packetsk, id)));
            if there { None } else { missing("packet socket") }
        } else if vma.status & URING != 0 {
            let there = file.is_some_and(|id| self.set.files.contains_key(&(FdTypes::RcriuUring, id)));
            if there { None } else { missing("io_uring") }
        } else if vma.status & (FILE_PRIVATE | FILE_SHARED) != 0 {
            if file.is_some_and(|id| self.is_file(id)) { None } else { missing("file") }
        } else if vma.status & SYSVIPC != 0 {
            // The segment is in its ipc namespace; how those tie up is looked at there.
            None
        } else if vma.status & ANON_SHARED != 0 {
            if vma.status & MEMFD != 0 {
                return if file.is_some_and(|id| self.is_file(id)) { None } else { missing("memfd") };
            }
            if self.has(ImageKind::ShmemPagemap, object) { None } else { missing("shared memory") }
        } else {
            None
        }
    }

    fn pagemap(&mut self, kind: ImageKind, id: u64) {
        let Some(Some(pages)) = self.note(PageReader::open(&self.set.dir, kind, id)) else { return };
        let Some(map) = pages.pagemap(0) else { return };
        if kind == ImageKind::Pagemap {
            self.inside_vmas(id, &pages);
        }
        for region in map.regions.iter().filter(|r| r.place == Place::Parent) {
            for run in pages.runs(region.vaddr, region.end()) {
                if run.source == Source::Missing {
                    let count = run.len / PAGE_SIZE;
                    self.error(
                        kind,
                        id,
                        format!("{count} pages at {:#x} are not in the parent images", run.vaddr),
                    );
                }
            }
        }
        if map.pages_id == 0 {
            return;
        }
        let want = map.stored * PAGE_SIZE;
        let pages_id = u64::from(map.pages_id);
        if let Some(Stored::Packed(packed)) = pages.stored(0) {
            return self.packed(kind, id, want, packed);
        }
        let have = self.note(self.set.dir.size(ImageKind::Pages, pages_id)).flatten().unwrap_or(0);
        if have < want {
            let text = format!("truncated: {} refers to {want} bytes, there are {have}", kind.file_name(id));
            self.error(ImageKind::Pages, pages_id, text);
        } else if have > want {
            let text = format!("{} bytes that {} does not refer to", have - want, kind.file_name(id));
            self.warn(ImageKind::Pages, pages_id, text);
        }
    }

    /// Compressed pages: each block must unpack.
    fn packed(&mut self, kind: ImageKind, id: u64, want: u64, packed: &Packed) {
        let have = packed.blocks.len();
        if have != want {
            let text = format!("{} refers to {want} bytes of pages, there are {have}", kind.file_name(id));
            self.found.push(Finding::error(packed.name(), text));
        }
        if let Some(more @ 1..) = self.note(packed.surplus()) {
            let text = format!("{more} bytes that {} does not refer to", kind.file_name(id));
            self.found.push(Finding::warning(packed.name(), text));
        }
        for (pages, why) in packed.damaged() {
            let place = sums::places(&self.set.dir, packed.id(), &pages);
            let text = place.map_or(why.clone(), |place| format!("{place}: {why}"));
            self.found.push(Finding::error(packed.name(), text));
        }
    }

    /// Pages outside of all mappings have nowhere to go.
    fn inside_vmas(&mut self, id: u64, pages: &PageReader) {
        let task = u32::try_from(id).ok().and_then(|pid| self.pids.get(&pid));
        let Some(mm) = task.and_then(|&at| self.set.tasks[at].mm.as_ref()) else { return };
        let mut vmas = mm.vmas.iter().peekable();
        for region in pages.pagemap(0).map_or(&[][..], |m| &m.regions) {
            let mut at = region.vaddr;
            while at < region.end() {
                while vmas.next_if(|vma| vma.end <= at).is_some() {}
                match vmas.peek() {
                    Some(vma) if vma.start <= at => at = vma.end,
                    _ => {
                        self.error(ImageKind::Pagemap, id, format!("pages at {at:#x} belong to no mapping"));
                        break;
                    }
                }
            }
        }
    }

    /// Whether an open file can be mapped or executed.
    fn is_file(&self, id: u32) -> bool {
        [FdTypes::Reg, FdTypes::Memfd].iter().any(|&ty| self.set.files.contains_key(&(ty, id)))
    }
}

fn is_pagemap(kind: ImageKind) -> bool {
    matches!(kind, ImageKind::Pagemap | ImageKind::ShmemPagemap)
}
