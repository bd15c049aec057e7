//! Maps of BPF, with what is in them (bpf(2)): of the types that keep one value for a key. What a program reads and
//! writes through bpf(2) comes back; programs of BPF themselves do not ([`refuse`](super::refuse)).
//!
//! Entries tell shape and number of the map, and `bpfmap-data.img` for each number the elements. Descriptors of one map
//! that were opened apart say the same number, and become descriptors of one map again. The engine makes maps, since a
//! task in a user namespace may not.

mod maps;

use std::{
    collections::HashSet,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use rcriu_images::{ImageDir, ImageKind, ImageWriter, extra::BpfMap, pb};

pub(super) use self::maps::{Map, Maps};
use super::{DrainedFd, FdProbe, FdType, FileKind, FilesOut, FilesTask, PlanFiles, RestoredFile, pipe};
use crate::{
    error::{Context, Error, Result},
    options::RestoreOptions,
    procfs::{self, fdinfo::FdInfo},
    pstree::FileId,
    sys::bpf::{self, Sizes},
};

/// Types that keep one value for a key and need nothing else: hash, array, and of Linux 4.10 and 4.11 those that forget
/// and those of prefixes.
const TYPES: [u32; 4] = [1, 2, 9, 11];
/// `BPF_F_NUMA_NODE`: the node is not told.
const NUMA_NODE: u32 = 1 << 2;
/// Elements asked for at once.
const STEP: u32 = 4096;

/// The kind.
#[derive(Debug)]
pub(super) struct Bpfmap;

/// Maps whose elements are in the images.
#[derive(Debug)]
pub(super) struct BpfmapsOut {
    written: HashSet<u32>,
    out: ImageWriter,
}

impl BpfmapsOut {
    pub(super) fn new(images: &ImageDir) -> Self {
        BpfmapsOut { written: HashSet::new(), out: images.writer(ImageKind::BpfmapData, 0) }
    }

    pub(super) fn finish(self) -> Result<()> {
        Ok(self.out.finish()?)
    }

    fn write(&mut self, map: BorrowedFd<'_>, entry: &pb::BpfmapFileEntry) -> Result<()> {
        if !self.written.insert(entry.map_id) {
            return Ok(());
        }
        let elements = elements(map, sizes(entry), entry.max_entries)?;
        let len = |bytes: &[u8]| {
            u32::try_from(bytes.len()).map_err(|_| {
                Error::unsupported("its content takes more than 4 GiB, for which images have no room")
            })
        };
        let data = pb::BpfmapDataEntry {
            map_id: entry.map_id,
            keys_bytes: len(&elements.keys)?,
            values_bytes: len(&elements.values)?,
            count: len(&elements.keys)? / entry.key_size.max(1),
        };
        Ok(self.out.write_bpf_map(&data, &elements)?)
    }
}

fn sizes(entry: &pb::BpfmapFileEntry) -> Sizes {
    Sizes { key: entry.key_size as usize, value: entry.value_size as usize }
}

/// All elements, as they are while programs may change some.
fn elements(map: BorrowedFd<'_>, sizes: Sizes, most: u32) -> Result<BpfMap> {
    let mut found = BpfMap::default();
    let (mut place, mut step) = (None, STEP.min(most).max(1));
    loop {
        crate::interrupt::check()?;
        match bpf::lookup_batch(map, sizes, &mut place, step, (&mut found.keys, &mut found.values)) {
            Ok(true) => {}
            Ok(false) => return Ok(found),
            // A part of a table that does not come in pieces has more.
            Err(e) if e.errno() == Some(libc::ENOSPC) && step < most => {
                step = step.saturating_mul(2).min(most)
            }
            Err(e) if place.is_none() && matches!(e.errno(), Some(libc::EINVAL | 524)) => break,
            Err(e) => return Err(e),
        }
    }
    // One by one. A key that goes meanwhile would make the kernel begin anew, so each counts once.
    let (mut key, mut seen) = (None, HashSet::new());
    while let Some(next) = bpf::next_key(map, sizes, key.as_deref())? {
        if !seen.insert(next.clone()) {
            break;
        }
        if let Some(value) = bpf::lookup(map, sizes, &next)? {
            found.keys.extend_from_slice(&next);
            found.values.extend_from_slice(&value);
        }
        key = Some(next);
    }
    Ok(found)
}

impl FileKind for Bpfmap {
    fn fd_type(&self) -> FdType {
        FdType::Bpfmap
    }

    fn claims(&self, fd: &FdProbe) -> bool {
        fd.anonymous("bpf-map")
    }

    fn dump(&self, fd: &DrainedFd, id: FileId, out: &mut FilesOut<'_>) -> Result<pb::FileEntry> {
        let shape = parse(&fd.probe.info).ok_or_else(|| fd.probe.strange())?;
        if !TYPES.contains(&shape.map_type) {
            return Err(Error::unsupported(format!("a BPF map of type {} cannot be dumped", shape.map_type))
                .remedy(
                    "close it before the dump: supported are hashes and arrays with one value for a key",
                ));
        }
        let info = bpf::info(fd.file.as_fd())?;
        let entry = pb::BpfmapFileEntry {
            id: id.0,
            flags: fd.probe.info.flags,
            pos: fd.probe.info.pos,
            fown: fd.fown,
            map_id: info.id,
            map_name: info.name,
            ifindex: info.ifindex,
            ..shape
        };
        if info.btf != 0 {
            log::warn!("The type information of BPF map {} ({}) is not kept", entry.map_id, entry.map_name);
        }
        // What may only be written is read through a descriptor of our own.
        let write_only = fd.probe.info.flags.cast_signed() & libc::O_ACCMODE == libc::O_WRONLY;
        let own = write_only.then(|| bpf::by_id(info.id, bpf::READ_ONLY)).transpose()?;
        let map = own.as_ref().map_or(fd.file.as_fd(), AsFd::as_fd);
        out.bpfmaps.write(map, &entry).during(|| format!("BPF map {}", info.id))?;
        Ok(pb::FileEntry {
            r#type: FdType::Bpfmap as i32,
            id: id.0,
            bpf: Some(entry.into()),
            ..Default::default()
        })
    }

    fn collect(&self, entry: &pb::FileEntry, plan: &mut PlanFiles<'_>) -> Result<Box<dyn RestoredFile>> {
        let entry = entry.bpf.as_deref();
        let entry = entry.ok_or_else(|| Error::image("files.img: a BPF map entry without bpf"))?;
        let map = plan.bpf_map(entry)?;
        Ok(Box::new(BpfmapFile { entry: entry.clone(), map }))
    }
}

fn parse(info: &FdInfo) -> Option<pb::BpfmapFileEntry> {
    let number = |label| procfs::number(info.value(label)?);
    let hex = |label| {
        let text = std::str::from_utf8(info.value(label)?).ok()?;
        u64::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16).ok()
    };
    Some(pb::BpfmapFileEntry {
        map_type: number("map_type")?,
        key_size: number("key_size")?,
        value_size: number("value_size")?,
        max_entries: number("max_entries")?,
        map_flags: u32::try_from(hex("map_flags")?).ok()?,
        // Linux 5.16 and newer.
        map_extra: hex("map_extra"),
        memlock: procfs::number(info.value("memlock")?)?,
        // Linux 5.2 and newer.
        frozen: info.value("frozen").is_some_and(|frozen| frozen != b"0"),
        ..Default::default()
    })
}

