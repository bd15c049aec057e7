//! Maps of BPF that a restore makes, each once.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
};

use rcriu_images::{ImageDir, ImageKind, extra::BpfMap, pb};

use super::{NUMA_NODE, sizes};
use crate::{
    error::{Error, Result},
    sys::bpf::{self, Shape},
};

/// Maps by their numbers in images.
#[derive(Debug, Default)]
pub(in crate::files) struct Maps {
    /// Those that have elements, as read from their image.
    content: Option<BTreeMap<u32, BpfMap>>,
    known: BTreeMap<u32, Arc<Map>>,
}

/// A map to be.
#[derive(Debug)]
pub(in crate::files) struct Map {
    entry: pb::BpfmapFileEntry,
    content: BpfMap,
    /// Its number, once it is made.
    made: Mutex<Option<u32>>,
}

impl Maps {
    /// The map of an entry.
    ///
    /// # Errors
    /// Entries that contradict each other, or elements that are not of their sizes.
    pub(in crate::files) fn of(
        &mut self,
        images: &ImageDir,
        entry: &pb::BpfmapFileEntry,
    ) -> Result<Arc<Map>> {
        if let Some(map) = self.known.get(&entry.map_id) {
            let shape =
                |e: &pb::BpfmapFileEntry| (e.map_type, e.key_size, e.value_size, e.max_entries, e.map_flags);
            return match shape(&map.entry) == shape(entry) {
                true => Ok(Arc::clone(map)),
                false => {
                    Err(Error::image(format!("files.img: two BPF maps have the number {}", entry.map_id)))
                }
            };
        }
        if self.content.is_none() {
            self.content = Some(read(images)?);
        }
        let content = self.content.as_mut().and_then(|all| all.remove(&entry.map_id)).unwrap_or_default();
        let (key, value) = (entry.key_size as usize, entry.value_size as usize);
        let count = content.keys.len() / key.max(1);
        if key == 0 || count * key != content.keys.len() || count * value != content.values.len() {
            return Err(Error::image(format!(
                "bpfmap-data.img: elements of map {} have other sizes",
                entry.map_id
            )));
        }
        let map = Arc::new(Map { entry: entry.clone(), content, made: Mutex::new(None) });
        self.known.insert(entry.map_id, Arc::clone(&map));
        Ok(map)
    }
}

fn read(images: &ImageDir) -> Result<BTreeMap<u32, BpfMap>> {
    let mut all = BTreeMap::new();
    let Some(mut reader) = images.reader(ImageKind::BpfmapData, 0)? else { return Ok(all) };
    while let Some(entry) = reader.next::<pb::BpfmapDataEntry>()? {
        let content = reader.bpf_map(&entry)?;
        if all.insert(entry.map_id, content).is_some() {
            return Err(Error::image(format!("bpfmap-data.img: map {} is there twice", entry.map_id)));
        }
    }
    Ok(all)
}

impl Map {
    /// A descriptor for `access`; the first makes the map, and must be open for as long as others are asked for.
    pub(super) fn open(&self, access: u32) -> Result<OwnedFd> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(id) = *made {
            return bpf::by_id(id, access);
        }
        let entry = &self.entry;
        if entry.map_flags & NUMA_NODE != 0 {
            log::warn!("BPF map {}: the NUMA node of its memory is not kept", entry.map_id);
        }
        let map = bpf::create(&Shape {
            kind: entry.map_type,
            key: entry.key_size,
            value: entry.value_size,
            entries: entry.max_entries,
            flags: entry.map_flags & !NUMA_NODE,
            name: &entry.map_name,
            ifindex: entry.ifindex,
            extra: entry.map_extra.unwrap_or(0),
        })?;
        if !self.content.keys.is_empty() {
            bpf::update(map.as_fd(), sizes(entry), &self.content.keys, &self.content.values)?;
        }
        if entry.frozen {
            bpf::freeze(map.as_fd())?;
        }
        let id = bpf::info(map.as_fd())?.id;
        let map = if access == 0 { map } else { bpf::by_id(id, access)? };
        *made = Some(id);
        Ok(map)
    }
}
