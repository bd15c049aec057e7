//! Bringing files without a name back, in the engine, before the first fork.

use std::{
    collections::{BTreeMap, HashMap, btree_map::Entry},
    fs::File,
    os::fd::{AsRawFd, OwnedFd},
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, OFlag, openat},
    sys::{
        stat::{Mode, SFlag, UtimensatFlags, mkdirat, mknod, utimensat},
        time::TimeSpec,
    },
    unistd::{Gid, LinkatFlags, Uid, UnlinkatFlags, fchownat, linkat, symlinkat, unlinkat},
};
use rcriu_images::{ImageDir, ImageKind, ImageReader, pb};

use super::{moment::Writable, parent};
use crate::{
    error::{Context, Error, Result, SysContext},
    files::{Path, Roots},
    pstree::{FileId, VirtPid},
};

/// Marks ghosts in sets written before `remap_type` existed.
const OLD_GHOST: u32 = 1 << 31;

/// Where the inode of a file entry really is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Remap {
    /// In `ghost-file-N.img`.
    Ghost(u32),
    /// Under the name of another entry.
    Linked(FileId),
    /// Below /proc of a task that is gone.
    DeadProcess(VirtPid),
}

/// All of `remap-fpath.img`.
#[derive(Debug, Default)]
pub(crate) struct Remaps {
    remaps: HashMap<FileId, Remap>,
    /// Entries of ghosts, by device (in the kernel's numbering) and inode of the lost file.
    inodes: HashMap<(u32, u64), FileId>,
}

impl Remaps {
    pub(crate) fn read(images: &ImageDir) -> Result<Remaps> {
        let (mut remaps, mut ghosts) = (HashMap::new(), HashMap::new());
        for entry in images.read_all::<pb::RemapFilePathEntry>(ImageKind::RemapFpath, 0)? {
            let remap = match entry.remap_type.map(pb::RemapType::try_from) {
                Some(Ok(pb::RemapType::Ghost)) => Remap::Ghost(entry.remap_id),
                Some(Ok(pb::RemapType::Linked)) => Remap::Linked(FileId(entry.remap_id)),
                Some(Ok(pb::RemapType::Procfs)) => {
                    let pid = i32::try_from(entry.remap_id).ok().filter(|pid| *pid > 0);
                    Remap::DeadProcess(VirtPid(pid.ok_or_else(|| {
                        Error::image(format!("remap-fpath.img: {} is no pid", entry.remap_id))
                    })?))
                }
                Some(Err(_)) => {
                    return Err(Error::image(format!(
                        "remap-fpath.img: unknown remap type {:?} of file {:#x}",
                        entry.remap_type, entry.orig_id
                    )));
                }
                None if entry.remap_id & OLD_GHOST != 0 => Remap::Ghost(entry.remap_id & !OLD_GHOST),
                None => Remap::Linked(FileId(entry.remap_id)),
            };
            if let Remap::Ghost(ghost) = remap {
                let (_, entry_of) = open_ghost(images, ghost)?;
                if let (Some(dev), Some(ino)) = (entry_of.dev, entry_of.ino) {
                    ghosts.entry((dev, ino)).or_insert(FileId(entry.orig_id));
                }
            }
            remaps.insert(FileId(entry.orig_id), remap);
        }
        Ok(Remaps { remaps, inodes: ghosts })
    }

    pub(crate) fn of(&self, id: FileId) -> Option<&Remap> {
        self.remaps.get(&id)
    }

    /// The entry of the ghost that this inode became.
    pub(crate) fn of_inode(&self, dev: u32, ino: u64) -> Option<FileId> {
        self.inodes.get(&(dev, ino)).copied()
    }

    /// Tasks that must exist, if only as helpers, because files below their /proc folder are open.
    pub(crate) fn dead_processes(&self) -> impl Iterator<Item = VirtPid> {
        self.remaps.values().filter_map(|remap| match remap {
            Remap::DeadProcess(pid) => Some(*pid),
            _ => None,
        })
    }
}