/// A descriptor of a map to be restored.
#[derive(Debug)]
struct BpfmapFile {
    entry: pb::BpfmapFileEntry,
    map: Arc<Map>,
}

impl RestoredFile for BpfmapFile {
    fn name(&self) -> String {
        format!("BPF map {} {}", self.entry.map_id, self.entry.map_name)
    }

    fn fown(&self) -> Option<&pb::FownEntry> {
        Some(&self.entry.fown)
    }

    fn is_given(&self, _: &RestoreOptions) -> bool {
        true
    }

    fn give(&self, _: Option<OwnedFd>) -> Result<OwnedFd> {
        let access = match self.entry.flags.cast_signed() & libc::O_ACCMODE {
            libc::O_RDONLY => bpf::READ_ONLY,
            libc::O_WRONLY => bpf::WRITE_ONLY,
            _ => 0,
        };
        self.map.open(access).map_err(|e| match e.errno() {
            Some(libc::EPERM) => e.remedy("restore with CAP_BPF and CAP_SYS_ADMIN"),
            _ => e,
        })
    }

    fn open(&self, cx: &mut FilesTask<'_>) -> Result<OwnedFd> {
        let made = cx.given(FileId(self.entry.id))?;
        let made = made.ok_or_else(|| Error::bug("a BPF map that nobody made"))?;
        pipe::set_flags(&made, self.entry.flags.cast_signed())?;
        Ok(made)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        files::roundtrip::{FREE, Trip, at, get, same},
        sys::bpf::Shape,
    };

