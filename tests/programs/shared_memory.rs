//! Shared anonymous memory: between processes, in parts, at other addresses, after its maker ended.
//!
//! # Safety
//!
//! mremap and munmap get ranges of this program's own.

use std::fs::OpenOptions;
use std::sync::atomic::Ordering;

use anyhow::{Context, bail};

use crate::kit::crew::member;
use crate::kit::mem::{Mapping, PAGE, map, shared};
use crate::kit::{Check, rest, same};

/// A second mapping of the same shared pages.
fn alias(m: Mapping) -> anyhow::Result<Mapping> {
    // SAFETY: an old size of 0 asks for a second mapping of a shared range; it is owned from here on.
    let at = unsafe { libc::mremap(m.at as *mut libc::c_void, 0, m.len, libc::MREMAP_MAYMOVE) };
    if at == libc::MAP_FAILED {
        bail!("mremap: {}", nix::errno::Errno::last());
    }
    Ok(Mapping { at: at as usize, len: m.len })
}

/// See the module.
pub fn run(_: &[String]) -> Check {
    let area = shared(32 * PAGE)?;
    area.fill(1);
    let other = alias(area)?;
    let holes = shared(64 * PAGE)?;
    holes.pages(40, 2).fill(2);
    let read_only = shared(4 * PAGE)?;
    read_only.fill(3);
    read_only.protect(libc::PROT_READ)?;
    let zero = OpenOptions::new().read(true).write(true).open("/dev/zero").context("/dev/zero")?;
    let by_device = map(4 * PAGE, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, Some((&zero, 0)))?;
    drop(zero);
    by_device.fill(4);
    let child = member(move || {
        // Only a part stays mapped here.
        // SAFETY: pages of ours that nothing refers to.
        crate::kit::sys("munmap", unsafe { libc::munmap(area.at as *mut libc::c_void, 16 * PAGE) })?;
        let grown = shared(4 * PAGE)?;
        grown.fill(5);
        rest()?;
        grown.check("the child's own shared memory", 5)?;
        // Tells the parent through the memory that only the two share.
        area.pages(20, 1).atomic(0).store(4242, Ordering::SeqCst);
        holes.pages(0, 1).atomic(0).store(4343, Ordering::SeqCst);
        by_device.atomic(0).store(4444, Ordering::SeqCst);
        Ok(())
    })?;
    rest()?;
    area.check("shared memory", 1)?;
    other.check("its second mapping", 1)?;
    holes.pages(40, 2).check("shared memory with holes", 2)?;
    holes.pages(0, 40).check_zero("holes of shared memory")?;
    read_only.check("read-only shared memory", 3)?;
    by_device.check("mapping of /dev/zero", 4)?;
    child.verify()?;
    let word = |m: Mapping, at: usize| m.pages(at, 1).atomic(0).load(Ordering::SeqCst);
    same("what the child wrote", word(area, 20), 4242)?;
    same("what the child wrote, by the second mapping", word(other, 20), 4242)?;
    same("what the child wrote to a hole", word(holes, 0), 4343)?;
    same("what the child wrote to /dev/zero", word(by_device, 0), 4444)
}
