//! memfd: memory that is a file.
//!
//! Images have an entry per open file, one per inode in `memfd.img`, and the content as that of shared memory
//! (`pagemap-shmem-N.img`, N being the inode's number when dumped). Other files of the kernel's own tmpfs that
//! are mapped (shared memory made by mapping /dev/zero) travel the same way.
//!
//! Inodes are made and filled by the engine before it forks: mappings need them earlier than descriptors do.

mod huge;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    ffi::CString,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::FileExt,
    },
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, SealFlag, fcntl, open},
    sys::{
        memfd::{MFdFlags, memfd_create},
        stat::{Mode, SFlag, fchmod},
        statfs::HUGETLBFS_MAGIC,
    },
    unistd::{Gid, Uid, Whence, fchown, lseek},
};
use rcriu_images::{ImageDir, ImageKind, ImageWriter, pagemap::PageReader, pb};

use super::{
    DrainedFd, FdProbe, FdType, FileKind, FilesOut, FilesTask, OpenHow, PlanFiles, RestoredFile, Zone, pipe,
};
use crate::{
    error::{Context, Error, Result, SysContext},
    mm::{hugetlb, shmem, stored::stored},
    pstree::FileId,
    sys::shared::anonymous_file,
};

/// What /proc puts before a memfd's name.
const PREFIX: &[u8] = b"/memfd:";
/// What /proc calls shared anonymous memory, less ` (deleted)`.
const SHARED_ANONYMOUS: &[u8] = b"/dev/zero";
/// `F_SEAL_SEAL` alone: how a memfd looks that was made without the right to seals.
const UNSEALABLE: u32 = 1;

/// The kind.
#[derive(Debug)]
pub(super) struct Memfd;

/// Whether a descriptor is one.
pub(super) fn is(fd: &FdProbe) -> bool {
    let named = fd.link.starts_with(PREFIX) || fd.link == hugetlb::ANONYMOUS;
    fd.shmem || fd.fs == HUGETLBFS_MAGIC && fd.stat.st_nlink == 0 && named
}

impl FileKind for Memfd {
    fn fd_type(&self) -> FdType {
        FdType::Memfd
    }

    fn claims(&self, fd: &FdProbe) -> bool {
        fd.file_type() == SFlag::S_IFREG && is(fd)
    }

    fn dump(&self, fd: &DrainedFd, id: FileId, out: &mut FilesOut<'_>) -> Result<pb::FileEntry> {
        dump(fd, id, out)
    }

    fn collect(&self, entry: &pb::FileEntry, plan: &mut PlanFiles<'_>) -> Result<Box<dyn RestoredFile>> {
        let entry = entry
            .memfd
            .as_deref()
            .copied()
            .ok_or_else(|| Error::image("files.img: a memfd entry without memfd"))?;
        let inode = plan.memfds()?.use_inode(&entry)?;
        Ok(Box::new(MemfdFile { entry, name: inode.name, original: inode.original }))
    }
}

/// Dumps an open file, and its inode if that is new.
pub(super) fn dump(fd: &DrainedFd, id: FileId, out: &mut FilesOut<'_>) -> Result<pb::FileEntry> {
    let inode_id = out_inode(fd, out)?;
    let info = &fd.probe.info;
    let memfd = pb::MemfdFileEntry { id: id.0, flags: info.flags, pos: info.pos, fown: fd.fown, inode_id };
    Ok(pb::FileEntry {
        r#type: FdType::Memfd as i32,
        id: id.0,
        memfd: Some(memfd.into()),
        ..Default::default()
    })
}

/// Inodes a dump has met.
#[derive(Debug)]
pub(super) struct MemfdsOut {
    image: ImageWriter,
    known: HashMap<(u64, u64), u32>,
    /// Numbers of their contents.
    shmids: HashSet<u32>,
}

impl MemfdsOut {
    pub(super) fn new(images: &ImageDir) -> Self {
        MemfdsOut {
            image: images.writer(ImageKind::MemfdInode, 0),
            known: HashMap::new(),
            shmids: HashSet::new(),
        }
    }

    pub(super) fn knows(&self, dev: u64, ino: u64) -> bool {
        self.known.contains_key(&(dev, ino))
    }

    pub(super) fn finish(self) -> Result<()> {
        Ok(self.image.finish()?)
    }
}

