//! An image folder: opening and creating images in it, and the chain of parents of incremental dumps.
//!
//! The folder is held by descriptor and everything goes by `openat`, so a folder handed over by
//! descriptor, moved, or in another mount namespace works alike.

mod behind;
mod writer;

use std::{
    collections::HashSet,
    ffi::OsString,
    fs::File,
    io::{BufReader, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, OFlag, openat, readlinkat, renameat},
    sys::stat::{Mode, fstat, fstatat},
    unistd::{AccessFlags, UnlinkatFlags, faccessat, symlinkat, unlinkat},
};

pub use self::writer::ImageWriter;
use crate::{
    catalog::ImageKind,
    error::{Cause, Error, Result},
    frame::{Entry, EntryReader},
};

/// Name of the link to the folder of the previous dump.
pub const PARENT_LINK: &str = "parent";

/// Reads one image of a folder.
pub type ImageReader = EntryReader<BufReader<File>>;

/// An open image folder; clones are the same folder.
#[derive(Debug, Clone)]
pub struct ImageDir(Arc<Folder>);

#[derive(Debug)]
struct Folder {
    place: Place,
    path: PathBuf,
    made: Mutex<Made>,
    behind: behind::Behind,
}

/// The folder itself.
#[derive(Debug)]
struct Place(OwnedFd);

/// What was written through one [`ImageDir`].
#[derive(Debug, Default)]
struct Made {
    names: Vec<String>,
    /// First failure of a writer that was dropped instead of finished.
    lost: Option<Error>,
}

