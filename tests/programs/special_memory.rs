//! Mappings that few programs have: guard pages inside, pages that the kernel may drop, secret memory.
//!
//! # Safety
//!
//! Advice is given to mappings of this program's own; pages behind guards are looked at through process_vm_readv
//! only.

use std::io::IoSliceMut;
use std::os::fd::FromRawFd;

use anyhow::Context;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

use crate::kit::mem::{Mapping, PAGE, anon, map};
use crate::kit::{Check, rest, same, skip};

const GUARD_INSTALL: i32 = 102;
const DROPPABLE: i32 = 0x08;

/// Whether the page can be read.
fn readable(page: Mapping) -> bool {
    let mut byte = [0];
    let there = [RemoteIoVec { base: page.at, len: 1 }];
    process_vm_readv(Pid::this(), &mut [IoSliceMut::new(&mut byte)], &there) == Ok(1)
}

/// Guard pages at the start, in the middle, over pages that were written, and at the end.
pub fn guards(_: &[String]) -> Check {
    let area = anon(64 * PAGE)?;
    area.fill(1);
    let guarded = [0, 7, 8, 30, 63];
    for page in guarded {
        area.pages(page, 1).advise(GUARD_INSTALL).map_err(|e| skip(format!("no guard pages: {e:#}")))?;
    }
    let none = anon(8 * PAGE)?;
    none.pages(2, 4).advise(GUARD_INSTALL)?;
    rest()?;
    let expected = anon(64 * PAGE)?;
    expected.fill(1);
    for page in 0..64 {
        let now = area.pages(page, 1);
        same("page can be read", readable(now), !guarded.contains(&page))?;
        if readable(now) {
            same("page", now.bytes(), expected.pages(page, 1).bytes())?;
        }
    }
    for page in 0..8 {
        same("untouched page can be read", readable(none.pages(page, 1)), !(2..6).contains(&page))?;
    }
    Ok(())
}

/// Pages the kernel may drop come back as they were, or empty.
pub fn droppable(_: &[String]) -> Check {
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    let area = map(4 * PAGE, rw, DROPPABLE | libc::MAP_ANONYMOUS, None)
        .map_err(|e| skip(format!("no droppable memory: {e:#}")))?;
    area.fill(5);
    rest()?;
    if area.check_zero("droppable memory").is_err() {
        area.check("droppable memory", 5)?;
    }
    area.fill(6);
    area.check("droppable memory", 6)
}

/// Memory that the kernel itself cannot read.
pub fn secret(_: &[String]) -> Check {
    // SAFETY: flags only.
    let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
    if fd < 0 {
        return Err(skip(format!("memfd_secret: {}", nix::errno::Errno::last())));
    }
    // SAFETY: made just now.
    let file = unsafe { std::fs::File::from_raw_fd(fd as i32) };
    file.set_len(2 * PAGE as u64).context("ftruncate")?;
    let area = map(2 * PAGE, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, Some((&file, 0)))?;
    drop(file);
    area.fill(7);
    rest()?;
    area.check("secret memory", 7)
}
