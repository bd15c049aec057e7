//! Shared memory with its content, `ipcns-shm-ID.img`.
//!
//! Content is in `pagemap-shmem-SEGMENT` as for other shared memory. The kernel gives segments and inodes of such
//! memory numbers of their own, so both may have the same one: then the segment's content is inline, behind its entry.
//! That is also how older images have it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, Write},
    os::unix::fs::FileExt,
};

use nix::sys::statfs::fstatfs;
use rcriu_images::{
    ImageDir, ImageKind,
    dir::ImageWriter,
    packed::is_zero,
    pagemap::{PAGE_SIZE, PageReader},
    pb,
};

use super::{DumpIpc, Numbers, Owners, desc, made, var};
use crate::{
    error::{Context, Error, Result, SysContext},
    mm::{hugetlb, shmem, stored::stored},
    sys::{
        map::Region,
        sysv::{
            self, Perm, Segment,
            shm::{self, Attached},
        },
    },
};

/// `SHM_HUGETLB`.
const HUGETLB: u32 = 0o4000;
/// Bytes read at once.
const STEP: u64 = 1 << 20;

/// How often tasks of the tree have each segment attached.
pub type Attachments = BTreeMap<i32, u64>;

fn name(id: u32) -> String {
    format!("System V shared memory {id}")
}

/// Writes all segments. `forced` says that one without users goes when it is detached. Gives the numbers of those whose
/// content is in images of its own.
pub(super) fn dump(cx: &DumpIpc<'_>, forced: bool) -> Result<BTreeSet<u64>> {
    let mut out = cx.images.writer(ImageKind::IpcnsShm, cx.id.into());
    let (all, mut numbers) = (shm::all()?, BTreeSet::new());
    // Who leaves a namespace keeps what it has attached there, and the kernel does not tell of where it is.
    if let Some(id) = cx.attached.iter().flat_map(|attached| attached.keys()).find(|id| !all.contains(id)) {
        return Err(elsewhere()).during(|| name(id.cast_unsigned()));
    }
    for id in all {
        segment(cx, id, forced, &mut out).during(|| name(id.cast_unsigned()))?;
        numbers.extend(Some(u64::from(id.cast_unsigned())).filter(|number| !cx.taken.contains(number)));
    }
    out.finish()?;
    Ok(numbers)
}

fn segment(cx: &DumpIpc<'_>, id: i32, forced: bool, out: &mut ImageWriter) -> Result<()> {
    let found = shm::stat(id)?.ok_or_else(|| Error::host("it is gone"))?;
    let inside = cx.attached.map_or(found.attached, |all| all.get(&id).copied().unwrap_or(0));
    if found.attached > inside {
        let outside = found.attached - inside;
        return Err(Error::unsupported(format!("it is also attached {outside} times outside of the tree"))
            .remedy("dump the tree that holds all who use it, each in its ipc namespace"));
    }
    if found.attached < inside {
        return Err(elsewhere());
    }
    let kept = (forced && found.attached == 0).then(var::Unforced::new).transpose()?;
    write(cx, id, &found, out)?;
    kept.map_or(Ok(()), var::Unforced::end)
}

fn elsewhere() -> Error {
    Error::unsupported(
        "a task has one of this number attached that is of another ipc namespace than the task's",
    )
    .remedy("detach it before the dump (shmdt), or leave the namespace before attaching")
}

