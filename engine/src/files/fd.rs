//! Descriptors: what is known of one before its kind is, its flags, and the owner of its signals.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::{
    fcntl::readlink,
    sys::{
        stat::{FileStat, SFlag, fstat},
        statfs::{FsType, fstatfs},
    },
};
use rcriu_images::pb;

use super::sk::SocketKind;
use crate::{
    dump::identity::FileKey,
    error::{Context, Error, Result, SysContext},
    ns::user::Ids,
    procfs::{ProcDir, fdinfo::FdInfo},
    pstree::{Numbering, RealPid},
    sys::fd::{self, Owner},
};

/// File system of anonymous inodes (`linux/magic.h`).
const ANON_INODE_FS_MAGIC: FsType = FsType(0x0904_1934);

/// What is known of a descriptor before anybody knows its kind.
#[derive(Debug)]
pub struct FdProbe {
    /// Whose it is.
    pub task: RealPid,
    /// Its number there; `None` for files that are no descriptors (cwd, mappings).
    pub fd: Option<i32>,
    /// fstat of the open file.
    pub stat: FileStat,
    /// Magic number of its file system (`statfs.f_type`).
    pub fs: FsType,
    /// What `/proc/PID/fd/N` says: a path, or a name in brackets.
    pub link: Vec<u8>,
    /// What `/proc/PID/fdinfo/N` says; O_CLOEXEC is taken out of the flags.
    pub info: FdInfo,
    /// Close-on-exec.
    pub cloexec: bool,
    /// It lies on the kernel's own tmpfs: a memfd, or shared memory without a name.
    pub shmem: bool,
    /// What it is, of a socket.
    pub socket: Option<SocketKind>,
}

/// A descriptor of a task together with a duplicate of ours.
#[derive(Debug)]
pub struct DrainedFd {
    /// What is known of it.
    pub probe: FdProbe,
    /// The same open file, in our process: whatever changes it, changes the task's.
    pub file: OwnedFd,
    /// Owner of its signals.
    pub fown: pb::FownEntry,
}

/// What is the same for all files of a file system, asked for once.
#[derive(Debug)]
pub struct Host {
    /// Device of the kernel's own tmpfs.
    pub shmem_dev: u64,
    /// Kinds of file systems by the number of a mount: an open file keeps its mount, and with it the number.
    mounts: HashMap<i32, FsType>,
    numbering: Numbering,
    ids: Ids,
}

impl Host {
    /// `shmem_dev` is the device of the kernel's own tmpfs, `numbering` and `ids` those of the tree.
    pub fn new(shmem_dev: u64, numbering: Numbering, ids: Ids) -> Host {
        Host { shmem_dev, mounts: HashMap::new(), numbering, ids }
    }

    fn file_system(&mut self, file: BorrowedFd<'_>, mount: Option<i32>) -> Result<FsType> {
        if let Some(known) = mount.and_then(|mount| self.mounts.get(&mount)) {
            return Ok(*known);
        }
        let kind = fstatfs(file).call("fstatfs")?.filesystem_type();
        self.mounts.extend(mount.map(|mount| (mount, kind)));
        Ok(kind)
    }
}

impl FdProbe {
    /// Looks at descriptor `fd` of a task, `file` being the same open file.
    pub fn of_fd(
        proc: &ProcDir,
        task: RealPid,
        fd: i32,
        file: BorrowedFd<'_>,
        host: &mut Host,
    ) -> Result<Self> {
        let info = FdInfo::read(proc, fd)?;
        Self::new(task, Some(fd), info, file, host)
    }

    /// Looks at an open file of ours that stands for something of a task's which is no descriptor.
    pub fn of_path(task: RealPid, file: BorrowedFd<'_>, host: &mut Host) -> Result<Self> {
        let proc = ProcDir::own()?;
        let mut info = FdInfo::read(&proc, file.as_raw_fd())?;
        // How we opened it says nothing about the task.
        (info.flags, info.pos) = (0, 0);
        Self::new(task, None, info, file, host)
    }

    fn new(
        task: RealPid,
        fd: Option<i32>,
        mut info: FdInfo,
        file: BorrowedFd<'_>,
        host: &mut Host,
    ) -> Result<Self> {
        let cloexec = info.flags & libc::O_CLOEXEC.cast_unsigned() != 0;
        info.flags &= !libc::O_CLOEXEC.cast_unsigned();
        let link = readlink(format!("/proc/self/fd/{}", file.as_raw_fd()).as_str()).call("readlink")?;
        let stat = fstat(file).call("fstat")?;
        let fs = host.file_system(file, info.mnt_id)?;
        Ok(FdProbe {
            task,
            fd,
            shmem: stat.st_dev == host.shmem_dev,
            stat,
            fs,
            socket: SocketKind::of(file, fs)?,
            link: std::os::unix::ffi::OsStringExt::into_vec(link),
            info,
            cloexec,
        })
    }