fn out_inode(fd: &DrainedFd, out: &mut FilesOut<'_>) -> Result<u32> {
    let (probe, stat) = (&fd.probe, &fd.probe.stat);
    if let Some(known) = out.memfds.known.get(&(stat.st_dev, stat.st_ino)) {
        return Ok(*known);
    }
    let huge = hugetlb::page_size(&nix::sys::statfs::fstatfs(&fd.file).call("fstatfs")?);
    let inode_id = out.memfds.known.len() as u32 + 1;
    let name = probe.link.strip_suffix(b" (deleted)").unwrap_or(&probe.link);
    let name = name.strip_prefix(PREFIX).unwrap_or(name);
    let file = fd.reopen_for_reading()?;
    let seals = fcntl(&file, FcntlArg::F_GET_SEALS).call("fcntl(F_GET_SEALS)")?;
    // Numbers of inodes are those of one file system; the others have the highest bit.
    let apart = if probe.shmem { 0 } else { 1 << 31 };
    let mut shmid = stat.st_ino as u32 | apart;
    while !out.memfds.shmids.insert(shmid) {
        shmid = shmid.wrapping_add(1) | apart;
    }
    let size = stat.st_size.cast_unsigned();
    log::info!("Dumping memfd:{} contents (id {inode_id:#x}, shmid: {shmid:#x})", name.escape_ascii());
    shmem::dump(&out.pages, &file, shmid.into(), size)?;
    out.memfds.image.write(&pb::MemfdInodeEntry {
        name: name.to_vec(),
        uid: stat.st_uid,
        gid: stat.st_gid,
        size,
        shmid,
        seals: seals.cast_unsigned(),
        inode_id: inode_id.into(),
        hugetlb_flag: huge.map(|size| hugetlb::size_bits(size) | hugetlb::MFD_HUGETLB),
        mode: Some(stat.st_mode),
    })?;
    out.memfds.known.insert((stat.st_dev, stat.st_ino), inode_id);
    Ok(inode_id)
}

/// Inodes of the images, those that are used.
#[derive(Debug, Default)]
pub(crate) struct Memfds {
    all: HashMap<u64, pb::MemfdInodeEntry>,
    used: BTreeMap<u64, pb::MemfdInodeEntry>,
    /// Inodes whose first open file is spoken for.
    originals: HashSet<u64>,
}

/// What an open file learns of its inode.
struct Inode {
    name: Vec<u8>,
    original: bool,
}

impl Memfds {
    pub(super) fn read(images: &ImageDir) -> Result<Memfds> {
        let inodes = images.read_all::<pb::MemfdInodeEntry>(ImageKind::MemfdInode, 0)?;
        Ok(Memfds { all: inodes.into_iter().map(|i| (i.inode_id, i)).collect(), ..Memfds::default() })
    }

    fn use_inode(&mut self, entry: &pb::MemfdFileEntry) -> Result<Inode> {
        let number = u64::from(entry.inode_id);
        let inode = self.all.get(&number).ok_or_else(|| {
            Error::image(format!("memfd.img: there is no inode {number:#x} for file {:#x}", entry.id))
        })?;
        self.used.insert(number, inode.clone());
        // The file memfd_create(2) gives can do more than one that is opened again: it can be executed.
        let writes = entry.flags.cast_signed() & libc::O_ACCMODE == libc::O_RDWR;
        let original = writes && self.originals.insert(number);
        Ok(Inode { name: inode.name.clone(), original })
    }

    pub(super) fn len(&self) -> usize {
        self.used.len()
    }
}

/// Inodes made, with the seals that are still to be set.
#[derive(Debug, Default)]
pub(super) struct Made {
    inodes: HashMap<u32, (OwnedFd, u32)>,
}

impl Made {
    /// Makes and fills all inodes, in the engine.
    pub(super) fn new(memfds: &Memfds, images: &ImageDir, zone: Zone) -> Result<Made> {
        let mut inodes = HashMap::new();
        for (number, inode) in &memfds.used {
            let text = || format!("memfd {}", inode.name.escape_ascii());
            let made = zone.keep(make(inode, images).during(text)?)?;
            let seals = if inode.seals == UNSEALABLE { 0 } else { inode.seals };
            inodes.insert(*number as u32, (made, seals));
        }
        Ok(Made { inodes })
    }

    /// The inode as its first open file.
    pub(super) fn inode(&self, number: u32) -> Result<&OwnedFd> {
        let made = self.inodes.get(&number).map(|(made, _)| made);
        made.ok_or_else(|| Error::bug(format!("memfd inode {number} was not made")))
    }