impl ImageDir {
    /// Opens an existing folder, for reading and writing images.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_at(AT_FDCWD, path.as_ref(), path.as_ref().to_owned())
    }

    /// Takes a folder that is open already. `path` only serves to name it in messages.
    pub fn from_fd(fd: OwnedFd, path: impl Into<PathBuf>) -> Self {
        Self(Arc::new(Folder {
            place: Place(fd),
            path: path.into(),
            made: Mutex::default(),
            behind: behind::Behind::default(),
        }))
    }

    fn open_at(at: impl AsFd, path: &Path, name: PathBuf) -> Result<Self> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let fd = openat(at, path, flags, Mode::empty())
            .map_err(|e| Error::sys(name.to_string_lossy(), "open image folder", e))?;
        Ok(Self::from_fd(fd, name))
    }

    /// How the folder is called in messages.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// From now on small images are made by a thread: they are there once [`ImageDir::check_written`] has said so, or
    /// anything of this folder was read.
    pub fn write_behind(&self) {
        self.0.behind.enable();
    }

    /// Starts an image. The file appears when it is complete or longer than a buffer; if nothing ever is written, a stale file
    /// of the same name is removed at [`ImageWriter::finish`], so that no reader takes it for ours.
    pub fn writer(&self, kind: ImageKind, id: u64) -> ImageWriter {
        ImageWriter::new(self.0.clone(), kind, kind.file_name(id))
    }

    /// Opens an image and checks its header; `None` if there is no such file, which means the same as
    /// an image without entries.
    pub fn reader(&self, kind: ImageKind, id: u64) -> Result<Option<ImageReader>> {
        let name = kind.file_name(id);
        let Some(file) = self.open_file(&name, OFlag::O_RDONLY)? else { return Ok(None) };
        let mut reader = reader_of(file, name)?;
        reader.header(kind)?;
        Ok(Some(reader))
    }

    /// Opens an image that must be there.
    pub fn require(&self, kind: ImageKind, id: u64) -> Result<ImageReader> {
        self.reader(kind, id)?.ok_or_else(|| Error::new(kind.file_name(id), Cause::Missing))
    }

    /// The first entry of an image that must be there.
    pub fn read_one<M: Entry>(&self, kind: ImageKind, id: u64) -> Result<M> {
        self.require(kind, id)?.one()
    }

    /// The first entry, or `None` if there is no such image.
    pub fn read_opt<M: Entry>(&self, kind: ImageKind, id: u64) -> Result<Option<M>> {
        self.reader(kind, id)?.map(|mut r| r.one()).transpose()
    }

    /// All entries of an image without payloads; none if there is no such image.
    pub fn read_all<M: Entry>(&self, kind: ImageKind, id: u64) -> Result<Vec<M>> {
        self.reader(kind, id)?.map_or(Ok(Vec::new()), |mut r| r.all())
    }

    /// Opens a raw image (memory pages, another program's data) as a plain file.
    pub fn open_raw(&self, kind: ImageKind, id: u64) -> Result<Option<File>> {
        self.open_file(&kind.file_name(id), OFlag::O_RDONLY)
    }

    /// As [`ImageDir::open_raw`], writable: to punch out pages that are stored elsewhere by now.
    pub fn open_raw_rw(&self, kind: ImageKind, id: u64) -> Result<Option<File>> {
        self.open_file(&kind.file_name(id), OFlag::O_RDWR)
    }

    /// Puts `bytes` in the place of the file `name`: readers find the one or the other whole.
    pub fn replace(&self, name: &str, bytes: &[u8]) -> Result<()> {
        self.0.settle();
        let new = format!("{name}.new");
        let failed = |call, e| Error::sys(&new, call, e);
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC | OFlag::O_CLOEXEC;
        let mode = Mode::S_IRUSR | Mode::S_IWUSR | Mode::S_IRGRP | Mode::S_IROTH;
        let mut file =
            File::from(openat(&self.0.place.0, new.as_str(), flags, mode).map_err(|e| failed("open", e))?);
        let written = file
            .write_all(bytes)
            .and_then(|()| file.sync_data())
            .map_err(|e| Error::sys(&new, "write", e))
            .and_then(|()| {
                renameat(&self.0.place.0, new.as_str(), &self.0.place.0, name)
                    .map_err(|e| failed("rename", e))
            });
        written.inspect_err(|_| _ = self.0.remove(&new))
    }

    fn open_file(&self, name: &str, flags: OFlag) -> Result<Option<File>> {
        self.0.settle();
        match openat(&self.0.place.0, name, flags | OFlag::O_CLOEXEC, Mode::empty()) {
            Ok(fd) => Ok(Some(File::from(fd))),
            Err(Errno::ENOENT) => Ok(None),
            Err(e) => Err(Error::sys(name, "open", e)),
        }
    }

    /// Size of an image in bytes; `None` if there is no such file.
    pub fn size(&self, kind: ImageKind, id: u64) -> Result<Option<u64>> {
        let name = kind.file_name(id);
        self.0.settle();
        match fstatat(&self.0.place.0, name.as_str(), AtFlags::empty()) {
            Ok(stat) => Ok(Some(stat.st_size.max(0).cast_unsigned())),
            Err(Errno::ENOENT) => Ok(None),
            Err(e) => Err(Error::sys(name, "stat", e)),
        }
    }

    /// Names of all files in the folder, sorted.
    pub fn names(&self) -> Result<Vec<OsString>> {
        use std::os::unix::ffi::OsStringExt;
        self.0.settle();
        let failed = |e| Error::sys(self.0.path.to_string_lossy(), "read image folder", e);
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut dir = Dir::openat(&self.0.place.0, ".", flags, Mode::empty()).map_err(failed)?;
        let mut names = Vec::new();
        for entry in dir.iter() {
            let name = entry.map_err(failed)?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                names.push(OsString::from_vec(name));
            }
        }
        names.sort();
        Ok(names)
    }

    /// All images in the folder: kind and number, sorted.
    pub fn images(&self) -> Result<Vec<(ImageKind, u64)>> {
        let mut found: Vec<_> =
            self.names()?.iter().filter_map(|n| ImageKind::from_file_name(n.to_str()?)).collect();
        found.sort();
        Ok(found)
    }

    /// The folder of the previous dump, or `None` if this is a full one.
    pub fn parent(&self) -> Result<Option<ImageDir>> {
        let Some(target) = self.parent_target()? else { return Ok(None) };
        Self::open_at(&self.0.place.0, Path::new(PARENT_LINK), self.0.path.join(target)).map(Some)
    }

    /// What the link to the parent says, relative to this folder.
    pub fn parent_target(&self) -> Result<Option<PathBuf>> {
        match readlinkat(&self.0.place.0, PARENT_LINK) {
            Ok(target) => Ok(Some(target.into())),
            Err(Errno::ENOENT) => Ok(None),
            // A real folder in place of the link is followed just the same.
            Err(Errno::EINVAL) => Ok(Some(PARENT_LINK.into())),
            Err(e) => Err(Error::sys(PARENT_LINK, "readlink", e)),
        }
    }

    /// This folder and those before it, newest first.
    ///
    /// # Errors
    /// A parent that cannot be opened, a chain that leads back to a folder it came from.
    pub fn chain(&self) -> Result<Vec<ImageDir>> {
        let mut chain = vec![self.clone()];
        let mut seen = HashSet::from([self.identity()?]);
        while let Some(parent) = chain[chain.len() - 1].parent()? {
            if !seen.insert(parent.identity()?) {
                let back = parent.path().display();
                return Err(Error::invalid(
                    PARENT_LINK,
                    format!("the chain of parents leads back to {back}"),
                ));
            }
            chain.push(parent);
        }
        Ok(chain)
    }

    /// Device and inode of the folder.
    fn identity(&self) -> Result<(u64, u64)> {
        let stat =
            fstat(&self.0.place.0).map_err(|e| Error::sys(self.0.path.to_string_lossy(), "fstat", e))?;
        Ok((stat.st_dev, stat.st_ino))
    }

    /// Makes `target`, relative to this folder, its parent.
    ///
    /// # Errors
    /// The parent must be there and readable.
    pub fn link_parent(&self, target: &Path) -> Result<()> {
        let failed = |call, e| Error::sys(PARENT_LINK, call, e);
        faccessat(&self.0.place.0, target, AccessFlags::R_OK, AtFlags::empty())
            .map_err(|e| Error::sys(target.to_string_lossy(), "access parent folder", e))?;
        match symlinkat(target, &self.0.place.0, PARENT_LINK) {
            Err(Errno::EEXIST) if self.parent_target()?.as_deref() == Some(target) => return Ok(()),
            Err(Errno::EEXIST) => {
                unlinkat(&self.0.place.0, PARENT_LINK, UnlinkatFlags::NoRemoveDir)
                    .map_err(|e| failed("unlink", e))?;
                symlinkat(target, &self.0.place.0, PARENT_LINK)
            }
            other => other,
        }
        .map_err(|e| failed("symlink", e))?;
        self.0.made().names.push(PARENT_LINK.into());
        Ok(())
    }

    /// Names of the files made through this folder so far.
    pub fn created(&self) -> Vec<String> {
        self.0.made().names.clone()
    }

    /// Removes them: a failed dump leaves no half images behind. The first failure is reported after
    /// all have been tried.
    pub fn remove_created(&self) -> Result<()> {
        self.0.settle();
        let names = std::mem::take(&mut self.0.made().names);
        names.iter().map(|name| self.0.remove(name)).fold(Ok(()), Result::and)
    }

    /// Whether every image made so far was finished without a write error; waits for the thread that makes them.
    ///
    /// # Errors
    /// The first failure of that thread, or of a writer that was dropped.
    pub fn check_written(&self) -> Result<()> {
        self.0.settle();
        self.0.made().lost.take().map_or(Ok(()), Err)
    }
}

