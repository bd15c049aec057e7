//! Writing one image.

use std::{
    fs::File,
    io::Write,
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
};

use prost::Message;

use super::{Folder, behind::Job};
use crate::{
    catalog::ImageKind,
    error::{Error, Result},
    frame::{append_entry, header_bytes},
};

/// Bytes that are kept until they are written in one piece. An image that is no longer than this may be made by the
/// folder's thread.
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
    /// Not written yet.
    buf: Vec<u8>,
    /// Something was written, be it nothing but the head.
    started: bool,
    /// Once the image is longer than the buffer, or somebody wants the file itself.
    out: Option<File>,
    finished: bool,
}

impl ImageWriter {
    pub(super) fn new(folder: Arc<Folder>, kind: ImageKind, name: String) -> Self {
        Self { folder, kind, name, buf: Vec::new(), started: false, out: None, finished: false }
    }

    /// Appends an entry.
    pub fn write(&mut self, message: &impl Message) -> Result<()> {
        self.start();
        append_entry(message, &mut self.buf);
        self.flush_from(BUFFER)
    }

    /// Appends bytes: the payload of the entry just written, or the content of a raw image.
    pub fn write_raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.start();
        if bytes.len() < BUFFER {
            self.buf.extend_from_slice(bytes);
            return self.flush_from(BUFFER);
        }
        self.flush_from(0)?;
        self.out.as_ref().map_or(Ok(()), |out| put(out, &self.name, bytes))
    }

    /// The file, with everything written so far in it: for splice, sendfile and the like, which append
    /// at its position.
    pub fn as_file(&mut self) -> Result<&File> {
        self.start();
        self.flush_from(0)?;
        self.file()
    }

    /// As [`as_file`](ImageWriter::as_file).
    pub fn fd(&mut self) -> Result<BorrowedFd<'_>> {
        self.as_file().map(AsFd::as_fd)
    }

    /// An image without entries, where that means something else than no image.
    pub fn write_nothing(&mut self) {
        self.start();
    }

    /// File name of the image.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Completes the image.
    ///
    /// # Errors
    /// What could not be written, a full disk for one. Where a thread makes the image,
    /// [`ImageDir::check_written`](super::ImageDir::check_written) tells.
    pub fn finish(mut self) -> Result<()> {
        self.close()
    }

    fn start(&mut self) {
        if !self.started {
            self.started = true;
            self.buf.extend_from_slice(&header_bytes(self.kind));
        }
    }

    /// Writes what waits if it is more than `limit` bytes.
    fn flush_from(&mut self, limit: usize) -> Result<()> {
        if self.buf.len() <= limit && !(limit == 0 && self.out.is_none()) {
            return Ok(());
        }
        self.file()?;
        if let Some(out) = &self.out {
            put(out, &self.name, &self.buf)?;
        }
        self.buf.clear();
        Ok(())
    }

    fn file(&mut self) -> Result<&File> {
        let out = match self.out.take() {
            Some(out) => out,
            None => {
                self.folder.made().names.push(self.name.clone());
                self.folder.create(&self.name)?
            }
        };
        Ok(self.out.insert(out))
    }

    fn close(&mut self) -> Result<()> {
        self.finished = true;
        if !self.started {
            return self.folder.remove(&self.name);
        }
        if self.out.is_some() {
            return self.flush_from(0);
        }
        self.folder.made().names.push(self.name.clone());
        let job = Job { name: std::mem::take(&mut self.name), bytes: std::mem::take(&mut self.buf) };
        match self.folder.behind.take(&self.folder, job)? {
            None => Ok(()),
            Some(job) => put(&self.folder.create(&job.name)?, &job.name, &job.bytes),
        }
    }
}

/// Writes all of `bytes` to the image called `name`.
pub(super) fn put(mut file: &File, name: &str, bytes: &[u8]) -> Result<()> {
    file.write_all(bytes).map_err(|e| Error::sys(name, "write", e))
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
