//! System V shared memory: `shmget(2)`, `shmctl(2)`, `shmat(2)`.
//!
//! # Safety
//! Structures passed are locals of the kernel's layout; segments are attached inside regions only, in which no
//! Rust object lies.
#![allow(unsafe_code)]

use std::fs::File;

use super::{Perm, new, numbers};
use crate::{
    error::{Error, Result, SysContext},
    sys::{errno, map::Region},
};

/// The file that chooses the number of the next segment (CONFIG_CHECKPOINT_RESTORE).
pub const NEXT_ID: &str = "/proc/sys/kernel/shm_next_id";
/// Removed when nobody has it attached any more (`SHM_DEST`).
pub const DEST: u32 = 0o1000;
/// Kept in memory (`SHM_LOCKED`).
pub const LOCKED: u32 = 0o2000;

/// What the kernel tells of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    pub key: i32,
    /// Permissions, [`DEST`] and [`LOCKED`].
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub cuid: u32,
    pub cgid: u32,
    /// Bytes.
    pub size: u64,
    /// Mappings of it, of all processes.
    pub attached: u64,
}

fn control(id: i32, command: i32, data: &mut libc::shmid_ds) -> Result<()> {
    // SAFETY: the structure is a local that outlives the call.
    let ret = unsafe { libc::shmctl(id, command, &raw mut *data) };
    errno::check(ret.into(), "shmctl").map(drop)
}

fn empty() -> libc::shmid_ds {
    super::zeroed()
}

/// Numbers of all segments of the calling thread's ipc namespace.
pub(crate) fn all() -> Result<Vec<i32>> {
    const SHM_STAT: i32 = 13;
    const SHM_INFO: i32 = 14;
    let control = |at: i32, command| {
        let mut data = empty();
        // SAFETY: the structure is a local that outlives the call; `struct shm_info` is shorter.
        let ret = unsafe { libc::shmctl(at, command, &raw mut data) };
        errno::check(ret.into(), "shmctl")
    };
    numbers(control(0, SHM_INFO), |at| control(at, SHM_STAT))
}

/// Makes a segment of `size` bytes with further `flags` of shmget(2); gives its number. The caller's effective ids
/// become its owner and creator.
///
/// # Errors
/// EEXIST if the key is taken; EINVAL for 0 bytes or more than `kernel.shmmax`; ENOSPC for too many.
pub(crate) fn create_any(perm: &Perm, size: u64, flags: u32) -> Result<i32> {
    // SAFETY: numbers only.
    super::id(unsafe { libc::shmget(perm.key, size as usize, new(perm) | flags as i32) }, "shmget")
}

/// Segment number `id`; `None` if there is none.
pub fn stat(id: i32) -> Result<Option<Segment>> {
    let mut data = empty();
    match control(id, libc::IPC_STAT, &mut data) {
        Err(e) if matches!(e.errno(), Some(libc::EINVAL | libc::EIDRM)) => return Ok(None),
        other => other?,
    }
    let perm = &data.shm_perm;
    Ok(Some(Segment {
        key: perm.__key,
        mode: perm.mode.into(),
        uid: perm.uid,
        gid: perm.gid,
        cuid: perm.cuid,
        cgid: perm.cgid,
        size: data.shm_segsz as u64,
        attached: data.shm_nattch,
    }))
}

/// The segment of a key other than 0.
pub fn by_key(key: i32) -> Option<i32> {
    // SAFETY: numbers only.
    let id = unsafe { libc::shmget(key, 0, 0) };
    (id >= 0).then_some(id)
}

/// Makes segment number `id`. The caller becomes its owner and creator.
///
/// # Errors
/// EEXIST if the key is taken; an error that says so if the number is.
pub fn create(id: i32, key: i32, size: u64, permissions: u32) -> Result<()> {
    std::fs::write(NEXT_ID, id.to_string()).call(format!("write({NEXT_ID})"))?;
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | (permissions & 0o777) as i32;
    // SAFETY: numbers only.
    let got = unsafe { libc::shmget(key, size as usize, flags) };
    errno::check(got.into(), "shmget")?;
    if got == id {
        return Ok(());
    }
    remove(got)?;
    Err(Error::host(format!("System V shared memory {id} cannot be made: the number is in use")))
}