    /// Whether it is an anonymous inode (eventfd and its kin) of this name.
    pub(super) fn anonymous(&self, name: &str) -> bool {
        self.fs == ANON_INODE_FS_MAGIC
            && self.link.strip_prefix(b"anon_inode:".as_slice()).is_some_and(|link| link == name.as_bytes())
    }

    /// The error for lines of fdinfo that are not as documented.
    pub(super) fn strange(&self) -> Error {
        let lines = self.info.rest.join(&b' ');
        Error::host(format!(
            "fdinfo of {} is not understood: {}",
            self.place(),
            crate::procfs::excerpt(&lines)
        ))
    }

    /// `S_IFMT` bits.
    pub fn file_type(&self) -> SFlag {
        SFlag::from_bits_truncate(self.stat.st_mode & libc::S_IFMT)
    }

    /// How messages call it: `fd 7 of task 12`.
    pub fn place(&self) -> String {
        match self.fd {
            Some(fd) => format!("fd {fd} of task {}", self.task),
            None => format!("a file of task {}", self.task),
        }
    }

    /// The link as text for messages.
    pub fn link_text(&self) -> String {
        self.link.escape_ascii().to_string()
    }

    /// What descriptors of one open file have in common.
    pub(crate) fn key(&self) -> FileKey {
        FileKey {
            dev: self.stat.st_dev,
            ino: self.stat.st_ino,
            pos: self.info.pos,
            flags: self.info.flags,
            mnt_id: self.info.mnt_id.unwrap_or(-1),
            // All anonymous inodes share one inode number; the kernel numbers eventfds itself.
            more: self.info.value("eventfd-id").and_then(crate::procfs::number).unwrap_or(0),
        }
    }
}

impl DrainedFd {
    /// Looks at a descriptor of a task; `file` is the same open file.
    pub fn new(proc: &ProcDir, task: RealPid, fd: i32, file: OwnedFd, host: &mut Host) -> Result<Self> {
        let probe = FdProbe::of_fd(proc, task, fd, file.as_fd(), host)?;
        let fown = if probe.info.flags & libc::O_PATH.cast_unsigned() != 0 {
            pb::FownEntry::default()
        } else {
            dump_fown(file.as_fd(), host)?
        };
        Ok(DrainedFd { probe, file, fown })
    }

    /// The open file, opened once more for reading: a duplicate shares the position and may be write-only.
    pub fn reopen_for_reading(&self) -> Result<std::fs::File> {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        std::fs::File::open(path).call("open(/proc/self/fd)").during(|| self.probe.link_text())
    }
}

/// Reads owner and signal of an open file.
fn dump_fown(file: BorrowedFd<'_>, host: &Host) -> Result<pb::FownEntry> {
    let mut fown = pb::FownEntry { signum: fd::signal(file)?.cast_unsigned(), ..Default::default() };
    let owner = fd::owner(file)?;
    if owner.pid != 0 {
        let [uid, euid] = fd::owner_uids(file)?;
        fown.uid = host.ids.user(uid);
        fown.euid = host.ids.user(euid);
        fown.pid_type = owner.kind.cast_unsigned();
        fown.pid = host.numbering.virt(owner.pid).cast_unsigned();
    }
    Ok(fown)
}

/// Sets owner and signal of an open file as an image says.
pub(super) fn restore_fown(file: BorrowedFd<'_>, fown: &pb::FownEntry) -> Result<()> {
    let bad = |what: &str, value: u32| Error::image(format!("{what} {value} of the file's owner"));
    if fown.signum != 0 {
        let signal = i32::try_from(fown.signum).map_err(|_| bad("signal", fown.signum))?;
        fd::set_signal(file, signal)?;
    }
    if fown.pid == 0 {
        return Ok(());
    }
    let pid = i32::try_from(fown.pid).map_err(|_| bad("pid", fown.pid))?;
    let kind = i32::try_from(fown.pid_type).map_err(|_| bad("type", fown.pid_type))?;
    as_user(fown.uid, fown.euid, || {
        fd::set_owner(file, Owner { kind, pid }).during(|| format!("owner of its signals, pid {pid}"))
    })
}

/// Runs `f` with real and effective user as given: the kernel notes who asks for signals.
fn as_user(uid: u32, euid: u32, f: impl FnOnce() -> Result<()>) -> Result<()> {
    use nix::unistd::{Uid, getresuid, setresuid};
    let now = getresuid().call("getresuid")?;
    if (now.real.as_raw(), now.effective.as_raw()) == (uid, euid) {
        return f();
    }
    setresuid(Uid::from_raw(uid), Uid::from_raw(euid), now.saved).call("setresuid")?;
    let result = f();
    setresuid(now.real, now.effective, now.saved).call("setresuid")?;
    // Changing the effective user made us undumpable: other tasks could not take files from us.
    nix::sys::prctl::set_dumpable(true).call("prctl(PR_SET_DUMPABLE)")?;
    result
}
