//! Images of another kernel, whose vdso is not that of this one.

use std::fs;

use anyhow::{Context, Result, ensure};
use rcriu_tests::{Case, Cycle, Images, Program};

/// The name that every x86_64 vdso has inside; nobody needs it to find functions.
const NAME: &[u8] = b"linux-vdso.so.1\0";

/// Turns the vdso in the images of a dump into another one. Its functions stay where they are.
fn change(images: &Images) -> Result<()> {
    let file = images.file("pages-1.img");
    let mut pages = fs::read(&file).context("pages-1.img")?;
    let mut places = pages.windows(NAME.len()).enumerate().filter(|(_, w)| *w == NAME).map(|(at, _)| at);
    let at = places.next().context("the dump has no vdso")?;
    ensure!(places.next().is_none(), "more than one vdso");
    pages[at] = b'L';
    fs::write(&file, pages).context("pages-1.img")
}

/// Clocks are read through the old addresses. (No thread may be inside of the old functions.)
fn of_another_kernel() -> Result<()> {
    let (program, cycle) = (Program::start("timerfd", &[])?, Cycle::new()?);
    for turn in 1..=2 {
        let images = Images::new()?;
        cycle.dump(&program, &images)?;
        if turn == 1 {
            change(&images)?;
        }
        cycle.restore(&images)?;
        let log = fs::read_to_string(images.file("restore.log")).context("restore.log")?;
        // In the second turn there are two: that of the images as plain memory, and that of the kernel.
        ensure!((turn == 1) == log.contains("that of another kernel"), "turn {turn}: the log says\n{log}");
    }
    program.verify()
}

pub fn cases() -> Vec<Case> {
    vec![Case::new("vdso: functions of another kernel's lead to those of this one", of_another_kernel)]
}
