//! Mappings of files: private and shared, each protection, offsets, modified pages, past the end, removed.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;

use anyhow::Context;

use crate::kit::mem::{Mapping, PAGE, map, word};
use crate::kit::{Check, rest, same};

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// A file whose words are the pattern of `seed`.
fn patterned(name: &str, pages: usize, seed: u64) -> anyhow::Result<File> {
    let bytes: Vec<u8> = (0..pages * PAGE / 8).flat_map(|i| word(seed, i).to_ne_bytes()).collect();
    fs::write(name, bytes).with_context(|| name.to_string())?;
    OpenOptions::new().read(true).write(true).open(name).with_context(|| name.to_string())
}

/// Fails unless the range holds the file's pattern from page `from`.
fn check(m: &Mapping, what: &str, seed: u64, from: usize) -> Check {
    let expected: Vec<u8> =
        (0..m.len / 8).flat_map(|i| word(seed, i + from * PAGE / 8).to_ne_bytes()).collect();
    same(what, m.bytes() == expected, true)
}

/// See the module.
pub fn run(_: &[String]) -> Check {
    let file = patterned("mapped", 32, 1)?;
    let mut plain = Vec::new();
    for sharing in [libc::MAP_PRIVATE, libc::MAP_SHARED] {
        for prot in [libc::PROT_READ, RW, libc::PROT_READ | libc::PROT_EXEC, libc::PROT_NONE] {
            plain.push((map(4 * PAGE, prot, sharing, Some((&file, 3 * PAGE)))?, sharing, prot));
        }
    }
    // Private pages that were written, among pages that were not.
    let modified = map(16 * PAGE, RW, libc::MAP_PRIVATE, Some((&file, 8 * PAGE)))?;
    (0..16).step_by(3).for_each(|p| _ = modified.pages(p, 1).fill(50 + p as u64));
    let sealed = map(4 * PAGE, RW, libc::MAP_PRIVATE, Some((&file, 8 * PAGE)))?;
    sealed.pages(1, 1).fill(60);
    sealed.protect(libc::PROT_READ)?;
    // Shared pages that were written reach the file.
    let written = map(2 * PAGE, RW, libc::MAP_SHARED, Some((&file, 30 * PAGE)))?;
    written.fill(70);
    // The mapping is longer than the file.
    let short = patterned("short", 1, 2)?;
    short.set_len(PAGE as u64 + 100).context("set_len")?;
    let past = map(4 * PAGE, RW, libc::MAP_PRIVATE, Some((&short, 0)))?;
    past.pages(0, 1).fill(80);
    // A file that can only be read, and one open only for this mapping.
    let read_only = {
        patterned("read-only", 4, 3)?;
        let file = File::open("read-only").context("open")?;
        map(4 * PAGE, libc::PROT_READ, libc::MAP_SHARED, Some((&file, 0)))?
    };
    // Removed: only the mappings hold it.
    let (gone_shared, gone_private) = {
        let file = patterned("gone", 6, 4)?;
        let shared = map(6 * PAGE, RW, libc::MAP_SHARED, Some((&file, 0)))?;
        let private = map(3 * PAGE, RW, libc::MAP_PRIVATE, Some((&file, 3 * PAGE)))?;
        shared.pages(0, 1).fill(90);
        private.pages(1, 1).fill(91);
        fs::remove_file("gone").context("unlink")?;
        (shared, private)
    };
    rest()?;
    for (m, sharing, prot) in &plain {
        let m = if prot & libc::PROT_READ == 0 { m.protect(libc::PROT_READ)? } else { *m };
        check(&m, &format!("file mapping, sharing {sharing}, protection {prot}"), 1, 3)?;
    }
    for page in 0..16 {
        let one = modified.pages(page, 1);
        match page % 3 {
            0 => one.check("written private page", 50 + page as u64)?,
            _ => check(&one, "unwritten private page", 1, 8 + page)?,
        }
    }
    sealed.pages(1, 1).check("written private page made read-only", 60)?;
    check(&sealed.pages(2, 2), "its unwritten neighbours", 1, 10)?;
    written.check("written shared pages", 70)?;
    let mut back = vec![0; 2 * PAGE];
    file.read_exact_at(&mut back, 30 * PAGE as u64).context("read")?;
    same("the file under a shared mapping", back == written.bytes(), true)?;
    written.fill(71);
    file.read_exact_at(&mut back, 30 * PAGE as u64).context("read")?;
    same("the file after a write to the mapping", back == written.bytes(), true)?;
    past.pages(0, 1).check("first page of a short file", 80)?;
    past.pages(1, 1).check_zero("tail of a short file")?;
    check(&read_only, "read-only file", 3, 0)?;
    gone_shared.pages(0, 1).check("written page of a removed file", 90)?;
    check(&gone_shared.pages(1, 5), "removed file", 4, 1)?;
    check(&gone_private.pages(0, 1), "private page of a removed file", 4, 3)?;
    gone_private.pages(1, 1).check("written private page of a removed file", 91)
}
