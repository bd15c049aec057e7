//! Whether a set holds together: every image decodes, every number that is referred to exists, the pages
//! files are as long as their pagemaps say, and every file has its sum where the set has sums.
//!
//! This finds what a restore would stumble over, without restoring, on any machine. It knows nothing of
//! the host: whether pids are free and files are there is the preflight's business.

mod files;
mod memory;
mod namespaces;
mod sockets;
mod sums;
mod tasks;

use std::collections::{HashMap, HashSet};

use crate::{
    catalog::{Head, ImageKind},
    dir::ImageDir,
    error::Result,
    json,
    set::{Finding, ImageSet, Verdict},
};

/// A set under examination.
struct Check<'a> {
    set: &'a ImageSet,
    images: HashSet<(ImageKind, u64)>,
    /// Places in [`ImageSet::tasks`] by pid.
    pids: HashMap<u32, usize>,
    found: Vec<Finding>,
}

/// Examines a set; errors come first. No finding means that it holds together.
///
/// # Errors
/// Only if the folder itself cannot be read.
pub fn check(dir: &ImageDir) -> Result<Vec<Finding>> {
    let set = ImageSet::load(dir)?;
    check_set(&set)
}

/// Examines a set that was loaded before.
pub fn check_set(set: &ImageSet) -> Result<Vec<Finding>> {
    let images = set.dir.images()?;
    let mut check = Check {
        set,
        images: images.iter().copied().collect(),
        pids: set.tasks.iter().enumerate().map(|(at, task)| (task.pid, at)).collect(),
        found: set.findings.clone(),
    };
    if let Verdict::Truncated(why) = set.verdict()
        && check.found.is_empty()
    {
        check.found.push(Finding::error(set.dir.path().to_string_lossy(), why));
    }
    check.sums();
    check.contents(&images);
    check.tasks();
    check.memory();
    check.files();
    check.sockets();
    check.namespaces();
    let mut seen = HashSet::new();
    check.found.retain(|f| seen.insert(f.clone()));
    check.found.sort_by_key(|f| std::cmp::Reverse(f.severity));
    Ok(check.found)
}

impl Check<'_> {
    /// Decodes every entry of every image.
    fn contents(&mut self, images: &[(ImageKind, u64)]) {
        for &(kind, id) in images.iter().filter(|(kind, _)| kind.row().head != Head::Raw) {
            let read = self.set.dir.reader(kind, id);
            let counted = read.and_then(|r| r.map_or(Ok(0), |mut r| json::count(&mut r, kind)));
            self.note(counted);
        }
    }

    fn has(&self, kind: ImageKind, id: u64) -> bool {
        self.images.contains(&(kind, id))
    }

    fn error(&mut self, kind: ImageKind, id: u64, text: impl Into<String>) {
        self.found.push(Finding::error(kind.file_name(id), text));
    }

    fn warn(&mut self, kind: ImageKind, id: u64, text: impl Into<String>) {
        self.found.push(Finding::warning(kind.file_name(id), text));
    }

    /// An image that must be there because `kind`-`id` refers to it.
    fn expect(&mut self, by: (ImageKind, u64), wanted: (ImageKind, u64), why: &str) {
        if !self.has(wanted.0, wanted.1) {
            let name = wanted.0.file_name(wanted.1);
            self.error(by.0, by.1, format!("{why} is in {name}, which is not there"));
        }
    }

    /// Keeps the error of what could not be read.
    fn note<T>(&mut self, read: Result<T>) -> Option<T> {
        read.map_err(|e| self.found.push(e.into())).ok()
    }
}

#[cfg(test)]
mod tests;
