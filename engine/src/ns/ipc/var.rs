//! Limits of the ipc namespace, as files below /proc/sys: which of the dump, and which while objects are made.

use std::fmt::Display;

use rcriu_images::{ImageDir, ImageKind, pagemap::PAGE_SIZE, pb};

use super::{DumpIpc, Ipc};
use crate::{
    error::{Error, Result, SysContext},
    procfs::{self, excerpt, number, words},
};

/// Number of the next segment, as for the other kinds (CONFIG_CHECKPOINT_RESTORE).
pub(super) const SHM_NEXT: &str = "kernel/shm_next_id";
pub(super) const MSG_NEXT: &str = "kernel/msg_next_id";
pub(super) const SEM_NEXT: &str = "kernel/sem_next_id";
/// Segments go with their last user and their creator.
const FORCED: &str = "kernel/shm_rmid_forced";
/// What the kernel has instead of a next number.
const NONE: u32 = u32::MAX;
/// Values of `kernel.sem`: in a set, in all, in a call, sets.
const SEM: usize = 4;

fn path(name: &str) -> String {
    format!("/proc/sys/{name}")
}

/// The words of a file; `None` if there is no such file.
fn read_words(name: &str) -> Result<Option<Vec<u8>>> {
    let path = path(name);
    match procfs::sysctl(&path) {
        Err(e) if e.errno() == Some(libc::ENOENT) => Ok(None),
        other => other.map(Some),
    }
}

fn strange(name: &str, content: &[u8]) -> Error {
    Error::host(format!("{} is not understood: {}", path(name), excerpt(content)))
}

/// A number that may be missing on this kernel.
fn opt<T: std::str::FromStr>(name: &str) -> Result<Option<T>> {
    let Some(bytes) = read_words(name)? else { return Ok(None) };
    match words(&bytes).next().and_then(number) {
        Some(value) => Ok(Some(value)),
        None => Err(strange(name, &bytes)),
    }
}

fn one<T: std::str::FromStr>(name: &str) -> Result<T> {
    opt(name)?.ok_or_else(|| Error::sys(format!("open({})", path(name)), libc::ENOENT))
}

/// Some are shown signed.
fn signed(name: &str) -> Result<u32> {
    one::<i64>(name).map(|value| value as u32)
}

/// The number that was chosen for the next object, if there was one.
fn next(name: &str) -> Result<Option<u32>> {
    Ok(opt::<i32>(name)?.map(i32::cast_unsigned).filter(|next| *next != NONE))
}

/// Whether limits are files of user `root`, who is root of a user namespace: then he may write them.
pub(super) fn belong_to(root: u32) -> Result<bool> {
    let path = path("kernel/sem");
    nix::sys::stat::stat(path.as_str()).call(format!("stat({path})")).map(|stat| stat.st_uid == root)
}

/// Sets a file, unless it says so already; `value` is one number or several.
pub(super) fn write(name: &str, value: &impl Display) -> Result<()> {
    let (path, value) = (path(name), value.to_string());
    if procfs::sysctl(&path).is_ok_and(|now| words(&now).eq(words(value.as_bytes()))) {
        return Ok(());
    }
    std::fs::write(&path, &value).call(format!("write({path}) of {value}"))
}

