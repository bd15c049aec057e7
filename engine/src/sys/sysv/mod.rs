//! System V ipc: shared memory, semaphores and message queues, one file each.
//!
//! # Safety
//! The structures are plain numbers, for which zero is a value.
#![allow(unsafe_code)]

pub(crate) mod msg;
pub(crate) mod sem;
pub mod shm;

pub use shm::{DEST, LOCKED, NEXT_ID, Segment, attach, by_key, create, lock, remove, set_owner, stat};

use crate::{error::Result, sys::errno};

/// Whose an object is, and its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Perm {
    /// 0 (IPC_PRIVATE) for an object without a name.
    pub key: i32,
    pub uid: u32,
    pub gid: u32,
    /// Of the creator.
    pub cuid: u32,
    pub cgid: u32,
    /// Permissions, and bits of the kind.
    pub mode: u32,
}

impl Perm {
    fn of(perm: &libc::ipc_perm) -> Perm {
        Perm {
            key: perm.__key,
            uid: perm.uid,
            gid: perm.gid,
            cuid: perm.cuid,
            cgid: perm.cgid,
            mode: perm.mode.into(),
        }
    }

    /// What IPC_SET takes.
    fn set(&self, perm: &mut libc::ipc_perm) {
        perm.uid = self.uid;
        perm.gid = self.gid;
        perm.mode = (self.mode & 0o777) as _;
    }
}

/// Flags of shmget(2) and the like for an object that is not there yet.
fn new(perm: &Perm) -> i32 {
    libc::IPC_CREAT | libc::IPC_EXCL | (perm.mode & 0o777) as i32
}

/// Numbers of all objects of a kind: `highest` is the last place that is taken, and `at` tells the number of what is
/// in a place.
fn numbers(highest: Result<u64>, at: impl Fn(i32) -> Result<u64>) -> Result<Vec<i32>> {
    let mut found = Vec::new();
    for place in 0..=i32::try_from(highest?).unwrap_or(i32::MAX) {
        match at(place) {
            Err(e) if matches!(e.errno(), Some(libc::EINVAL | libc::EIDRM)) => {}
            id => found.extend(i32::try_from(id?)),
        }
    }
    Ok(found)
}

/// `None` for an object that is gone.
fn there(done: Result<u64>) -> Result<Option<()>> {
    match done {
        Err(e) if matches!(e.errno(), Some(libc::EINVAL | libc::EIDRM)) => Ok(None),
        other => other.map(|_| Some(())),
    }
}

/// An identifier the kernel has just given.
fn id(ret: i32, call: &'static str) -> Result<i32> {
    errno::check(ret.into(), call)?;
    Ok(ret)
}

fn zeroed<T: Copy>() -> T {
    // SAFETY: used for structures of numbers only.
    unsafe { std::mem::zeroed() }
}