    /// Seals what was sealed. Not before everything is mapped: seals forbid new mappings.
    pub(super) fn seal(&self) -> Result<()> {
        for (made, seals) in self.inodes.values().filter(|(_, seals)| *seals != 0) {
            let seals = SealFlag::from_bits_retain(seals.cast_signed());
            fcntl(made, FcntlArg::F_ADD_SEALS(seals)).call("fcntl(F_ADD_SEALS)")?;
        }
        Ok(())
    }
}

fn make(inode: &pb::MemfdInodeEntry, images: &ImageDir) -> Result<OwnedFd> {
    let file = create(inode)?;
    file.set_len(inode.size).call("ftruncate")?;
    match inode.hugetlb_flag {
        Some(flags) => huge::fill(&file, inode, flags, images)?,
        None => fill(&file, inode, images)?,
    }
    fchown(&file, Some(Uid::from_raw(inode.uid)), Some(Gid::from_raw(inode.gid))).call("fchown")?;
    if let Some(mode) = inode.mode {
        fchmod(&file, Mode::from_bits_truncate(mode & 0o7777)).call("fchmod")?;
    }
    Ok(file.into())
}

/// Makes the inode, still empty.
///
/// CRIU writes shared anonymous memory as a memfd that is called as the kernel calls such memory in maps. It
/// becomes what it was again, where that is allowed.
fn create(inode: &pb::MemfdInodeEntry) -> Result<std::fs::File> {
    if let Some(huge) = inode.hugetlb_flag.filter(|_| huge::is_anonymous(&inode.name) && inode.size != 0) {
        return huge::anonymous(inode.size, huge);
    }
    if inode.name == SHARED_ANONYMOUS && inode.seals == UNSEALABLE && inode.size != 0 {
        let size = usize::try_from(inode.size).ok().and_then(|s| s.checked_next_multiple_of(4096));
        let size = size.ok_or_else(|| Error::image(format!("memfd.img: a size of {:#x}", inode.size)))?;
        match anonymous_file(size) {
            Err(e) if e.errno() == Some(libc::EPERM) => {}
            other => return other,
        }
    }
    let name = CString::new(inode.name.clone()).map_err(|_| Error::image("memfd.img: a name with NUL"))?;
    let mut flags = MFdFlags::MFD_CLOEXEC;
    flags.set(MFdFlags::MFD_ALLOW_SEALING, inode.seals != UNSEALABLE);
    let flags = MFdFlags::from_bits_retain(flags.bits() | inode.hugetlb_flag.unwrap_or(0));
    Ok(memfd_create(name.as_c_str(), flags).call("memfd_create")?.into())
}

fn fill(file: &std::fs::File, inode: &pb::MemfdInodeEntry, images: &ImageDir) -> Result<()> {
    const STEP: u64 = 1 << 20;
    let Some(pages) = PageReader::open(images, ImageKind::ShmemPagemap, inode.shmid.into())? else {
        return Ok(());
    };
    let end = inode.size.next_multiple_of(4096);
    let mut buffer = vec![0; STEP.min(end) as usize];
    for run in pages.runs(0, end) {
        let Some(content) = stored(&pages, &run)? else { continue };
        // The last page may reach beyond the end of the file.
        let len = run.len.min(inode.size.saturating_sub(run.vaddr));
        let mut done = 0;
        while done < len {
            crate::interrupt::check()?;
            let part = &mut buffer[..STEP.min(len - done) as usize];
            content.read(part, done)?;
            file.write_all_at(part, run.vaddr + done).call("pwrite")?;
            done += part.len() as u64;
        }
    }
    Ok(())
}

/// An open file on a memfd, to be restored.
#[derive(Debug)]
struct MemfdFile {
    entry: pb::MemfdFileEntry,
    name: Vec<u8>,
    /// It is the file memfd_create(2) gave.
    original: bool,
}

impl MemfdFile {
    fn reopen(&self, flags: i32, cx: &FilesTask<'_>) -> Result<OwnedFd> {
        let path = format!("/proc/self/fd/{}", cx.memfd(self.entry.inode_id)?.as_raw_fd());
        open(path.as_str(), OFlag::from_bits_retain(flags) | OFlag::O_CLOEXEC, Mode::empty()).call("open")
    }
}

impl RestoredFile for MemfdFile {
    fn name(&self) -> String {
        format!("/memfd:{}", String::from_utf8_lossy(&self.name))
    }

    fn fown(&self) -> Option<&pb::FownEntry> {
        Some(&self.entry.fown)
    }