/// A file to bring back: the name it had when it was opened.
#[derive(Debug)]
pub struct Lost<'a> {
    /// The entry.
    pub id: FileId,
    /// Its old name, and the mount it was on.
    pub path: Path<'a>,
    /// How it was open.
    pub flags: i32,
}

/// Where its content comes from.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Source<'a> {
    /// Number of a ghost image.
    Ghost(u32),
    /// A name that still leads to the inode, and the mount it is on.
    Link(Path<'a>),
}

/// Makes the inode of `source` once, and a handle for each of `files`, which were opened by names of it.
///
/// Names exist only while this runs. Handles are O_PATH; opening `/proc/self/fd/N` opens the inode, and links
/// in /proc show the name the file had.
///
/// Precondition: the process has a single thread.
pub(crate) fn bring_back(
    images: &ImageDir,
    source: &Source<'_>,
    files: &[Lost<'_>],
    roots: &Roots,
) -> Result<Vec<(FileId, OwnedFd)>> {
    let known = match source {
        Source::Ghost(_) => None,
        Source::Link(path) => Some(*path),
    };
    let all: Vec<Path<'_>> = known.into_iter().chain(files.iter().map(|file| file.path)).collect();
    let (root, mut made_as, read_only) = roots.together(&all);
    let first = known.map(|_| made_as.remove(0));
    let moment = match read_only {
        Some(place) => Writable::begin(root, place)?,
        None => None,
    };
    let handles = root.within(|| bring_back_as(images, (source, first), files, &made_as, roots))?;
    moment.map_or(Ok(()), Writable::end)?;
    Ok(handles)
}

/// The same, with the names that are to be made in the namespace that this process is at the root of.
fn bring_back_as(
    images: &ImageDir,
    (source, mut first): (&Source<'_>, Option<Vec<u8>>),
    files: &[Lost<'_>],
    made_as: &[Vec<u8>],
    roots: &Roots,
) -> Result<Vec<(FileId, OwnedFd)>> {
    let mut names: BTreeMap<&[u8], Name> = BTreeMap::new();
    let mut handles = Vec::new();
    for (file, made_as) in files.iter().zip(made_as) {
        let (mount, path) = file.path;
        let text = || format!("file {} {}", file.id, path.escape_ascii());
        let name = match names.entry(made_as) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => {
                let name = Name::new(made_as, |path| match (&first, source) {
                    (Some(from), _) => {
                        linkat(AT_FDCWD, from.as_slice(), AT_FDCWD, path, LinkatFlags::empty()).map(|()| None)
                    }
                    (None, Source::Ghost(ghost)) => make(images, *ghost, path),
                    (None, Source::Link(_)) => Err(Errno::ENOENT),
                });
                let name = name.during(text)?;
                first.get_or_insert_with(|| name.path.clone());
                new.insert(name)
            }
        };
        // A symbolic link itself can only be held the way it was held.
        let flags = OFlag::from_bits_retain(file.flags & libc::O_NOFOLLOW) | OFlag::O_PATH | OFlag::O_CLOEXEC;
        let beside = name.path.get(made_as.len()..).unwrap_or_default();
        let path = [path, beside].concat();
        let handle = roots.of_mount(mount).open(&path, flags).call("open").during(text)?;
        handles.push((file.id, handle));
    }
    // Content and times last: linking changes times. By a name that was made: files may be on mounts that are read-only.
    if let (Source::Ghost(ghost), Some(name)) = (source, names.values().next()) {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let made = openat(AT_FDCWD, name.path.as_slice(), flags, Mode::empty()).call("open")?;
        fill(images, *ghost, &made).during(|| ImageKind::GhostFile.file_name(u64::from(*ghost)))?;
    }
    names.into_values().rev().try_for_each(Name::remove)?;
    Ok(handles)
}

fn open_ghost(images: &ImageDir, ghost: u32) -> Result<(ImageReader, pb::GhostFileEntry)> {
    let mut image = images.require(ImageKind::GhostFile, u64::from(ghost))?;
    let entry = image.one()?;
    Ok((image, entry))
}

/// A name that exists for a moment, with folders that had to be made for it. Removed when dropped.
#[derive(Debug)]
struct Name {
    path: Vec<u8>,
    folders: Vec<Vec<u8>>,
    is_dir: bool,
    gone: bool,
}

impl Name {
    /// Makes the name, or one beside it if somebody else has taken it since, and the folders above it.
    fn new(
        wanted: &[u8],
        mut make: impl FnMut(&[u8]) -> std::result::Result<Option<SFlag>, Errno>,
    ) -> Result<Name> {
        let mut name = Name { path: wanted.to_vec(), folders: Vec::new(), is_dir: false, gone: true };
        let mut taken = 0u32;
        loop {
            match make(&name.path) {
                Ok(kind) => {
                    name.is_dir = kind == Some(SFlag::S_IFDIR);
                    name.gone = false;
                    return Ok(name);
                }
                Err(Errno::ENOENT) if name.folders.is_empty() => name.make_folders()?,
                Err(Errno::EEXIST) if taken < 1000 => {
                    name.path = wanted.to_vec();
                    name.path.extend_from_slice(b".cr_link");
                    if taken > 0 {
                        name.path.extend_from_slice(taken.to_string().as_bytes());
                    }
                    taken += 1;
                }
                Err(e) => return Err(Error::sys("making it under its old name", e as i32)),
            }
        }
    }

    fn make_folders(&mut self) -> Result<()> {
        let mut missing = Vec::new();
        let mut folder = parent(&self.path);
        while !folder.is_empty() {
            match nix::sys::stat::lstat(folder) {
                Ok(_) => break,
                Err(Errno::ENOENT) => missing.push(folder.to_vec()),
                Err(e) => return Err(Error::sys("stat", e as i32).during(folder.escape_ascii().to_string())),
            }
            folder = parent(folder);
        }
        if missing.is_empty() {
            return Err(Error::sys("making it under its old name", libc::ENOENT));
        }
        for folder in missing.into_iter().rev() {
            mkdirat(AT_FDCWD, folder.as_slice(), Mode::from_bits_truncate(0o755))
                .call("mkdir")
                .during(|| folder.escape_ascii().to_string())?;
            self.folders.push(folder);
        }
        Ok(())
    }

    fn remove(mut self) -> Result<()> {
        self.remove_now()
    }

    fn remove_now(&mut self) -> Result<()> {
        if !std::mem::replace(&mut self.gone, true) {
            let how = if self.is_dir { UnlinkatFlags::RemoveDir } else { UnlinkatFlags::NoRemoveDir };
            unlinkat(AT_FDCWD, self.path.as_slice(), how)
                .call("unlink")
                .during(|| self.path.escape_ascii().to_string())?;
        }
        while let Some(folder) = self.folders.pop() {
            match unlinkat(AT_FDCWD, folder.as_slice(), UnlinkatFlags::RemoveDir) {
                // Another lost file was made below it and goes in its turn, or somebody uses it by now.
                Ok(()) | Err(Errno::ENOTEMPTY | Errno::ENOENT) => {}
                Err(e) => return Err(Error::sys("rmdir", e as i32).during(folder.escape_ascii().to_string())),
            }
        }
        Ok(())
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        if let Err(e) = self.remove_now() {
            log::error!("{e}");
        }
    }
}

/// Makes an empty inode of the ghost's type.
fn make(images: &ImageDir, ghost: u32, path: &[u8]) -> std::result::Result<Option<SFlag>, Errno> {
    // The image was read at preflight; what goes wrong here is reported by `fill`.
    let Ok((_, entry)) = open_ghost(images, ghost) else { return Err(Errno::EIO) };
    let kind = SFlag::from_bits_truncate(entry.mode & libc::S_IFMT);
    let mode = Mode::from_bits_truncate(0o600);
    match kind {
        SFlag::S_IFDIR => mkdirat(AT_FDCWD, path, Mode::from_bits_truncate(0o700))?,
        SFlag::S_IFLNK => symlinkat(entry.symlnk_target(), AT_FDCWD, path)?,
        SFlag::S_IFIFO => mknod(path, kind, mode, 0)?,
        SFlag::S_IFCHR | SFlag::S_IFBLK => mknod(path, kind, mode, u64::from(entry.rdev()))?,
        SFlag::S_IFREG => {
            let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_RDWR | OFlag::O_CLOEXEC;
            openat(AT_FDCWD, path, flags, mode)?;
        }
        _ => return Err(Errno::EINVAL),
    }
    Ok(Some(kind))
}

/// Content, owner, permissions and times.
fn fill(images: &ImageDir, ghost: u32, handle: &OwnedFd) -> Result<()> {
    let (mut image, entry) = open_ghost(images, ghost)?;
    if entry.mode & libc::S_IFMT == libc::S_IFREG {
        let mut file = File::options()
            .write(true)
            .open(format!("/proc/self/fd/{}", handle.as_raw_fd()))
            .call("open(/proc/self/fd)")?;
        if entry.chunks() {
            let size = entry.size.ok_or_else(|| image.bad("a ghost in chunks without a size"))?;
            fill_chunks(&mut image, &mut file, size)?;
        } else if let Some(left) = image.left() {
            image.copy_payload(left, &mut file)?;
        } else {
            let all = image.rest(CHUNKLESS_MOST)?;
            std::io::Write::write_all(&mut file, &all).call("write")?;
        }
    }
    let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
    fchownat(handle, "", Some(uid), Some(gid), AtFlags::AT_EMPTY_PATH).call("fchownat")?;
    let path = format!("/proc/self/fd/{}", handle.as_raw_fd());
    if entry.mode & libc::S_IFMT != libc::S_IFLNK {
        let mode = Mode::from_bits_truncate(entry.mode & 0o7777);
        nix::sys::stat::fchmodat(AT_FDCWD, path.as_str(), mode, nix::sys::stat::FchmodatFlags::FollowSymlink)
            .call("fchmodat")?;
        if let (Some(atim), Some(mtim)) = (entry.atim, entry.mtim) {
            let time = |t: pb::Timeval| {
                TimeSpec::from_duration(Duration::from_secs(t.tv_sec) + Duration::from_micros(t.tv_usec))
            };
            utimensat(AT_FDCWD, path.as_str(), &time(atim), &time(mtim), UtimensatFlags::FollowSymlink)
                .call("utimensat")?;
        }
    }
    Ok(())
}

/// Largest content of a ghost that is not in chunks, where the length of the image is not known.
const CHUNKLESS_MOST: u64 = 64 << 20;

fn fill_chunks(image: &mut ImageReader, file: &mut File, size: u64) -> Result<()> {
    use std::io::{Seek, SeekFrom};
    file.set_len(size).call("ftruncate")?;
    while let Some(chunk) = image.next::<pb::GhostChunkEntry>()? {
        crate::interrupt::check()?;
        if chunk.off.checked_add(chunk.len).is_none_or(|end| end > size) {
            return Err(image
                .bad(format!("a chunk of {} at {} in {size} bytes", chunk.len, chunk.off))
                .into());
        }
        file.seek(SeekFrom::Start(chunk.off)).call("lseek")?;
        image.copy_payload(chunk.len, file)?;
    }
    Ok(())
}

/// Whether the image of a ghost is there and sound, before anything is made of it.
pub(crate) fn check(images: &ImageDir, ghost: u32) -> Result<()> {
    let (_, entry) = open_ghost(images, ghost)?;
    match entry.mode & libc::S_IFMT {
        libc::S_IFREG | libc::S_IFDIR | libc::S_IFLNK | libc::S_IFIFO | libc::S_IFCHR | libc::S_IFBLK => {
            Ok(())
        }
        kind => Err(Error::image(format!("ghost-file-{ghost:x}.img: there are no files of type {kind:o}"))),
    }
}