fn write(cx: &DumpIpc<'_>, id: i32, found: &Segment, out: &mut ImageWriter) -> Result<()> {
    let &Segment { key, mode, uid, gid, cuid, cgid, size, .. } = found;
    let perm = Perm { key, uid, gid, cuid, cgid, mode };
    let attached = Attached::new(id, size, PAGE_SIZE, true)?;
    let file = attached.file()?;
    let huge = hugetlb::page_size(&fstatfs(&file).call("fstatfs")?);
    let number = u64::from(id.cast_unsigned());
    let inline = cx.taken.contains(&number);
    let entry = pb::IpcShmEntry {
        desc: desc(cx, id, &perm)?,
        size,
        in_pagemaps: (!inline).then_some(true),
        hugetlb_flag: huge.map(|size| HUGETLB | hugetlb::size_bits(size)),
    };
    let whole = size - size % PAGE_SIZE;
    let tail = tail(attached.region(), size)?;
    let end = size.next_multiple_of(PAGE_SIZE);
    check_zero(&file, end).during(|| "behind its end".to_owned())?;
    out.write(&entry)?;
    if inline {
        if !is_zero(tail.get((size - whole) as usize..).unwrap_or_default()) {
            return Err(Error::unsupported(
                "its last page is used behind its end, and images have no room for that",
            )
            .remedy("make it some bytes longer"));
        }
        copy(&file, size, out)?;
    } else {
        shmem::dump_with_tail(cx.store, &file, number, whole, &tail)?;
    }
    attached.detach()
}

/// The last page of a segment that ends inside of it: programs may use all of that page, a read ends earlier.
fn tail(region: &Region, size: u64) -> Result<Vec<u8>> {
    let whole = size - size % PAGE_SIZE;
    let mut page = vec![0; (region.len() - whole) as usize];
    if !page.is_empty() {
        region.read(region.start() + whole, &mut page)?;
    }
    Ok(page)
}

/// A segment in huge pages is longer than it was asked for; images end where it should.
fn check_zero(file: &File, from: u64) -> Result<()> {
    let end = file.metadata().call("fstat")?.len();
    pieces(file, from, end, |bytes| match is_zero(bytes) {
        true => Ok(()),
        false => Err(Error::unsupported("its last huge page is used, and images have no room for that")
            .remedy("make it a multiple of the huge page long")),
    })
}

/// Appends the first `size` bytes, and what comes before the next entry.
fn copy(file: &File, size: u64, out: &mut ImageWriter) -> Result<()> {
    pieces(file, 0, size, |bytes| Ok(out.write_raw(bytes)?))?;
    let padding = size.next_multiple_of(4) - size;
    Ok(out.write_raw(&[0; 4][..padding as usize])?)
}

fn pieces(file: &File, mut at: u64, end: u64, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let mut buf = vec![0; STEP.min(end.saturating_sub(at)) as usize];
    while at < end {
        crate::interrupt::check()?;
        let part = &mut buf[..STEP.min(end - at) as usize];
        file.read_exact_at(part, at).call("pread")?;
        take(part)?;
        at += part.len() as u64;
    }
    Ok(())
}

/// Size of the pages of a segment.
fn page_size(entry: &pb::IpcShmEntry) -> u64 {
    entry.hugetlb_flag.and_then(hugetlb::said_size).unwrap_or(PAGE_SIZE).max(PAGE_SIZE)
}

/// Reads and checks all entries; content stays where it is.
pub(super) fn read(images: &ImageDir, id: u32) -> Result<Vec<pb::IpcShmEntry>> {
    let Some(mut reader) = images.reader(ImageKind::IpcnsShm, id.into())? else { return Ok(Vec::new()) };
    let (mut segments, mut numbers) = (Vec::new(), Numbers::default());
    while let Some(entry) = reader.next::<pb::IpcShmEntry>()? {
        reader.ipc_shm(&entry, &mut io::sink())?;
        let named = || name(entry.desc.id);
        numbers
            .take(&entry.desc)
            .and_then(|()| check(&entry))
            .during(named)
            .during(|| reader.image().to_owned())?;
        if entry.in_pagemaps() {
            content(images, &entry).during(named)?;
        }
        segments.push(entry);
    }
    Ok(segments)
}

fn check(entry: &pb::IpcShmEntry) -> Result<()> {
    // Half of what addresses say.
    if !(1..1 << 62).contains(&entry.size) {
        return Err(Error::image(format!("no segment has {} bytes", entry.size)));
    }
    let flags = entry.hugetlb_flag.unwrap_or(0);
    if flags & !(HUGETLB | hugetlb::SIZE_MASK) != 0 || page_size(entry) > 1 << 34 {
        return Err(Error::image(format!("no huge pages are {flags:#x}")));
    }
    Ok(())
}

