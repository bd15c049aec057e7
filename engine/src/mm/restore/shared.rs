//! Shared anonymous memory that images know by a number of its own.
//!
//! Every object is made once, in the engine before it forks, so that all tasks inherit it; a task's mapping
//! is a second view of the engine's. No descriptor and no path is needed.

use std::collections::BTreeMap;

use rcriu_images::{
    ImageKind,
    pagemap::{PAGE_SIZE, PageReader, Source, Stored},
    pb,
};

use super::{READ_WRITE, Room, TABLE, entry, vmas};
use crate::error::{Context, Error, Result};
use crate::mm::{status as st, stored::Unpacking};
use crate::restore::Snapshot;
use crate::sys::map::{Mapping, Region};

/// The engine's view of each object, by `shmid`.
#[derive(Debug, Default)]
pub struct SharedAnon(BTreeMap<u64, Region>);

impl SharedAnon {
    /// Makes and fills every object that any task maps.
    pub fn prepare(snapshot: &Snapshot, room: &mut Room) -> Result<SharedAnon> {
        let mut sizes: BTreeMap<u64, u64> = BTreeMap::new();
        let all = snapshot.alive().flat_map(|(_, task)| vmas(task));
        for vma in all.filter(|v| v.status & st::ANON_SHARED != 0 && v.status & st::SYSVIPC == 0) {
            let end = vma.pgoff.checked_add(vma.end - vma.start).filter(|end| end % PAGE_SIZE == 0);
            let end =
                end.ok_or_else(|| Error::image(format!("{}: offset out of range", entry::name(vma))))?;
            let size = sizes.entry(vma.shmid).or_default();
            *size = end.max(*size);
        }
        let mut objects = BTreeMap::new();
        for (shmid, size) in sizes {
            let object = make(snapshot, shmid, size, room).during(|| format!("shared memory {shmid}"))?;
            objects.insert(shmid, object);
        }
        Ok(SharedAnon(objects))
    }

    /// Where in the engine the memory is that `vma` shows.
    pub fn address(&self, vma: &pb::VmaEntry) -> Result<u64> {
        match self.0.get(&vma.shmid) {
            Some(object) => Ok(object.start() + vma.pgoff),
            None => Err(Error::bug(format!("shared memory {} was not made", vma.shmid))),
        }
    }
}

fn make(snapshot: &Snapshot, shmid: u64, size: u64, room: &mut Room) -> Result<Region> {
    let flags = (libc::MAP_SHARED | libc::MAP_ANONYMOUS) as u32;
    let object = room.map_elsewhere(0, size, TABLE, Mapping { prot: READ_WRITE, flags, file: None })?;
    let Some(pages) = PageReader::open(&snapshot.dir, ImageKind::ShmemPagemap, shmid)? else {
        return Ok(object);
    };
    if pages.pagemap(0).and_then(|m| m.regions.last()).is_some_and(|last| last.end() > size) {
        return Err(Error::image("there are pages behind its end"));
    }
    for run in pages.runs(0, size) {
        crate::interrupt::check()?;
        match run.source {
            Source::Absent => {}
            Source::Stored { level, offset } => {
                let at = object.start() + run.vaddr;
                let got = match pages.stored(level) {
                    Some(Stored::Plain(file)) => object.read_file(file, offset, &[(at, run.len)])?,
                    Some(Stored::Packed(packed)) => {
                        Unpacking::new(packed).read(&object, offset, &[(at, run.len)])?
                    }
                    None => 0,
                };
                if got != run.len {
                    return Err(super::fill::missing(Some(&pages), level, offset));
                }
            }
            Source::Lazy | Source::Missing => {
                return Err(Error::image(format!("page {:#x} is not in the images", run.vaddr)));
            }
        }
    }
    Ok(object)
}
