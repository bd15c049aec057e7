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

/// Shared anonymous memory that is a file as well: opened through /proc, mapped as private from there.
pub fn as_file(_: &[String]) -> Check {
    let area = shared(5 * PAGE)?;
    (0..3).for_each(|p| _ = area.pages(p, 1).fill(p as u64));
    let path = format!("/proc/self/map_files/{:x}-{:x}", area.at, area.at + area.len);
    let file = OpenOptions::new().read(true).write(true).open(&path).with_context(|| path)?;
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    let private = map(5 * PAGE, rw, libc::MAP_PRIVATE, Some((&file, PAGE)))?;
    let again = map(3 * PAGE, rw, libc::MAP_SHARED, Some((&file, 2 * PAGE)))?;
    private.pages(1, 1).fill(22);
    let child = member(move || {
        rest()?;
        area.pages(4, 1).fill(44);
        again.pages(1, 1).fill(33);
        Ok(())
    })?;
    rest()?;
    private.pages(1, 1).check("private page", 22)?;
    private.pages(0, 1).check("page of the file seen by the private mapping", 1)?;
    again.pages(0, 1).check("second mapping", 2)?;
    child.verify()?;
    area.pages(3, 1).check("what the child wrote to the second mapping", 33)?;
    private.pages(2, 1).check("the same by the private mapping", 33)?;
    again.pages(2, 1).check("what the child wrote to the first mapping", 44)?;
    let mut bytes = vec![0; PAGE];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 4 * PAGE as u64).context("read")?;
    same("the file", &bytes[..], area.pages(4, 1).bytes())
}
