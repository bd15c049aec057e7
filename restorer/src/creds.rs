//! Credentials of a thread.
//!
//! The order keeps every right until the last step that needs it: while the securebit
//! `NO_SETUID_FIXUP` stands, changing ids touches no capability.
//!
//! # Safety
//! Calls with numbers, and with structures in the arena or on the stack.

use blobrt::syscall::{nr, syscall1, syscall2, syscall3, syscall5};
use restorer::{
    ThreadArgs,
    args::Creds,
    report::{Call, Object},
};

use crate::{
    fail::{Failed, On},
    image::Task,
    label::Label,
    memory::prctl,
};

const PR_CAPBSET_DROP: usize = 24;
const PR_GET_SECUREBITS: usize = 27;
const PR_SET_SECUREBITS: usize = 28;
const PR_SET_NO_NEW_PRIVS: usize = 38;
const PR_CAP_AMBIENT: usize = 47;
const PR_CAP_AMBIENT_RAISE: usize = 2;
const PR_CAP_AMBIENT_CLEAR_ALL: usize = 4;
const SECBIT_NO_SETUID_FIXUP: usize = 1 << 2;
/// Makes capget and capset take 64-bit sets.
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

/// Gives the calling thread the credentials of `me`.
pub fn restore(task: &Task, me: &ThreadArgs, label: Label) -> Result<(), Failed> {
    let c = task.row(task.args.creds, me.creds)?;
    if c.change != 0 {
        change(task, c)?;
    }
    // A profile may deny all of the above, and with no_new_privs there may be no way to it.
    label.write(task, c)?;
    if c.no_new_privs != 0 {
        prctl(PR_SET_NO_NEW_PRIVS, 1, Object::Creds)?;
    }
    Ok(())
}

/// Most supplementary groups that are compared with those that are there.
const COMPARED: usize = 64;

/// Whether these are the supplementary groups, in this order, of the calling thread.
fn has_groups(groups: &[u32]) -> bool {
    let mut now = [0u32; COMPARED];
    // SAFETY: no more are written than there is room for.
    match unsafe { syscall2(nr::GETGROUPS, COMPARED, now.as_mut_ptr() as usize) } {
        Ok(n) => now.get(..n) == Some(groups),
        Err(_) => false,
    }
}

fn change(task: &Task, c: &Creds) -> Result<(), Failed> {
    let groups = task.table(c.groups);
    // A user namespace may deny setgroups(2), also to who asks for what is there.
    if !has_groups(groups) {
        // SAFETY: the list is in the arena.
        unsafe { syscall2(nr::SETGROUPS, groups.len(), groups.as_ptr() as usize) }.on(
            Call::Setgroups,
            Object::Creds,
            groups.len() as u64,
            0,
        )?;
    }
    // Each of these takes a right, which who restores without being root may lack, and may not need.
    if !has_ids(c) {
        prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, Object::Creds)?;
        ids(c)?;
    }
    // Inheritable capabilities must lie in the bounding set when they are added, not later. All
    // permitted ones stay for now.
    let all = capget()?;
    capset(Sets { inheritable: c.inheritable, ..all })?;
    for cap in bits(c.bounding_drop) {
        prctl(PR_CAPBSET_DROP, cap, Object::Cap)?;
    }
    if c.ambient != 0 {
        let clear = PR_CAP_AMBIENT_CLEAR_ALL;
        // SAFETY: numbers only.
        unsafe { syscall5(nr::PRCTL, PR_CAP_AMBIENT, clear, 0, 0, 0) }.on(Call::Prctl, Object::Cap, 0, 0)?;
    }
    for cap in bits(c.ambient) {
        // SAFETY: numbers only.
        unsafe { syscall5(nr::PRCTL, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap, 0, 0) }.on(
            Call::Prctl,
            Object::Cap,
            cap as u64,
            0,
        )?;
    }
    if prctl(PR_GET_SECUREBITS, 0, Object::Creds)? != c.securebits as usize {
        prctl(PR_SET_SECUREBITS, c.securebits as usize, Object::Creds)?;
    }
    capset(Sets { effective: c.effective, permitted: c.permitted, inheritable: c.inheritable })?;
    Ok(())
}

