//! Watched inodes: what inotify and fanotify have in common.
//!
//! The kernel tells the inode of a watch by device, number and file handle. A name is looked for on dump: by
//! the handle, or, where the file system has none or `--force-irmap` says so, by walking the folders that
//! programs use to watch and those of `--irmap-scan-path`.

use std::{
    collections::HashMap,
    ffi::OsStr,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{
            ffi::{OsStrExt, OsStringExt},
            fs::{DirEntryExt, MetadataExt},
        },
    },
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{OFlag, open, readlink},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::stat::{Mode, lstat, major, minor},
};
use rcriu_images::pb;

use super::{DrainedFd, FilesOut, FilesTask, Roots};
use crate::{
    error::{Error, Result, SysContext},
    options::DumpOptions,
    procfs,
    pstree::FileId,
    sys::handle,
};

/// Words of a handle in images, always as many.
pub(super) const HANDLE_WORDS: usize = 16;
/// Folders in which services watch files, the places CRIU looks in.
const KNOWN: &[&str] = &[
    "/etc",
    "/var/spool",
    "/var/log",
    "/usr/share/dbus-1/services",
    "/usr/share/dbus-1/system-services",
    "/var/lib/polkit-1/localauthority",
    "/usr/share/polkit-1/actions",
    "/lib/udev",
];

/// Whether events wait to be read.
pub(super) fn has_events(fd: &DrainedFd) -> Result<bool> {
    let mut ready = [PollFd::new(fd.file.as_fd(), PollFlags::POLLIN)];
    Ok(poll(&mut ready, PollTimeout::ZERO).call("poll")? > 0)
}

/// A line of fdinfo made of `label:value` words.
pub(super) struct Fields<'a>(&'a str);

impl<'a> Fields<'a> {
    /// `None` if the line is not text.
    pub(super) fn of(line: &'a [u8]) -> Option<Self> {
        std::str::from_utf8(line).ok().map(Fields)
    }

    fn value(&self, label: &str) -> Option<&'a str> {
        let found = |word: &&str| word.strip_prefix(label).is_some_and(|rest| rest.starts_with(':'));
        self.0.split_whitespace().find(found).map(|word| &word[label.len() + 1..])
    }

    /// A number in hexadecimal digits.
    pub(super) fn hex(&self, label: &str) -> Option<u64> {
        procfs::hex(self.value(label)?.as_bytes())
    }

    /// The handle of the watched inode.
    pub(super) fn handle(&self) -> Option<pb::FhEntry> {
        let bytes = usize::try_from(self.hex("fhandle-bytes")?).ok().filter(|n| *n <= handle::MAX)?;
        let digits = self.value("f_handle")?.as_bytes();
        let mut data = [0u8; handle::MAX];
        for (to, pair) in data[..bytes].iter_mut().zip(digits.chunks(2)) {
            *to = procfs::hex(pair)? as u8;
        }
        let words = data.as_chunks::<8>().0.iter().take(HANDLE_WORDS);
        Some(pb::FhEntry {
            bytes: bytes as u32,
            r#type: self.hex("fhandle-type")? as u32,
            handle: words.map(|word| u64::from_ne_bytes(*word)).collect(),
            path: None,
            mnt_id: None,
        })
    }
}

/// The entry of a handle with a name that was found for its inode.
pub(super) fn named(
    handle: pb::FhEntry,
    name: Option<(Vec<u8>, Option<i32>)>,
    out: &FilesOut<'_>,
) -> pb::FhEntry {
    let (path, mount) = name.map_or((None, None), |(path, mount)| (Some(path), mount));
    pb::FhEntry { path, mnt_id: out.own_number(mount).map(i32::cast_unsigned), ..handle }
}

/// The bytes of a handle.
pub(super) fn handle_bytes(entry: &pb::FhEntry) -> Vec<u8> {
    let mut bytes: Vec<u8> = entry.handle.iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.resize(entry.bytes as usize, 0);
    bytes
}

