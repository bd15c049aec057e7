//! Framing of an image: the header, then entries of a length word and a message, some of them with a
//! payload behind.
//!
//! ```text
//! [IMG_COMMON] MAGIC | len message payload | len message payload | ...
//! ```
//! Words are 32 bit little-endian. Lengths are never trusted: they are compared with what is left of
//! the file, and where that is unknown memory grows only with what was really read.

mod parts;

use std::io::{self, Read};

use prost::{Message, Name};

use crate::{
    catalog::{Head, ImageKind},
    error::{Cause, Error, Result},
    magic, required,
};

pub use self::parts::{Part, Parts};

/// A message of the schema that can be an entry.
pub trait Entry: Message + Default + Name {}
impl<M: Message + Default + Name> Entry for M {}

/// Bytes asked for at once when the end of the source is not known.
const STEP: u64 = 1 << 20;

/// Reads the header and the entries of one image.
pub struct EntryReader<R> {
    source: R,
    image: String,
    /// Whole length of the source in bytes, if it has one.
    len: Option<u64>,
    offset: u64,
    /// Entries read so far.
    count: usize,
    entry_offset: u64,
    buf: Vec<u8>,
    required: Option<&'static required::Message>,
}

impl<R: Read> EntryReader<R> {
    /// Reads from `source`, standing at its beginning; `len` is its length in bytes if known. `image`
    /// is the name errors carry.
    pub fn new(source: R, image: impl Into<String>, len: Option<u64>) -> Self {
        Self {
            source,
            image: image.into(),
            len,
            offset: 0,
            count: 0,
            entry_offset: 0,
            buf: Vec::new(),
            required: None,
        }
    }

    /// Reads and checks the header; format 1.0 and 1.1 are both taken. Raw kinds have none.
    ///
    /// # Errors
    /// [`Cause::Magic`], [`Cause::Truncated`], [`Cause::Sys`].
    pub fn header(&mut self, kind: ImageKind) -> Result<()> {
        let row = kind.row();
        if row.head == Head::Raw {
            return Ok(());
        }
        let found = self.any_header()?;
        if found != row.magic {
            return Err(self.whole(Cause::Magic { found, expected: row.magic }));
        }
        Ok(())
    }

    /// Reads a header of either format version and gives the magic of the kind.
    pub fn any_header(&mut self) -> Result<u32> {
        let word = self.header_word()?;
        match word {
            magic::IMG_COMMON | magic::IMG_SERVICE => self.header_word(),
            word => Ok(word),
        }
    }

    fn header_word(&mut self) -> Result<u32> {
        let mut word = [0; 4];
        match self.fill(&mut word)? {
            4 => Ok(u32::from_le_bytes(word)),
            left => Err(self.whole(Cause::Truncated { want: 4, left: left as u64 })),
        }
    }

    /// The encoded message of the next entry; `None` at the end of the image.
    pub fn next_bytes(&mut self) -> Result<Option<&[u8]>> {
        let mut word = [0; 4];
        self.entry_offset = self.offset;
        let got = self.fill(&mut word)?;
        if got == 0 {
            return Ok(None);
        }
        self.count += 1;
        if got < 4 {
            return Err(self.here(Cause::Truncated { want: 4, left: got as u64 }));
        }
        let mut buf = std::mem::take(&mut self.buf);
        buf.clear();
        let read = self.read_into(u64::from(u32::from_le_bytes(word)), &mut buf);
        self.buf = buf;
        read?;
        Ok(Some(&self.buf))
    }

    /// The next entry; `None` at the end of the image.
    ///
    /// # Errors
    /// A message that cannot be decoded or lacks a required field, a length beyond the file's end, a field of a later
    /// version where it may say how pages or other data are laid out. A field of a later version elsewhere is warned of.
    #[allow(clippy::should_implement_trait)] // an iterator could not read messages of varying type
    pub fn next<M: Entry>(&mut self) -> Result<Option<M>> {
        if self.next_bytes()?.is_none() {
            return Ok(None);
        }
        self.current().map(Some)
    }

    /// The entry whose bytes [`EntryReader::next_bytes`] gave last, as a message of this type.
    ///
    /// # Errors
    /// As those of [`EntryReader::next`].
    pub fn current<M: Entry>(&mut self) -> Result<M> {
        let message_type = match self.required {
            Some(known) if known.name == M::NAME => known,
            _ => required::of(M::NAME)
                .ok_or_else(|| self.bad(format!("{} is no message of the schema", M::NAME)))?,
        };
        self.required = Some(message_type);
        let (message, found) = required::decode(message_type, &self.buf);
        let message: M = message.map_err(|e| self.here(Cause::Decode(e)))?;
        if let Some(field) = found.missing {
            return Err(self.here(Cause::Required(field)));
        }
        if let Some(unknown) = found.unknown {
            if unknown.changes_payload() {
                return Err(self.bad(format!(
                    "{unknown}; it may change how data is to be read: restore with the program that wrote it"
                )));
            }
            if unknown.is_news() {
                log::warn!("{}: {unknown}: what it says is not restored", self.image);
            }
        }
        Ok(message)
    }

    /// The next entry, which must be there.
    pub fn one<M: Entry>(&mut self) -> Result<M> {
        self.next()?.ok_or_else(|| self.whole(Cause::Empty))
    }