/// Whether all users and groups but the supplementary ones are those.
fn has_ids(c: &Creds) -> bool {
    let (mut uid, mut gid) = ([0u32; 3], [0u32; 3]);
    let [u, g] = [&mut uid, &mut gid].map(|ids| ids.as_mut_ptr() as usize);
    // SAFETY: three numbers each are written to locals; -1 is no id, with it nothing is set and the present one told.
    let (got, fs) = unsafe {
        let got = [
            syscall3(nr::GETRESUID, u, u + 4, u + 8).is_ok(),
            syscall3(nr::GETRESGID, g, g + 4, g + 8).is_ok(),
        ];
        (got, [syscall1(nr::SETFSUID, usize::MAX), syscall1(nr::SETFSGID, usize::MAX)])
    };
    let same = |wanted: [u32; 4], now: [u32; 3], fs| wanted[..3] == now && fs == Ok(wanted[3] as usize);
    got == [true, true] && same(c.uid, uid, fs[0]) && same(c.gid, gid, fs[1])
}

/// Groups before users: after the user is changed there may be no right left to change the group.
fn ids(c: &Creds) -> Result<(), Failed> {
    let [gid, egid, sgid, fsgid] = c.gid.map(|id| id as usize);
    let [uid, euid, suid, fsuid] = c.uid.map(|id| id as usize);
    // SAFETY: numbers only. The fs calls cannot fail but may refuse silently, so they are read back.
    unsafe {
        syscall3(nr::SETRESGID, gid, egid, sgid).on(Call::Setresgid, Object::Creds, gid as u64, 0)?;
        let _ = syscall1(nr::SETFSGID, fsgid);
        if syscall1(nr::SETFSGID, fsgid) != Ok(fsgid) {
            return Err(Failed::new(Call::Setfsgid, Object::Creds, 1, fsgid as u64, 0));
        }
        syscall3(nr::SETRESUID, uid, euid, suid).on(Call::Setresuid, Object::Creds, uid as u64, 0)?;
        let _ = syscall1(nr::SETFSUID, fsuid);
        if syscall1(nr::SETFSUID, fsuid) != Ok(fsuid) {
            return Err(Failed::new(Call::Setfsuid, Object::Creds, 1, fsuid as u64, 0));
        }
    }
    Ok(())
}

/// The three sets of capset(2).
struct Sets {
    effective: u64,
    permitted: u64,
    inheritable: u64,
}

fn capget() -> Result<Sets, Failed> {
    let header = [CAPABILITY_VERSION_3, 0];
    let mut data = [0u32; 6];
    // SAFETY: header and both data elements are locals.
    unsafe { syscall2(nr::CAPGET, header.as_ptr() as usize, data.as_mut_ptr() as usize) }.on(
        Call::Capset,
        Object::Creds,
        0,
        0,
    )?;
    let set = |i: usize| u64::from(data[i]) | u64::from(data[i + 3]) << 32;
    Ok(Sets { effective: set(0), permitted: set(1), inheritable: set(2) })
}

fn capset(sets: Sets) -> Result<(), Failed> {
    let header = [CAPABILITY_VERSION_3, 0];
    let mut data = [0u32; 6];
    for (i, set) in [sets.effective, sets.permitted, sets.inheritable].into_iter().enumerate() {
        data[i] = set as u32;
        data[i + 3] = (set >> 32) as u32;
    }
    // SAFETY: header and both data elements are locals.
    unsafe { syscall2(nr::CAPSET, header.as_ptr() as usize, data.as_ptr() as usize) }.on(
        Call::Capset,
        Object::Creds,
        sets.permitted,
        sets.inheritable,
    )?;
    Ok(())
}

fn bits(mask: u64) -> impl Iterator<Item = usize> {
    (0..64).filter(move |n| mask >> n & 1 != 0)
}