/// The pages of a segment.
fn content(images: &ImageDir, entry: &pb::IpcShmEntry) -> Result<PageReader> {
    let pages = PageReader::open(images, ImageKind::ShmemPagemap, entry.desc.id.into())?
        .ok_or_else(|| Error::image("its content is missing"))?;
    let end = entry.size.next_multiple_of(page_size(entry));
    if pages.pagemap(0).and_then(|map| map.regions.last()).is_some_and(|last| last.end() > end) {
        return Err(Error::image("there are pages behind its end"));
    }
    Ok(pages)
}

pub(super) fn restore(ipc: &super::Ipc, images: &ImageDir, owners: &Owners<'_>) -> Result<()> {
    if ipc.segments.is_empty() {
        return Ok(());
    }
    let mut reader = images.require(ImageKind::IpcnsShm, ipc.id.into())?;
    for entry in &ipc.segments {
        let mut make = || {
            if reader.one::<pb::IpcShmEntry>()? != *entry {
                return Err(Error::image("its image was changed meanwhile"));
            }
            let region = create(entry, owners)?;
            if entry.in_pagemaps() {
                fill(region.region(), entry, images)?;
            } else {
                reader.ipc_shm(entry, &mut Into { region: region.region(), at: 0 })?;
            }
            region.detach()
        };
        make().during(|| name(entry.desc.id))?;
    }
    Ok(())
}

/// Makes a segment, and attaches it.
fn create(entry: &pb::IpcShmEntry, owners: &Owners<'_>) -> Result<Attached> {
    let (perm, id) = (owners.perm(&entry.desc)?, entry.desc.id.cast_signed());
    let flags = entry.hugetlb_flag.map_or(0, |flag| flag | HUGETLB);
    // Huge pages are for those who may lock memory: the creator may have been of their group.
    let creator = if flags == 0 { perm } else { Perm { cuid: super::UNMAPPED, ..perm } };
    let made = made(&entry.desc, &creator, var::SHM_NEXT, || shm::create_any(&perm, entry.size, flags));
    made.map_err(|e| match e.errno() {
        Some(libc::ENOMEM) if flags != 0 => e.remedy("reserve more huge pages: vm.nr_hugepages"),
        _ => e,
    })?;
    sysv::set_owner(id, perm.uid, perm.gid, perm.mode)?;
    Attached::new(id, entry.size, page_size(entry), false)
}

fn fill(region: &Region, entry: &pb::IpcShmEntry, images: &ImageDir) -> Result<()> {
    let pages = content(images, entry)?;
    for run in pages.runs(0, region.len()) {
        crate::interrupt::check()?;
        // It is new: what is absent is zero.
        if let Some(content) = stored(&pages, &run)? {
            content.read_into(region, 0, region.start() + run.vaddr, run.len)?;
        }
    }
    Ok(())
}

/// Writes to a region from its beginning.
struct Into<'a> {
    region: &'a Region,
    at: u64,
}

impl Write for Into<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.region.write(self.region.start() + self.at, bytes);
        written.map_err(|e| io::Error::from_raw_os_error(e.errno().unwrap_or(libc::EFAULT)))?;
        self.at += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What may be done only when all users have attached theirs.
pub(super) fn attached(segments: &[pb::IpcShmEntry]) -> Result<()> {
    for desc in segments.iter().map(|e| &e.desc) {
        let id = desc.id.cast_signed();
        if desc.mode & sysv::LOCKED != 0 {
            sysv::lock(id).during(|| name(desc.id))?;
        }
        if desc.mode & sysv::DEST != 0 {
            sysv::remove(id).during(|| name(desc.id))?;
        }
    }
    Ok(())
}
