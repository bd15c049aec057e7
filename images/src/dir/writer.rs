//! Writing one image.

use std::{
    fs::File,
    io::{BufWriter, Write},
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
};

use nix::{
    fcntl::{OFlag, openat},
    sys::stat::Mode,
};
use prost::Message;

use super::Folder;
use crate::{
    catalog::ImageKind,
    error::{Error, Result},
    frame::{append_entry, header_bytes},
};

const BUFFER: usize = 32 << 10;

/// Writes one image; made by [`ImageDir::writer`](super::ImageDir::writer).
///
/// Call [`finish`](ImageWriter::finish) at the end. A writer that is dropped still flushes, and
/// [`ImageDir::check_written`](super::ImageDir::check_written) then reports a failure of that.
#[derive(Debug)]
pub struct ImageWriter {
    folder: Arc<Folder>,
    kind: ImageKind,
    name: String,
    out: Option<BufWriter<File>>,
    buf: Vec<u8>,
    finished: bool,
}

impl ImageWriter {
    pub(super) fn new(folder: Arc<Folder>, kind: ImageKind, name: String) -> Self {
        Self { folder, kind, name, out: None, buf: Vec::new(), finished: false }
    }

    /// Appends an entry.
    pub fn write(&mut self, message: &impl Message) -> Result<()> {
        let mut buf = std::mem::take(&mut self.buf);
        buf.clear();
        append_entry(message, &mut buf);
        let written = self.write_raw(&buf);
        self.buf = buf;
        written
    }

    /// Appends bytes: the payload of the entry just written, or the content of a raw image.
    pub fn write_raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.open()?;
        let out = self.out.as_mut().expect("opened above");
        out.write_all(bytes).map_err(|e| Error::sys(&self.name, "write", e))
    }

    /// The file, with everything written so far in it: for splice, sendfile and the like, which append
    /// at its position.
    pub fn as_file(&mut self) -> Result<&File> {
        self.open()?;
        let out = self.out.as_mut().expect("opened above");
        out.flush().map_err(|e| Error::sys(&self.name, "write", e))?;
        Ok(out.get_ref())
    }

    /// As [`as_file`](ImageWriter::as_file).
    pub fn fd(&mut self) -> Result<BorrowedFd<'_>> {
        self.as_file().map(AsFd::as_fd)
    }

    /// File name of the image.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Completes the image.
    ///
    /// # Errors
    /// What could not be written, a full disk for one.
    pub fn finish(mut self) -> Result<()> {
        self.close()
    }

    fn open(&mut self) -> Result<()> {
        if self.out.is_some() {
            return Ok(());
        }
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC | OFlag::O_CLOEXEC;
        let mode = Mode::S_IRUSR | Mode::S_IWUSR | Mode::S_IRGRP | Mode::S_IROTH;
        let fd = openat(&self.folder.fd, self.name.as_str(), flags, mode)
            .map_err(|e| Error::sys(&self.name, "open", e))?;
        self.folder.made().names.push(self.name.clone());
        let mut out = BufWriter::with_capacity(BUFFER, File::from(fd));
        out.write_all(&header_bytes(self.kind)).map_err(|e| Error::sys(&self.name, "write", e))?;
        self.out = Some(out);
        Ok(())
    }

    fn close(&mut self) -> Result<()> {
        self.finished = true;
        match self.out.take() {
            Some(mut out) => out.flush().map_err(|e| Error::sys(&self.name, "write", e)),
            None => self.folder.remove(&self.name),
        }
    }
}

impl Drop for ImageWriter {
    fn drop(&mut self) {
        if !self.finished
            && let Err(error) = self.close()
        {
            self.folder.made().lost.get_or_insert(error);
        }
    }
}
