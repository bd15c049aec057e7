//! System V shared memory: with a key and without, read-only, removed but still attached, shared with a child.
//!
//! # Safety
//!
//! Segments are attached where the kernel chooses, and the mappings made of them are used within their size.

use std::sync::atomic::Ordering;

use anyhow::bail;

use crate::kit::crew::member;
use crate::kit::mem::{Mapping, PAGE};
use crate::kit::{Check, number, rest, same, skip, sys};

/// A segment, removed when the maker ends unless it was before.
struct Segment {
    id: i32,
    maker: u32,
}

impl Drop for Segment {
    fn drop(&mut self) {
        if std::process::id() == self.maker {
            // SAFETY: no structure is read or written.
            unsafe { libc::shmctl(self.id, libc::IPC_RMID, std::ptr::null_mut()) };
        }
    }
}

fn segment(key: i32, pages: usize, mode: i32) -> anyhow::Result<Segment> {
    // SAFETY: numbers only.
    let id = unsafe { libc::shmget(key, pages * PAGE - 100, libc::IPC_CREAT | mode) };
    if id < 0 {
        return Err(skip(format!("shmget: {}", nix::errno::Errno::last())));
    }
    Ok(Segment { id, maker: std::process::id() })
}

fn attach(segment: &Segment, pages: usize, flags: i32) -> anyhow::Result<Mapping> {
    // SAFETY: at an address of the kernel's choice.
    let at = unsafe { libc::shmat(segment.id, std::ptr::null(), flags) };
    if at as isize == -1 {
        bail!("shmat: {}", nix::errno::Errno::last());
    }
    Ok(Mapping { at: at as usize, len: pages * PAGE })
}

/// Key, size, permissions and state, owner, creator, mappings.
fn facts(segment: &Segment) -> anyhow::Result<(i32, usize, u32, [u32; 4], u64)> {
    // SAFETY: plain numbers, for which zero is a value.
    let mut data: libc::shmid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: a structure of ours.
    sys("shmctl", unsafe { libc::shmctl(segment.id, libc::IPC_STAT, &raw mut data) })?;
    let perm = data.shm_perm;
    let owners = [perm.uid, perm.gid, perm.cuid, perm.cgid];
    Ok((perm.__key, data.shm_segsz, u32::from(perm.mode), owners, data.shm_nattch))
}

/// See the module.
pub fn run(_: &[String]) -> Check {
    // Programs that run at the same time may have the same pid, each in a namespace of its own.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    let key = 0x4000_0000 | (now.as_nanos() as i32 & 0xfff_ffff);
    let keyed = segment(key, 8, 0o640)?;
    let area = attach(&keyed, 8, 0)?;
    (0..8).step_by(2).for_each(|p| _ = area.pages(p, 1).fill(p as u64));
    let read_only = attach(&keyed, 8, libc::SHM_RDONLY)?;
    area.pages(2, 1).protect(libc::PROT_READ)?;
    let private = segment(libc::IPC_PRIVATE, 3, 0o600)?;
    let going = attach(&private, 3, 0)?;
    going.fill(9);
    // SAFETY: no structure is read or written.
    sys("shmctl", unsafe { libc::shmctl(private.id, libc::IPC_RMID, std::ptr::null_mut()) })?;
    let child = member(move || {
        rest()?;
        going.check("segment that is to go, in the child", 9)?;
        going.pages(0, 1).atomic(1).store(11, Ordering::SeqCst);
        area.pages(5, 1).fill(55);
        Ok(())
    })?;
    let before = (facts(&keyed)?, facts(&private)?);
    rest()?;
    for page in 0..8 {
        match page % 2 {
            0 => area.pages(page, 1).check("page of the segment", page as u64)?,
            _ => area.pages(page, 1).check_zero("untouched page of the segment")?,
        }
    }
    same("facts of the segments", (facts(&keyed)?, facts(&private)?), before)?;
    child.verify()?;
    read_only.pages(5, 1).check("what the child wrote, read-only", 55)?;
    same("what the child wrote", going.pages(0, 1).atomic(1).load(Ordering::SeqCst), 11)?;
    same("making it writable fails", read_only.protect(libc::PROT_READ | libc::PROT_WRITE).is_err(), true)?;
    for mapping in [area, read_only, going] {
        // SAFETY: attached above, not used again.
        sys("shmdt", unsafe { libc::shmdt(mapping.at as *const libc::c_void) })?;
    }
    same("what was to go is gone", facts(&private).is_err(), true)
}

/// Has the segment of the key given attached.
pub fn holder(args: &[String]) -> Check {
    let keyed = segment(number(args, 0, 0)? as i32, 1, 0o600)?;
    let area = attach(&keyed, 1, 0)?;
    rest()?;
    same("mapping", area.len, PAGE)
}
