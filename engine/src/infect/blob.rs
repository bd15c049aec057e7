//! The embedded blobs and how their images become code at an address.
//!
//! ```text
//! base                         base + rx_len
//! |  code, constants (r-x)     |  data, zeroed data (rw-)  |
//! ```

/// A blob as `build.rs` made it: no loader needed, all relocations are "add the base".
#[derive(Debug)]
pub struct Blob {
    /// Package it comes from.
    pub name: &'static str,
    /// Memory image, linked at address 0.
    pub image: &'static [u8],
    /// Length in bytes of the read-execute part, whole pages; the rest is read-write.
    pub rx_len: usize,
    /// `(offset, addend)`: the word at `offset` becomes base + addend. All lie in the read-write part.
    pub relocs: &'static [(u64, u64)],
    /// Build number of the ABI the blob was compiled with.
    pub build: u64,
}

include!(concat!(env!("OUT_DIR"), "/blobs.rs"));

impl Blob {
    /// The read-execute part, the same at every address.
    pub fn code(&self) -> &'static [u8] {
        &self.image[..self.rx_len.min(self.image.len())]
    }

    /// The read-write part for an image whose code starts at `base`.
    pub fn data(&self, base: u64) -> Vec<u8> {
        let mut data = self.image.get(self.rx_len..).unwrap_or_default().to_vec();
        for &(offset, addend) in self.relocs {
            let at = offset as usize - self.rx_len;
            data[at..at + 8].copy_from_slice(&base.wrapping_add(addend).to_le_bytes());
        }
        data
    }

    /// Length in bytes of the read-write part.
    pub fn rw_len(&self) -> usize {
        self.image.len().saturating_sub(self.rx_len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every blob starts with a landing pad: the entry point is the first byte of the image.
    #[test]
    fn entries_are_at_the_front() {
        for (blob, entry) in [(&PARASITE, PARASITE_ENTRY), (&RESTORER, RESTORER_ENTRY)] {
            assert_eq!(entry, 0, "{}", blob.name);
            assert_eq!(blob.image[..4], [0xf3, 0x0f, 0x1e, 0xfa], "{}", blob.name);
            assert_eq!(blob.rx_len % 4096, 0);
        }
    }

    #[test]
    fn relocations_add_the_base() {
        static RELOCS: [(u64, u64); 2] = [(4096, 0x10), (4104, 0x20)];
        static IMAGE: [u8; 4096 + 24] = [0; 4096 + 24];
        let blob = Blob { name: "test", image: &IMAGE, rx_len: 4096, relocs: &RELOCS, build: 0 };
        let data = blob.data(0x7000_0000);
        assert_eq!(data.len(), 24);
        assert_eq!(data[..8], 0x7000_0010u64.to_le_bytes());
        assert_eq!(data[8..16], 0x7000_0020u64.to_le_bytes());
        assert_eq!(data[16..], [0; 8]);
        assert_eq!(blob.code().len(), 4096);
    }
}