/// Refuses handles longer than any kernel gives.
pub(super) fn check_handle(entry: &pb::FhEntry) -> Result<()> {
    if entry.bytes as usize > handle::MAX {
        return Err(Error::image(format!("files.img: a handle of {} bytes", entry.bytes)));
    }
    Ok(())
}

/// A device number in the form the kernel keeps it.
pub(super) fn kernel_dev(dev: u64) -> u32 {
    (major(dev) << 20 | minor(dev)) as u32
}

/// Folders through which the files of a device can be opened, found once for each device.
#[derive(Debug, Default)]
pub(super) struct Mounts {
    roots: Roots,
    known: HashMap<u32, Vec<OwnedFd>>,
}

impl Mounts {
    /// Those of the namespaces whose root folders these are.
    pub(super) fn new(roots: Roots) -> Mounts {
        Mounts { roots, known: HashMap::new() }
    }

    /// Mounts of a device in the kernel's numbering (major, 20 bits of minor).
    fn of(&mut self, dev: u32) -> Result<&[OwnedFd]> {
        use std::collections::hash_map::Entry;
        Ok(match self.known.entry(dev) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(free) => {
                let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
                let mounts = self.roots.mounts()?;
                let mounts = mounts.iter().flat_map(|(root, mounts)| mounts.iter().map(move |m| (root, m)));
                let mounts = mounts.filter(|(_, m)| m.dev == (dev >> 20, dev & 0xf_ffff));
                let folders = mounts
                    .filter_map(|(root, m)| open(root.path(&m.point).as_ref(), flags, Mode::empty()).ok());
                free.insert(folders.collect())
            }
        })
    }

    /// Opens the inode of a handle.
    fn open(&mut self, dev: u32, entry: &pb::FhEntry) -> Result<Option<OwnedFd>> {
        let data = handle_bytes(entry);
        let kind = entry.r#type.cast_signed();
        let folders = self.of(dev)?.iter();
        Ok(folders.filter_map(|folder| handle::open(folder.as_fd(), kind, &data, libc::O_PATH).ok()).next())
    }
}

/// The mount that an open file is on, as mountinfo has it.
pub(super) fn mount_of(file: &OwnedFd) -> Result<Option<i32>> {
    let path = format!("/proc/self/fdinfo/{}", file.as_raw_fd());
    let text = std::fs::read(&path).call(path)?;
    let value = text.split(|c| *c == b'\n').find_map(|line| line.strip_prefix(b"mnt_id:"));
    Ok(value.and_then(|value| procfs::number(value.trim_ascii())))
}

/// An inode as watches tell it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Inode {
    /// Device in the kernel's numbering.
    pub dev: u32,
    /// Number.
    pub ino: u64,
}

impl Inode {
    fn is(self, stat: &nix::sys::stat::FileStat) -> bool {
        stat.st_ino == self.ino && kernel_dev(stat.st_dev) == self.dev
    }
}

/// Finds names of watched inodes, on dump.
#[derive(Debug, Default)]
pub(super) struct Inodes {
    roots: Roots,
    mounts: Mounts,
    forced: bool,
    scan: Vec<PathBuf>,
    /// What the walk has seen; `None` before the first.
    walked: Option<HashMap<Inode, PathBuf>>,
}

impl Inodes {
    pub(super) fn new(opts: &DumpOptions, roots: Roots) -> Self {
        Inodes {
            mounts: Mounts::new(roots.clone()),
            roots,
            forced: opts.common.force_irmap,
            scan: opts.common.irmap_scan_paths.clone(),
            ..Inodes::default()
        }
    }