    fn shape(kind: u32, value: u32, entries: u32, flags: u32, name: &str) -> Shape<'_> {
        Shape { kind, key: 4, value, entries, flags, name, ifindex: 0, extra: 0 }
    }

    fn value(map: BorrowedFd<'_>, size: usize, key: u32) -> Option<Vec<u8>> {
        bpf::lookup(map, Sizes { key: 4, value: size }, &key.to_ne_bytes()).unwrap()
    }

    fn here() -> bool {
        match bpf::create(&shape(1, 8, 1, 0, "try")) {
            Ok(_) => true,
            Err(e) => {
                eprintln!("skipped: no BPF map can be made: {e}");
                false
            }
        }
    }

    #[test]
    fn maps_come_back_with_what_is_in_them() {
        if !here() {
            return;
        }
        Trip::new(
            concat!(module_path!(), "::maps_come_back_with_what_is_in_them"),
            |_| {
                let hash = bpf::create(&shape(1, 8, 10_000, 1, "hash")).unwrap();
                for key in 0..9_999u32 {
                    let value = (u64::from(key) << 32 | 7).to_ne_bytes();
                    bpf::update(hash.as_fd(), Sizes { key: 4, value: 8 }, &key.to_ne_bytes(), &value)
                        .unwrap();
                }
                let reading = bpf::by_id(bpf::info(hash.as_fd()).unwrap().id, bpf::READ_ONLY).unwrap();
                at(hash.try_clone().unwrap(), FREE, false);
                at(hash, FREE + 1, false);
                at(reading, FREE + 2, false);
                let array = bpf::create(&shape(2, 12, 3, 0, "array")).unwrap();
                let (keys, values) =
                    ([0u32, 1, 2].map(u32::to_ne_bytes).concat(), (0..36).collect::<Vec<u8>>());
                bpf::update(array.as_fd(), Sizes { key: 4, value: 12 }, &keys, &values).unwrap();
                bpf::freeze(array.as_fd()).unwrap();
                at(array, FREE + 3, false);
            },
            |_| {
                let hash = get(FREE);
                assert!(same(FREE, FREE + 1) && !same(FREE, FREE + 2));
                let info = bpf::info(hash).unwrap();
                assert_eq!(info.name, "hash");
                assert_eq!(bpf::info(get(FREE + 2)).unwrap().id, info.id);
                for key in [0, 1, 4_711, 9_998] {
                    assert_eq!(value(hash, 8, key), Some((u64::from(key) << 32 | 7).to_ne_bytes().to_vec()));
                }
                assert_eq!(value(get(FREE + 2), 8, 9_999), None);
                let sizes = Sizes { key: 4, value: 8 };
                assert_eq!(elements(hash, sizes, 10_000).unwrap().keys.len(), 4 * 9_999);
                let refused = bpf::update(get(FREE + 2), sizes, &[0; 4], &[0; 8]);
                assert_eq!(refused.unwrap_err().errno(), Some(libc::EPERM));
                bpf::update(hash, sizes, &9_999u32.to_ne_bytes(), &[1; 8]).unwrap();
                assert_eq!(value(get(FREE + 2), 8, 9_999), Some(vec![1; 8]));
                let array = get(FREE + 3);
                assert_eq!(value(array, 12, 2), Some((24..36).collect()));
                let refused = bpf::update(array, Sizes { key: 4, value: 12 }, &[0; 4], &[0; 12]);
                assert_eq!(refused.unwrap_err().errno(), Some(libc::EPERM));
            },
        )
        .run();
    }

    #[test]
    fn other_types_are_refused_by_name() {
        if !here() {
            return;
        }
        let trip = Trip::new(
            concat!(module_path!(), "::other_types_are_refused_by_name"),
            |_| at(bpf::create(&shape(5, 8, 4, 0, "each")).unwrap(), FREE, false),
            |_| (),
        );
        if let Some(said) = trip.refusal() {
            assert!(said.contains("a BPF map of type 5"), "{said}");
        }
    }
}
