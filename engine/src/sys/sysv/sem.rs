//! System V semaphores: `semget(2)`, `semctl(2)`.
//!
//! # Safety
//! Structures are locals of the kernel's layout; vectors of values have as many as the set, which the kernel told or
//! checks.
#![allow(unsafe_code)]

use super::{Perm, new, numbers, there, zeroed};
use crate::{
    error::{Error, Result},
    sys::errno,
};

/// `struct semid64_ds` of this architecture, with room for what a later kernel may add.
#[repr(C)]
#[derive(Clone, Copy)]
struct Data {
    perm: libc::ipc_perm,
    otime: libc::c_long,
    unused1: libc::c_ulong,
    ctime: libc::c_long,
    unused2: libc::c_ulong,
    nsems: libc::c_ulong,
    room: [libc::c_ulong; 8],
}

const _: () = assert!(std::mem::size_of::<libc::ipc_perm>() == 48);
const _: () = assert!(std::mem::offset_of!(Data, nsems) == 80);

/// A set of semaphores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Set {
    pub perm: Perm,
    /// How many there are.
    pub count: u32,
}

fn control(id: i32, command: i32, data: &mut Data) -> Result<u64> {
    // SAFETY: the structure is a local that outlives the call.
    let ret = unsafe { libc::semctl(id, 0, command, &raw mut *data) };
    errno::check(ret.into(), "semctl")
}

/// Numbers of all sets of the calling thread's ipc namespace.
pub(crate) fn all() -> Result<Vec<i32>> {
    // `struct seminfo` is shorter.
    numbers(control(0, libc::SEM_INFO, &mut zeroed()), |at| control(at, libc::SEM_STAT, &mut zeroed()))
}

/// Set number `id`; `None` if there is none.
pub(crate) fn stat(id: i32) -> Result<Option<Set>> {
    let mut data: Data = zeroed();
    Ok(there(control(id, libc::IPC_STAT, &mut data))?
        .map(|()| Set { perm: Perm::of(&data.perm), count: data.nsems as u32 }))
}

/// Makes a set of `count` semaphores; gives its number. The caller's effective ids become its owner and creator.
///
/// # Errors
/// EEXIST if the key is taken; EINVAL for more than `kernel.sem` allows; ENOSPC for too many in all.
pub(crate) fn create(perm: &Perm, count: u32) -> Result<i32> {
    let count = i32::try_from(count).map_err(|_| Error::sys("semget", libc::EINVAL))?;
    // SAFETY: numbers only.
    super::id(unsafe { libc::semget(perm.key, count, new(perm)) }, "semget")
}

/// Sets owner and permissions.
pub(crate) fn set_owner(id: i32, perm: &Perm) -> Result<()> {
    let mut data: Data = zeroed();
    perm.set(&mut data.perm);
    control(id, libc::IPC_SET, &mut data).map(drop)
}

/// Values of set `id`, which has `count`.
pub(crate) fn values(id: i32, count: u32) -> Result<Vec<u16>> {
    // A set made anew under the number has no more than the kernel lets it have; ours is checked against it.
    let now = stat(id)?.map(|set| set.count);
    if now != Some(count) {
        return Err(Error::host("it is another one by now"));
    }
    let mut values = vec![0; count as usize];
    // SAFETY: as many values as the set has.
    let ret = unsafe { libc::semctl(id, 0, libc::GETALL, values.as_mut_ptr()) };
    errno::check(ret.into(), "semctl(GETALL)")?;
    Ok(values)
}

/// Gives set `id`, which has as many, its values.
///
/// # Errors
/// ERANGE for one above 32767.
pub(crate) fn set_values(id: i32, values: &[u16]) -> Result<()> {
    if stat(id)?.map(|set| set.count as usize) != Some(values.len()) {
        return Err(Error::bug("a set of semaphores and its values differ"));
    }
    // SAFETY: as many values as the set has.
    let ret = unsafe { libc::semctl(id, 0, libc::SETALL, values.as_ptr()) };
    errno::check(ret.into(), "semctl(SETALL)").map(drop)
}