    /// A name of the watched inode, if one can be found, with the mount it is on, if that is known.
    ///
    /// # Errors
    /// Nothing leads to the inode: neither its handle nor a name.
    pub(super) fn path_of(
        &mut self,
        inode: Inode,
        handle: &pb::FhEntry,
    ) -> Result<Option<(Vec<u8>, Option<i32>)>> {
        let file = self.mounts.open(inode.dev, handle)?;
        if let Some(file) = &file {
            let path = readlink(format!("/proc/self/fd/{}", file.as_raw_fd()).as_str()).call("readlink")?;
            let mount = mount_of(file)?;
            let whole = self.roots.of_mount(mount).path(path.as_bytes());
            // A link may be watched itself.
            if lstat(whole.as_ref()).is_ok_and(|found| inode.is(&found)) {
                return Ok(Some((path.into_vec(), mount)));
            }
        }
        if (self.forced || file.is_none())
            && let Some(path) = self.walk().get(&inode)
        {
            return Ok(Some((path.as_os_str().as_bytes().to_vec(), None)));
        }
        match file {
            Some(_) => Ok(None),
            None => Err(Error::unsupported("the watched file cannot be opened by its handle").remedy(
                "its file system has no handles, or is not mounted here: name a folder that holds the file \
                 with --irmap-scan-path",
            )),
        }
    }

    /// All files below the known places and those asked for, looked at once. Mounts are not entered.
    fn walk(&mut self) -> &HashMap<Inode, PathBuf> {
        self.walked.get_or_insert_with(|| {
            let mut found = HashMap::new();
            let asked = self.scan.iter().map(PathBuf::as_path);
            for root in asked.chain(KNOWN.iter().map(Path::new)) {
                let below = self.roots.main().path(root.as_os_str().as_bytes());
                let real = Path::new(OsStr::from_bytes(&below));
                let Ok(top) = std::fs::metadata(real) else { continue };
                let dev = kernel_dev(top.dev());
                found.entry(Inode { dev, ino: top.ino() }).or_insert_with(|| root.to_owned());
                let mut folders = vec![root.to_owned()];
                while let Some(folder) = folders.pop() {
                    for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
                        let is_folder = entry.file_type().is_ok_and(|t| t.is_dir());
                        let path = entry.path();
                        let same = || std::fs::symlink_metadata(&path).is_ok_and(|m| m.dev() == top.dev());
                        if is_folder && same() {
                            folders.push(path.clone());
                        }
                        found.entry(Inode { dev, ino: entry.ino() }).or_insert(path);
                    }
                }
            }
            found
        })
    }
}

/// Opens what was watched, on restore.
pub(super) fn target(
    ghost: Option<&FileId>,
    dev: u32,
    handle: &pb::FhEntry,
    mounts: &mut Mounts,
    cx: &FilesTask<'_>,
) -> Result<OwnedFd> {
    match (ghost, &handle.path) {
        (Some(ghost), _) => {
            let handle = cx.handle(*ghost).ok_or_else(|| Error::bug("a ghost without a handle"))?;
            handle.try_clone_to_owned().call("dup")
        }
        (None, Some(path)) => {
            let root = cx.roots().of_mount(handle.mnt_id.map(u32::cast_signed));
            let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            open(root.path(path).as_ref(), flags, Mode::empty()).call("open")
        }
        (None, None) => mounts.open(dev, handle)?.ok_or_else(|| Error::host("the watched file is gone")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_walk_finds_names_by_number() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("a/b")).unwrap();
        let file = dir.path().join("a/b/c");
        std::fs::write(&file, "x").unwrap();
        let mut inodes = Inodes { scan: vec![dir.path().to_owned()], forced: true, ..Inodes::default() };
        let found = std::fs::metadata(&file).unwrap();
        let inode = Inode { dev: kernel_dev(found.dev()), ino: found.ino() };
        assert_eq!(inodes.walk().get(&inode), Some(&file));
        // A handle of no file system.
        let none =
            pb::FhEntry { bytes: 8, r#type: 0x7f, handle: vec![0; HANDLE_WORDS], ..Default::default() };
        let found = inodes.path_of(inode, &none).unwrap().map(|(path, _)| path);
        assert_eq!(found.as_deref(), Some(file.as_os_str().as_bytes()));
        assert!(inodes.path_of(Inode { ino: u64::MAX, ..inode }, &none).is_err());
    }
}