/// Sets owner and permissions.
pub fn set_owner(id: i32, uid: u32, gid: u32, permissions: u32) -> Result<()> {
    let mut data = empty();
    data.shm_perm.uid = uid;
    data.shm_perm.gid = gid;
    data.shm_perm.mode = (permissions & 0o777) as _;
    control(id, libc::IPC_SET, &mut data)
}

/// Removes it, now or when nobody has it attached any more.
pub fn remove(id: i32) -> Result<()> {
    control(id, libc::IPC_RMID, &mut empty())
}

/// Keeps it in memory.
pub fn lock(id: i32) -> Result<()> {
    control(id, libc::SHM_LOCK, &mut empty())
}

/// Attaches the whole segment in place of `region`, which is as long.
pub fn attach(id: i32, region: &Region, read_only: bool) -> Result<()> {
    let flags = libc::SHM_REMAP | if read_only { libc::SHM_RDONLY } else { 0 };
    // SAFETY: the region is as long as the segment, rounded up to whole pages, as the caller has checked.
    let at = unsafe { libc::shmat(id, region.start() as *const libc::c_void, flags) };
    if at as isize == -1 { Err(Error::sys("shmat", errno::last())) } else { Ok(()) }
}

/// A whole segment where the kernel has chosen to attach it; detached on drop.
#[derive(Debug)]
pub(crate) struct Attached {
    region: Region,
}

impl Attached {
    /// Attaches segment `id` of `size` bytes in pages of `page_size`.
    ///
    /// # Errors
    /// EINVAL or EIDRM if it is gone; EACCES without its permissions and CAP_IPC_OWNER.
    pub(crate) fn new(id: i32, size: u64, page_size: u64, read_only: bool) -> Result<Attached> {
        let flags = if read_only { libc::SHM_RDONLY } else { 0 };
        // SAFETY: without an address nothing is replaced.
        let at = unsafe { libc::shmat(id, std::ptr::null(), flags) };
        if at as isize == -1 {
            return Err(Error::sys("shmat", errno::last()));
        }
        // A segment of another size than said must not be taken for memory of ours: reads fail behind its end.
        let len = size.checked_next_multiple_of(page_size).unwrap_or(size);
        Ok(Attached { region: Region::of_kernel(at as u64, len) })
    }

    /// Its memory.
    pub(crate) fn region(&self) -> &Region {
        &self.region
    }

    /// The file behind it, open for reading. Needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE.
    pub(crate) fn file(&self) -> Result<File> {
        let (start, len) = (self.region.start(), self.region.len());
        let mut failed = None;
        // Where it ends depends on the size of its pages.
        for shift in [12, 21, 30] {
            let end = start + len.next_multiple_of(1 << shift);
            let path = format!("/proc/self/map_files/{start:x}-{end:x}");
            match File::open(&path).call(format!("open({path})")) {
                Err(e) if e.errno() == Some(libc::ENOENT) => failed = failed.or(Some(e)),
                other => return other,
            }
        }
        Err(failed.unwrap_or_else(|| Error::bug("no size of pages")))
    }

    /// Detaches it.
    pub(crate) fn detach(self) -> Result<()> {
        let done = self.end();
        std::mem::forget(self);
        done
    }

    fn end(&self) -> Result<()> {
        // SAFETY: it was attached here by `new`, and nobody has the address but by the region.
        let ret = unsafe { libc::shmdt(self.region.start() as *const libc::c_void) };
        errno::check(ret.into(), "shmdt").map(drop)
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if let Err(e) = self.end() {
            log::error!("System V shared memory stays attached: {e}");
        }
    }
}
