//! An image cut between entries, so that several threads can decode it.

use std::io::Read;

use super::EntryReader;
use crate::error::Result;

/// The entries of an image, in memory.
#[derive(Debug)]
pub struct Parts {
    image: String,
    bytes: Vec<u8>,
    /// Where in the image they begin.
    offset: u64,
    parts: Vec<Part>,
}

/// Some entries that follow each other.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    from: usize,
    to: usize,
    /// Index of the first one in the image.
    entry: usize,
}

impl<R: Read> EntryReader<R> {
    /// Takes in all entries from here on, in parts of at least `size` bytes but for the last one. For images without
    /// payloads.
    pub fn parts(mut self, size: usize) -> Result<Parts> {
        let (offset, mut entry) = (self.offset, self.count);
        let bytes = match self.left() {
            Some(left) => self.payload(left)?,
            None => self.rest(u64::MAX)?,
        };
        let mut parts = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            let (from, first) = (at, entry);
            while at < bytes.len() && at - from < size {
                let word = bytes[at..].first_chunk().map_or(0, |word| u32::from_le_bytes(*word));
                // What is cut short is the last one's to tell of.
                at = at.saturating_add(4).saturating_add(word as usize).min(bytes.len());
                entry += 1;
            }
            parts.push(Part { from, to: at, entry: first });
        }
        Ok(Parts { image: self.image, bytes, offset, parts })
    }
}

impl Parts {
    /// The parts, in order.
    pub fn all(&self) -> &[Part] {
        &self.parts
    }

    /// Reads one of them; errors are those a reader of the whole image would give.
    pub fn reader(&self, part: &Part) -> EntryReader<&[u8]> {
        EntryReader {
            offset: self.offset + part.from as u64,
            count: part.entry,
            ..EntryReader::new(
                &self.bytes[part.from..part.to],
                self.image.as_str(),
                Some(self.offset + self.bytes.len() as u64),
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ImageKind, frame, pb};

    fn whole(bytes: &[u8]) -> Result<Vec<pb::PstreeEntry>> {
        let mut reader = EntryReader::new(bytes, "pstree.img", Some(bytes.len() as u64));
        reader.header(ImageKind::Pstree)?;
        reader.all()
    }

    fn in_parts(bytes: &[u8], size: usize, len: Option<u64>) -> Result<Vec<pb::PstreeEntry>> {
        let mut reader = EntryReader::new(bytes, "pstree.img", len);
        reader.header(ImageKind::Pstree)?;
        let parts = reader.parts(size)?;
        let mut entries = Vec::new();
        for part in parts.all() {
            entries.append(&mut parts.reader(part).all()?);
        }
        Ok(entries)
    }

    #[test]
    fn parts_are_read_as_the_whole_is() {
        let mut bytes = frame::header_bytes(ImageKind::Pstree);
        for pid in 1..20 {
            let entry = pb::PstreeEntry { pid, ppid: 0, pgid: 1, sid: 1, threads: vec![pid] };
            frame::append_entry(&entry, &mut bytes);
        }
        let mut bad = bytes.clone();
        bad[64] = 0xff;
        let mut long = bytes.clone();
        long[8 + 14 * 7] = 200;
        for image in [&bytes, &bad, &long] {
            for end in 8..=image.len() {
                let image = &image[..end];
                let want = whole(image).map_err(|e| e.to_string());
                for size in [1, 15, 40, 1000] {
                    for len in [None, Some(end as u64)] {
                        let got = in_parts(image, size, len).map_err(|e| e.to_string());
                        assert_eq!(got, want, "{end} bytes in parts of {size}");
                    }
                }
            }
        }
    }
}
