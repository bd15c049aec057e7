//! The ipc namespace: its limits and its System V objects (ipc_namespaces(7)), in `ipcns-*-ID.img`.
//!
//! ```text
//! var    limits: kernel.sem, .msgmax, .shmmax ..., fs.mqueue.*        ipcns-var
//! shm    segments, their content in pagemap-shmem-SEGMENT or inline   ipcns-shm
//! msg    queues with their messages                                   ipcns-msg
//! sem    sets of semaphores with their values                         ipcns-sem
//! ```
//! All objects keep number, key, owner, creator and permissions. Limits may have been lowered below what was there
//! already, so a restore raises them before it makes objects and gives them their values afterwards. Which process
//! used an object last, and when, is not kept; adjustments at exit (SEM_UNDO) belong to tasks, see
//! [`mm::sysv`](crate::mm::sysv). POSIX message queues are files of a mount.
//!
//! Owners in images are ids of the user namespace of the tree.

mod msg;
mod sem;
mod shm;
mod var;

pub use shm::Attachments;

use std::collections::BTreeSet;

use rcriu_images::{ImageDir, pb};

use super::user::{UNMAPPED, UserNs};
use crate::{
    error::{Context, Error, Result},
    mm::pages::PageStore,
    sys::{ids, sysv::Perm},
};

/// What a dump needs.
#[derive(Debug, Clone, Copy)]
pub struct DumpIpc<'a> {
    /// Number of the namespace in images.
    pub id: u32,
    pub images: &'a ImageDir,
    pub store: &'a PageStore,
    /// The tree's user namespace, if it has one of its own.
    pub user: Option<&'a UserNs>,
    /// Numbers of `pagemap-shmem` images of other memory. A segment of such a number has its content inline.
    pub taken: &'a BTreeSet<u64>,
    /// How often the tree has each segment attached; not compared if absent.
    pub attached: Option<&'a Attachments>,
}

/// Writes all images of the namespace of the calling thread, see [`inside`](super::enter::inside). Gives the numbers of
/// `pagemap-shmem` images that it has written.
///
/// World: Dump. All tasks of the namespace must be frozen, and all other shared memory known.
///
/// # Errors
/// A segment that cannot be read; owners without a mapping; a queue whose messages cannot be looked at.
pub fn dump(cx: &DumpIpc<'_>) -> Result<BTreeSet<u64>> {
    let dumped = || {
        let vars = var::dump(cx)?;
        let numbers = shm::dump(cx, vars.shm_rmid_forced != 0)?;
        msg::dump(cx)?;
        sem::dump(cx)?;
        Ok::<_, Error>(numbers)
    };
    dumped().during(named)
}

/// Everything in the images of a namespace but for the content of segments.
#[derive(Debug, Clone, PartialEq)]
pub struct Ipc {
    id: u32,
    vars: pb::IpcVarEntry,
    segments: Vec<pb::IpcShmEntry>,
    queues: Vec<msg::Queue>,
    sets: Vec<sem::Set>,
}

/// Reads and checks all images of a namespace. World: Plan.
///
/// # Errors
/// Images that are missing, damaged, or say what no kernel can do.
pub fn read(images: &ImageDir, id: u32) -> Result<Ipc> {
    Ok(Ipc {
        id,
        vars: var::read(images, id)?,
        segments: shm::read(images, id)?,
        queues: msg::read(images, id)?,
        sets: sem::read(images, id)?,
    })
}

impl Ipc {
    /// Makes everything in the namespace of the calling thread, which is new and empty.
    ///
    /// World: Task, in the root of the tree, which is root of the tree's user namespace, before memory is mapped and
    /// children are forked. With `own_users` the tree has a user namespace of its own; then this is for kernels where its
    /// root may write limits (Linux 5.19), and does nothing on others: [`Ipc::restore_from_outside`] has done it.
    ///
    /// # Errors
    /// What the kernel refuses, for which object. What was made goes with the namespace.
    pub fn restore(&self, images: &ImageDir, own_users: bool) -> Result<()> {
        if own_users && !var::belong_to(0).during(named)? {
            return Ok(());
        }
        self.make(images, &Owners { user: None }).during(named)
    }

