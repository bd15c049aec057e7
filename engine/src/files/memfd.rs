//! memfd: memory that is a file.
//!
//! Images have an entry per open file, one per inode in `memfd.img`, and the content as that of shared memory
//! (`pagemap-shmem-N.img`, N being the inode's number when dumped). Other files of the kernel's own tmpfs that
//! are mapped (shared memory made by mapping /dev/zero) travel the same way.
//!
//! Inodes are made and filled by the engine before it forks: mappings need them earlier than descriptors do.

mod huge;
mod inodes;

use std::{
    collections::{HashMap, HashSet},
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl, open},
    sys::{
        stat::{Mode, SFlag},
        statfs::HUGETLBFS_MAGIC,
    },
    unistd::{Whence, lseek},
};
use rcriu_images::{ImageDir, ImageKind, ImageWriter, pb};

use super::{
    DrainedFd, FdProbe, FdType, FileKind, FilesOut, FilesTask, OpenHow, PlanFiles, RestoredFile, pipe,
};
use crate::{
    error::{Error, Result, SysContext},
    mm::{hugetlb, shmem},
    pstree::FileId,
};

pub(super) use inodes::{Made, Memfds};

/// What /proc puts before a memfd's name.
const PREFIX: &[u8] = b"/memfd:";

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
        uid: out.users.user(stat.st_uid),
        gid: out.users.group(stat.st_gid),
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

    use nix::{
        fcntl::SealFlag,
        sys::memfd::{MFdFlags, memfd_create},
    };

    use super::*;
    use crate::files::roundtrip::{FREE, Trip, at, get, link, pos_and_flags, same};
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
