//! Sums of parts of files that were made while their bytes were at hand: those parts need not be read again.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use super::BLOCK;
use crate::catalog::ImageKind;

/// Sums by the block that the first is of.
pub(super) type Parts = BTreeMap<u64, Vec<u32>>;

/// What is known of a set before its files are read.
#[derive(Debug, Default)]
pub struct Known(Mutex<BTreeMap<String, Parts>>);

impl Known {
    /// The file has blocks with these sums from the byte at `offset` on.
    ///
    /// Preconditions: they begin a block, all of them are whole, and nobody writes there again.
    pub fn add(&self, kind: ImageKind, id: u64, offset: u64, sums: Vec<u32>) {
        debug_assert!(offset.is_multiple_of(BLOCK));
        if !sums.is_empty() {
            let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            all.entry(kind.file_name(id)).or_default().insert(offset / BLOCK, sums);
        }
    }

    /// Takes what is known of a file.
    pub(super) fn take(&self, name: &str) -> Parts {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(name).unwrap_or_default()
    }
}