    /// The same from outside, where root of the tree's user namespace may not: the calling thread has entered the ipc
    /// namespace, see [`inside`](super::enter::inside), but is in the user namespace above that of the tree, `user`.
    ///
    /// World: the engine, while the root of the tree waits with its maps written.
    pub fn restore_from_outside(&self, images: &ImageDir, user: &UserNs) -> Result<()> {
        match user.uid_outside(0) {
            Some(root) if var::belong_to(root).during(named)? => Ok(()),
            _ => self.make(images, &Owners { user: Some(user) }).during(named),
        }
    }

    fn make(&self, images: &ImageDir, owners: &Owners<'_>) -> Result<()> {
        var::raise(self)?;
        shm::restore(self, images, owners)?;
        msg::restore(&self.queues, owners)?;
        sem::restore(&self.sets, owners)?;
        var::restore(&self.vars)
    }

    /// All tasks have attached their segments: what was to go with its last user is told so, what was locked is locked.
    ///
    /// World: the engine, in a thread that has entered the namespace, or a task of the tree's with its rights.
    pub fn attached(&self) -> Result<()> {
        shm::attached(&self.segments).and_then(|()| var::forced(&self.vars)).during(named)
    }

    /// Whether there is a segment `number`: mappings name theirs.
    pub fn has_segment(&self, number: u64) -> bool {
        self.segments.iter().any(|e| u64::from(e.desc.id) == number)
    }
}

fn named() -> String {
    "ipc namespace".to_owned()
}

/// Whose objects are, as images have it, for the caller's user namespace.
struct Owners<'a> {
    /// `None` if the caller is in the user namespace of the tree.
    user: Option<&'a UserNs>,
}

impl Owners<'_> {
    fn perm(&self, desc: &pb::IpcDescEntry) -> Result<Perm> {
        let uid = |id| self.user.map_or(Some(id), |user| user.uid_outside(id));
        let gid = |id| self.user.map_or(Some(id), |user| user.gid_outside(id));
        let lost = || Error::image(format!("its owner {}:{} is not mapped", desc.uid, desc.gid));
        Ok(Perm {
            key: desc.key.cast_signed(),
            uid: uid(desc.uid).ok_or_else(lost)?,
            gid: gid(desc.gid).ok_or_else(lost)?,
            cuid: uid(desc.cuid).unwrap_or(UNMAPPED),
            cgid: gid(desc.cgid).unwrap_or(UNMAPPED),
            mode: desc.mode,
        })
    }
}

/// Makes an object with `create` as its creator, which gives the number it got. Another than that of the images means
/// that it was taken: the caller may not leave it, but the namespace goes.
fn made(
    desc: &pb::IpcDescEntry,
    perm: &Perm,
    next: &str,
    create: impl FnOnce() -> Result<i32>,
) -> Result<()> {
    var::write(next, &desc.id)?;
    // Somebody without a mapping cannot be one's creator again.
    let got = match perm.cuid == UNMAPPED || perm.cgid == UNMAPPED {
        true => create()?,
        false => ids::acting_as(perm.cuid, perm.cgid, create)?,
    };
    if got.cast_unsigned() == desc.id {
        return Ok(());
    }
    Err(Error::host(format!("its number is in use; it got {got}")))
}

/// The entry of an object.
fn desc(cx: &DumpIpc<'_>, id: i32, perm: &Perm) -> Result<pb::IpcDescEntry> {
    let uid = |id| cx.user.map_or(id, |user| user.image_uid(id));
    let gid = |id| cx.user.map_or(id, |user| user.image_gid(id));
    let desc = pb::IpcDescEntry {
        key: perm.key.cast_unsigned(),
        uid: uid(perm.uid),
        gid: gid(perm.gid),
        cuid: uid(perm.cuid),
        cgid: gid(perm.cgid),
        mode: perm.mode,
        id: id.cast_unsigned(),
    };
    if desc.uid == UNMAPPED || desc.gid == UNMAPPED {
        let (uid, gid) = (perm.uid, perm.gid);
        return Err(Error::unsupported(format!("its owner {uid}:{gid} is not mapped in the user namespace"))
            .remedy("remove it with ipcrm"));
    }
    Ok(desc)
}

/// Numbers of objects, each in its image once and such as a kernel gives.
#[derive(Debug, Default)]
struct Numbers(BTreeSet<u32>);

impl Numbers {
    fn take(&mut self, desc: &pb::IpcDescEntry) -> Result<()> {
        if desc.id > i32::MAX as u32 {
            return Err(Error::image("no object can have its number"));
        }
        if !self.0.insert(desc.id) {
            return Err(Error::image("there are two of its number"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