fn write_if_there(name: &str, value: &impl Display) -> Result<()> {
    match write(name, value) {
        Err(e) if e.errno() == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}

/// Writes `ipcns-var-ID.img` and gives what it says.
pub(super) fn dump(cx: &DumpIpc<'_>) -> Result<pb::IpcVarEntry> {
    let entry = current()?;
    let mut out = cx.images.writer(ImageKind::IpcVar, cx.id.into());
    out.write(&entry)?;
    out.finish()?;
    Ok(entry)
}

/// The limits of the calling thread's namespace.
pub(super) fn current() -> Result<pb::IpcVarEntry> {
    let sem = read_words("kernel/sem")?.unwrap_or_default();
    let sem_ctls: Option<Vec<u32>> =
        words(&sem).map(|word| number::<i64>(word).map(|value| value as u32)).collect();
    let sem_ctls = sem_ctls.filter(|v| v.len() == SEM).ok_or_else(|| strange("kernel/sem", &sem))?;
    // A kernel may be without POSIX message queues.
    let mq = |name: &str| opt(&format!("fs/mqueue/{name}"));
    Ok(pb::IpcVarEntry {
        sem_ctls,
        msg_ctlmax: signed("kernel/msgmax")?,
        msg_ctlmnb: signed("kernel/msgmnb")?,
        msg_ctlmni: signed("kernel/msgmni")?,
        // Without effect since Linux 3.19.
        auto_msgmni: opt("kernel/auto_msgmni")?.unwrap_or_default(),
        shm_ctlmax: one("kernel/shmmax")?,
        shm_ctlall: one("kernel/shmall")?,
        shm_ctlmni: signed("kernel/shmmni")?,
        shm_rmid_forced: one(FORCED)?,
        mq_queues_max: mq("queues_max")?.unwrap_or_default(),
        mq_msg_max: mq("msg_max")?.unwrap_or_default(),
        mq_msgsize_max: mq("msgsize_max")?.unwrap_or_default(),
        mq_msg_default: mq("msg_default")?,
        mq_msgsize_default: mq("msgsize_default")?,
        msg_next_id: next(MSG_NEXT)?,
        sem_next_id: next(SEM_NEXT)?,
        shm_next_id: next(SHM_NEXT)?,
    })
}

/// Reads and checks `ipcns-var-ID.img`.
pub(super) fn read(images: &ImageDir, id: u32) -> Result<pb::IpcVarEntry> {
    let entry: pb::IpcVarEntry = images.read_one(ImageKind::IpcVar, id.into())?;
    if entry.sem_ctls.len() != SEM {
        return Err(Error::image(format!(
            "{}: kernel.sem has {} values instead of {SEM}",
            ImageKind::IpcVar.file_name(id.into()),
            entry.sem_ctls.len()
        )));
    }
    Ok(entry)
}

/// Limits that let all objects be made: not below those there are now.
pub(super) fn raise(ipc: &Ipc) -> Result<()> {
    let now = current()?;
    // The kernel's own are ints, shown as unsigned here.
    let more = |name: &str, now: u32, need: u64| match need > u64::from(now) {
        true => write(name, &need),
        false => Ok(()),
    };
    let count = |n: usize| n as u64;
    let biggest = ipc.segments.iter().map(|e| e.size).max().unwrap_or(0);
    let pages = ipc.segments.iter().fold(0u64, |sum, e| sum.saturating_add(e.size.div_ceil(PAGE_SIZE)));
    if biggest > now.shm_ctlmax {
        write("kernel/shmmax", &biggest)?;
    }
    if pages > now.shm_ctlall {
        write("kernel/shmall", &pages)?;
    }
    more("kernel/shmmni", now.shm_ctlmni, count(ipc.segments.len()))?;
    more("kernel/msgmni", now.msg_ctlmni, count(ipc.queues.len()))?;
    let longest = ipc.queues.iter().map(|q| q.longest()).max().unwrap_or(0);
    more("kernel/msgmax", now.msg_ctlmax, longest)?;
    let fullest = ipc.queues.iter().map(|q| q.room()).max().unwrap_or(0);
    more("kernel/msgmnb", now.msg_ctlmnb, fullest)?;
    let in_set = ipc.sets.iter().map(|s| s.values.len()).max().unwrap_or(0);
    let in_all = ipc.sets.iter().map(|s| s.values.len()).sum();
    let needs = [count(in_set), count(in_all), 0, count(ipc.sets.len())];
    let sem: Vec<u64> = now.sem_ctls.iter().zip(needs).map(|(now, need)| need.max((*now).into())).collect();
    if sem.iter().zip(&now.sem_ctls).any(|(want, now)| *want != u64::from(*now)) {
        write("kernel/sem", &joined(&sem))?;
    }
    // Content is filled in by attaching: that may not be the end of a segment.
    if now.shm_rmid_forced != 0 { write(FORCED, &0) } else { Ok(()) }
}

fn joined(values: &[impl Display]) -> String {
    values.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

/// Gives the namespace the limits of the dump, but for [`forced`].
pub(super) fn restore(vars: &pb::IpcVarEntry) -> Result<()> {
    write("kernel/sem", &joined(&vars.sem_ctls))?;
    write("kernel/msgmax", &vars.msg_ctlmax)?;
    write("kernel/msgmnb", &vars.msg_ctlmnb)?;
    write("kernel/msgmni", &vars.msg_ctlmni)?;
    write_if_there("kernel/auto_msgmni", &vars.auto_msgmni)?;
    write("kernel/shmmax", &vars.shm_ctlmax)?;
    write("kernel/shmall", &vars.shm_ctlall)?;
    write("kernel/shmmni", &vars.shm_ctlmni)?;
    // No kernel has these at 0: there were no POSIX message queues at the dump.
    if vars.mq_msg_max != 0 || vars.mq_msgsize_max != 0 {
        let mq = |name: &str, value: &u32| write_if_there(&format!("fs/mqueue/{name}"), value);
        mq("queues_max", &vars.mq_queues_max)?;
        mq("msg_max", &vars.mq_msg_max)?;
        mq("msgsize_max", &vars.mq_msgsize_max)?;
        vars.mq_msg_default.map_or(Ok(()), |value| mq("msg_default", &value))?;
        vars.mq_msgsize_default.map_or(Ok(()), |value| mq("msgsize_default", &value))?;
    }
    for (name, value) in
        [(MSG_NEXT, vars.msg_next_id), (SEM_NEXT, vars.sem_next_id), (SHM_NEXT, vars.shm_next_id)]
    {
        if let Some(value) = value.filter(|v| *v != NONE) {
            write(name, &value)?;
        }
    }
    Ok(())
}

/// Segments without users go, if that was so: all must have been attached.
pub(super) fn forced(vars: &pb::IpcVarEntry) -> Result<()> {
    if vars.shm_rmid_forced != 0 { write(FORCED, &vars.shm_rmid_forced) } else { Ok(()) }
}

/// Keeps segments that nobody has attached from going when the dump detaches them; put back on drop.
#[derive(Debug)]
pub(super) struct Unforced(());

impl Unforced {
    pub(super) fn new() -> Result<Unforced> {
        write(FORCED, &0).map(|()| Unforced(()))
    }

    /// Puts it back.
    pub(super) fn end(self) -> Result<()> {
        std::mem::forget(self);
        write(FORCED, &1)
    }
}

impl Drop for Unforced {
    fn drop(&mut self) {
        if let Err(e) = write(FORCED, &1) {
            log::error!("ipc namespace: it is no longer as it was: {e}");
        }
    }
}