impl AsFd for ImageDir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.place.0.as_fd()
    }
}

impl Folder {
    /// Waits until no image is on its way; [`ImageDir::check_written`] tells of a failure.
    fn settle(&self) {
        if let Err(e) = self.behind.settle(&self.place) {
            self.made().lost.get_or_insert(e);
        }
    }

    fn create(&self, name: &str) -> Result<File> {
        self.place.create(name)
    }

    /// The folder once more.
    fn place(&self) -> Result<Place> {
        let fd = self.place.0.try_clone();
        fd.map(Place).map_err(|e| Error::sys(self.path.to_string_lossy(), "dup", e))
    }

    fn made(&self) -> MutexGuard<'_, Made> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remove(&self, name: &str) -> Result<()> {
        match unlinkat(&self.place.0, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(e) => Err(Error::sys(name, "unlink", e)),
        }
    }
}

impl Place {
    fn create(&self, name: &str) -> Result<File> {
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC | OFlag::O_CLOEXEC;
        let mode = Mode::S_IRUSR | Mode::S_IWUSR | Mode::S_IRGRP | Mode::S_IROTH;
        openat(&self.0, name, flags, mode).map(File::from).map_err(|e| Error::sys(name, "open", e))
    }
}

/// A folder that is let go has all its images.
impl Drop for Folder {
    fn drop(&mut self) {
        let _ = self.behind.settle(&self.place);
    }
}

/// Reads the image in `file`; `name` is what messages call it. The header is not read yet.
pub fn reader_of(file: File, name: impl Into<String>) -> Result<ImageReader> {
    let name = name.into();
    let meta = file.metadata().map_err(|e| Error::sys(&name, "fstat", e))?;
    let len = meta.is_file().then_some(meta.len());
    Ok(EntryReader::new(BufReader::with_capacity(32 << 10, file), name, len))
}

#[cfg(test)]
mod tests;
