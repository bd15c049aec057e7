//! The ways that pages take from memory into the images.

use std::fs;

use anyhow::{Result, ensure};
use rcriu_tests::{Case, Cycle, Images, Program};

use crate::kinds::{Kind, all, kind};

pub const KINDS: &[Kind] = &[
    kind("memory that the process writes itself", "page-path", &["plain"]),
    kind("much memory that the process and others write at the same time", "page-path", &["plain", "160"]),
    kind("memory of a process that may not write large files", "page-path", &["file-limit"]),
    kind("memory of a process without room for descriptors", "page-path", &["full-table"]),
    kind("eight MiB shared since a fork are still shared", "cow", &["2048"]),
    kind("128 MiB shared since a fork are still shared", "cow", &["32768"]),
];

/// Bytes written as the kernel counts them for a process.
fn written(pid: i32) -> Result<u64> {
    let io = fs::read_to_string(format!("/proc/{pid}/io"))?;
    let number = io.lines().find_map(|l| l.strip_prefix("wchar: ")?.parse().ok());
    number.ok_or_else(|| anyhow::anyhow!("no wchar in {io}"))
}

/// Large page files end where their content ends, and pages in them are all there, whichever way they took.
fn large_files_end_with_their_content() -> Result<()> {
    let program = Program::start("page-path", &["plain", "160"])?;
    let images = Images::new()?;
    Cycle::new()?.dump(&program, &images)?;
    let meta = fs::metadata(images.file("pages-1.img"))?;
    let content = (160 << 20) / 7 * 5;
    ensure!((content..content + (1 << 20)).contains(&meta.len()), "pages-1.img has {} bytes", meta.len());
    let room = std::os::unix::fs::MetadataExt::blocks(&meta) * 512;
    ensure!(room < content + (4 << 20), "pages-1.img takes {room} bytes");
    Ok(())
}

/// The process writes its pages where it may, and nothing of that stays.
fn who_writes() -> Result<()> {
    for (kind, own) in [("plain", true), ("file-limit", false), ("full-table", false)] {
        let program = Program::start("page-path", &[kind])?;
        let before = written(program.pid())?;
        Cycle::new()?.leave_running(&program)?;
        let bytes = written(program.pid())? - before;
        ensure!((bytes >> 20 > 10) == own, "{kind}: the process wrote {bytes} bytes");
        program.verify()?;
    }
    Ok(())
}

/// Neither pages full of zeros nor untouched ones take room.
fn zeros_take_no_room() -> Result<()> {
    for kind in ["plain", "file-limit"] {
        let program = Program::start("page-path", &[kind])?;
        let images = Images::new()?;
        Cycle::new()?.dump(&program, &images)?;
        let size = fs::metadata(images.file("pages-1.img"))?.len();
        let content = (24 << 20) / 7 * 5;
        ensure!((content..content + (1 << 20)).contains(&size), "{kind}: pages-1.img has {size} bytes");
    }
    Ok(())
}

pub fn cases() -> Vec<Case> {
    let mut cases = all("memory", KINDS);
    cases.push(Case::new("memory: a process writes its pages itself where it may", who_writes));
    cases.push(Case::new("memory: pages of zeros take no room in images", zeros_take_no_room));
    cases.push(Case::new(
        "memory: large page files end with their content",
        large_files_end_with_their_content,
    ));
    cases
}
