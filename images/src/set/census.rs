//! What the stored pages are: how many are zero, how many different ones there are.
//!
//! This reads every page, so it is done on request or for small sets only.

use std::{collections::HashSet, os::unix::fs::FileExt};

use super::{
    ImageSet,
    memory::{bytes, pages_files},
};
use crate::{
    catalog::ImageKind,
    error::{Error, Result},
    pagemap::{PAGE_SIZE, Stored},
};

/// Bytes read at once.
const STEP: u64 = 1 << 20;

/// Counts of pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Census {
    pub pages: u64,
    /// All bytes zero.
    pub zero: u64,
    /// Different contents, the zero page counted once.
    pub unique: u64,
}

/// Reads all pages files of this set, parents not included, if they hold no more than `limit` bytes.
pub fn census(set: &ImageSet, limit: u64) -> Result<Option<Census>> {
    let files = pages_files(set)?;
    if files.values().fold(0u64, |sum, map| sum.saturating_add(bytes(map.stored))) > limit {
        return Ok(None);
    }
    let mut census = Census::default();
    let mut seen = HashSet::new();
    let mut buf = vec![0; STEP as usize];
    for (id, map) in files {
        let name = ImageKind::Pages.file_name(id.into());
        let Some(pages) = Stored::open(&set.dir, &map)? else { continue };
        let len = pages.size().map_err(|e| Error::sys(&name, "fstat", e))?;
        for at in (0..len).step_by(buf.len()) {
            let part = &mut buf[..STEP.min(len - at) as usize];
            match &pages {
                Stored::Plain(file) => {
                    file.read_exact_at(part, at).map_err(|e| Error::sys(&name, "pread", e))?
                }
                Stored::Packed(packed) => packed.read_exact_at(part, at)?,
            }
            for page in part.chunks_exact(PAGE_SIZE as usize) {
                census.pages += 1;
                let digest = digest(page);
                census.zero += u64::from(page.iter().all(|&b| b == 0));
                seen.insert(digest);
            }
        }
    }
    census.unique = seen.len() as u64;
    Ok(Some(census))
}

/// 128 bit of two independent multiply-and-add hashes. Good enough to count by; nothing is decided by it.
fn digest(page: &[u8]) -> u128 {
    let (mut a, mut b) = (0x9e37_79b9_7f4a_7c15u64, 0xc2b2_ae3d_27d4_eb4fu64);
    for word in page.chunks_exact(8) {
        let word = word.iter().rev().fold(0, |w, &byte| w << 8 | u64::from(byte));
        a = (a ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd).rotate_left(29);
        b = (b.rotate_left(17) ^ word).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    }
    u128::from(a) << 64 | u128::from(b)
}