    /// All entries from here on. For images without payloads.
    pub fn all<M: Entry>(&mut self) -> Result<Vec<M>> {
        let mut entries = Vec::new();
        while let Some(entry) = self.next()? {
            entries.push(entry);
        }
        Ok(entries)
    }

    /// Bytes behind the current entry.
    pub fn payload(&mut self, len: u64) -> Result<Vec<u8>> {
        let mut buf = Vec::new();
        self.read_into(len, &mut buf)?;
        Ok(buf)
    }

    /// Passes over bytes behind the current entry.
    pub fn skip(&mut self, len: u64) -> Result<()> {
        self.copy_payload(len, &mut io::sink())
    }

    /// Copies bytes behind the current entry to `to`, without holding them all in memory. An error of
    /// `to` is reported as one of this image, under `write`.
    pub fn copy_payload(&mut self, len: u64, to: &mut impl io::Write) -> Result<()> {
        self.check_left(len)?;
        let copied = io::copy(&mut self.source.by_ref().take(len), to)
            .map_err(|e| Error::sys(&self.image, "write", e))?;
        self.offset += copied;
        if copied < len { Err(self.here(Cause::Truncated { want: len, left: copied })) } else { Ok(()) }
    }

    /// Everything up to the end of the image, at most `limit` bytes.
    pub fn rest(&mut self, limit: u64) -> Result<Vec<u8>> {
        let mut buf = Vec::new();
        let got = self.source.by_ref().take(limit.saturating_add(1)).read_to_end(&mut buf);
        self.offset += got.map_err(|e| Error::sys(&self.image, "read", e))? as u64;
        if buf.len() as u64 > limit {
            return Err(self.bad(format!("more than {limit} bytes of data")));
        }
        Ok(buf)
    }

    /// Bytes left, where the length of the source is known.
    pub fn left(&self) -> Option<u64> {
        Some(self.len?.saturating_sub(self.offset))
    }

    /// Byte offset in the image: where the payload of the current entry, or the next entry, begins.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Name of the image.
    pub fn image(&self) -> &str {
        &self.image
    }

    /// Index of the current entry, from 0.
    pub fn entry(&self) -> usize {
        self.count.saturating_sub(1)
    }

    /// The source, for those who read payloads by position.
    pub fn source(&self) -> &R {
        &self.source
    }

    /// An error about the current entry.
    pub fn bad(&self, reason: impl Into<String>) -> Error {
        self.here(Cause::Invalid(reason.into()))
    }

    pub(crate) fn here(&self, cause: Cause) -> Error {
        Error::new(&self.image, cause).at(self.entry(), self.entry_offset)
    }

    fn whole(&self, cause: Cause) -> Error {
        Error::new(&self.image, cause)
    }

    fn check_left(&self, len: u64) -> Result<()> {
        match self.left() {
            Some(left) if left < len => Err(self.here(Cause::Truncated { want: len, left })),
            _ => Ok(()),
        }
    }

    fn read_into(&mut self, len: u64, buf: &mut Vec<u8>) -> Result<()> {
        self.check_left(len)?;
        let mut want = len;
        if self.len.is_some() {
            // It is there: one read into what is just large enough. A file may pretend to be larger than memory.
            let room = buf.try_reserve(len as usize);
            room.map_err(|_| Error::sys(&self.image, "read", io::ErrorKind::OutOfMemory))?;
            buf.resize(buf.len() + len as usize, 0);
            let at = buf.len() - len as usize;
            let got = self.fill(&mut buf[at..])? as u64;
            let cut = || self.here(Cause::Truncated { want: len, left: got });
            return if got < len { Err(cut()) } else { Ok(()) };
        }
        while want > 0 {
            let got = self.source.by_ref().take(want.min(STEP)).read_to_end(buf);
            let got = got.map_err(|e| Error::sys(&self.image, "read", e))? as u64;
            self.offset += got;
            want -= got;
            if got == 0 {
                return Err(self.here(Cause::Truncated { want: len, left: len - want }));
            }
        }
        Ok(())
    }

    /// Reads as much of `buf` as there is.
    fn fill(&mut self, buf: &mut [u8]) -> Result<usize> {
        let mut got = 0;
        while got < buf.len() {
            match self.source.read(&mut buf[got..]) {
                Ok(0) => break,
                Ok(n) => got += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::sys(&self.image, "read", e)),
            }
        }
        self.offset += got as u64;
        Ok(got)
    }
}

/// The header words of a kind, in today's format.
pub fn header_bytes(kind: ImageKind) -> Vec<u8> {
    let row = kind.row();
    let words: &[u32] = match row.head {
        Head::Common => &[magic::IMG_COMMON, row.magic],
        Head::Service => &[magic::IMG_SERVICE, row.magic],
        Head::Bare => &[row.magic],
        Head::Raw => &[],
    };
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// Appends the length word and the encoded message.
pub fn append_entry(message: &impl Message, to: &mut Vec<u8>) {
    let at = to.len();
    to.extend([0; 4]);
    // Appending to a vector cannot run out of room.
    let _ = message.encode(to);
    let len = (to.len() - at - 4) as u32;
    to[at..at + 4].copy_from_slice(&len.to_le_bytes());
}

#[cfg(test)]
mod tests;