    fn open(&self, cx: &mut FilesTask<'_>) -> Result<OwnedFd> {
        if let Some(outside) = cx.inherited(|| self.name())? {
            return Ok(outside);
        }
        let flags = self.entry.flags.cast_signed();
        let file = if self.original {
            let file = cx.memfd(self.entry.inode_id)?.as_fd().try_clone_to_owned().call("dup")?;
            pipe::set_flags(&file, flags)?;
            file
        } else {
            self.reopen(flags, cx)?
        };
        if self.entry.pos != 0 {
            match lseek(&file, self.entry.pos.cast_signed(), Whence::SeekSet) {
                // O_PATH has no position.
                Ok(_) | Err(Errno::EBADF) => {}
                Err(e) => return Err(Error::sys("lseek", e as i32)),
            }
        }
        Ok(file)
    }

    fn open_again(&self, how: OpenHow, cx: &mut FilesTask<'_>) -> Option<Result<OwnedFd>> {
        Some(match cx.inherited(|| self.name()) {
            Ok(Some(outside)) => Ok(outside),
            Ok(None) => self.reopen(how.flags, cx),
            Err(e) => Err(e),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Seek, SeekFrom, Write},
        os::unix::fs::{MetadataExt, PermissionsExt},
    };

    use super::*;
    use crate::files::roundtrip::{FREE, Trip, at, get, link, pos_and_flags, same};

    #[test]
    fn shared_anonymous_memory_in_the_form_of_a_memfd_is_what_it_was() {
        let entry = |name: &[u8], seals| pb::MemfdInodeEntry {
            name: name.to_vec(),
            size: 10_000,
            seals,
            ..Default::default()
        };
        let name = |entry| {
            let made = create(&entry).unwrap();
            std::fs::read_link(format!("/proc/self/fd/{}", made.as_raw_fd())).unwrap().display().to_string()
        };
        if nix::unistd::geteuid().is_root() {
            assert_eq!(name(entry(b"/dev/zero", UNSEALABLE)), "/dev/zero (deleted)");
        }
        assert_eq!(name(entry(b"/dev/zero", 0)), "/memfd:/dev/zero (deleted)");
        assert_eq!(name(entry(b"zero", UNSEALABLE)), "/memfd:zero (deleted)");
        assert!(create(&pb::MemfdInodeEntry { size: u64::MAX, ..entry(b"/dev/zero", UNSEALABLE) }).is_err());
    }

    #[test]
    fn content_seals_and_open_files_come_back() {
        Trip::new(
            concat!(module_path!(), "::content_seals_and_open_files_come_back"),
            |_| {
                let made = memfd_create(c"some name", MFdFlags::MFD_ALLOW_SEALING).unwrap();
                let mut file = std::fs::File::from(made);
                file.write_all(b"first").unwrap();
                file.seek(SeekFrom::Start(1_000_000)).unwrap();
                file.write_all(b"last").unwrap();
                file.set_permissions(std::fs::Permissions::from_mode(0o640)).unwrap();
                let path = format!("/proc/self/fd/{}", file.as_raw_fd());
                let second = std::fs::File::open(path).unwrap();
                fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SHRINK))
                    .unwrap();
                at(file.try_clone().unwrap(), FREE, true);
                at(file, FREE + 1, false);
                at(second, FREE + 2, false);
                at(memfd_create(c"plain", MFdFlags::empty()).unwrap(), FREE + 3, false);
            },
            |_| {
                assert!(same(FREE, FREE + 1) && !same(FREE, FREE + 2));
                assert_eq!(link(FREE), "/memfd:some name (deleted)");
                let file = |n| std::fs::File::from(get(n).try_clone_to_owned().unwrap());
                let (a, b) = (file(FREE).metadata().unwrap(), file(FREE + 2).metadata().unwrap());
                assert_eq!((a.ino(), a.mode(), a.len()), (b.ino(), 0o100_640, 1_000_004));
                assert!(a.blocks() < 64, "holes were filled: {} blocks", a.blocks());
                assert_eq!(pos_and_flags(FREE + 1), (1_000_004, (libc::O_RDWR | 0o100_000) as u32));
                assert_eq!(pos_and_flags(FREE + 2), (0, 0o100_000));
                let mut bytes = vec![0; 1_000_004];
                file(FREE + 2).read_exact(&mut bytes).unwrap();
                assert_eq!((&bytes[..5], &bytes[1_000_000..]), (&b"first"[..], &b"last"[..]));
                assert!(bytes[5..1_000_000].iter().all(|b| *b == 0));
                let refused = file(FREE).write(b"x").unwrap_err();
                assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
                let seals = fcntl(get(FREE + 3), FcntlArg::F_GET_SEALS).unwrap();
                assert_eq!(seals, SealFlag::F_SEAL_SEAL.bits());
            },
        )
        .run();
    }
}
