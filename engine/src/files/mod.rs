//! Open files: one kind per file, dump and restore side by side.
//!
//! An open file (the kernel's `struct file`) has one [`FileId`] and any number of users: descriptors in any
//! table, mappings, a cwd. On dump, [`FilesOut`] takes every descriptor of every task, gives each open file
//! its id once and asks the one [`FileKind`] that claims it for the image entry. On restore, [`FilesPlan`]
//! decides before the first fork who opens what and in which order, and [`FilesTask`] walks a task's steps.
//!
//! ```text
//! dump     FilesOut::task_fds   -> FdProbe -> KINDS.claims -> kind.dump  -> files.img
//!          FilesOut::path_file  -> (exe, cwd, root, mappings)            -> files.img
//! plan     FilesPlan::build     -> kind.collect -> RestoredFile, owner, rank
//! task     FilesTask::restore   -> open, give, receive, install, finish
//!          FilesTask::open_path -> (exe, cwd, root, mappings)
//! ```

use std::{
    cell::RefCell,
    collections::HashMap,
    fmt,
    os::fd::{BorrowedFd, OwnedFd},
};

use nix::{
    fcntl::{AT_FDCWD, AtFlags},
    sys::{
        stat::{FileStat, fstatat},
        statfs::FsType,
    },
};
pub use rcriu_images::pb::FdTypes as FdType;
use rcriu_images::{ImageDir, pb};

pub use self::sk::Revived;
use crate::{
    error::{Error, Result},
    netlock::Connection,
    options::RestoreOptions,
    pstree::FileId,
};

mod bpf;
mod bpfmap;
mod build_id;
mod by_id;
mod eventfd;
mod eventpoll;
mod fanotify;
mod fd;
mod fdpass;
mod fifo;
mod ghost;
mod inotify;
mod lease;
mod lock;
mod memfd;
mod nsfile;
mod out;
mod pidfd;
mod pipe;
mod plan;
mod refuse;
mod reg;
mod root;
#[cfg(test)]
mod roundtrip;
mod shared;
mod signalfd;
pub(crate) mod sk;
pub mod spaces;
mod task;
mod timerfd;
mod tty;
mod tun;
mod uring;
mod watch;

pub use bpf::restore_left as restore_programs;
pub use by_id::ById;
pub use fd::{DrainedFd, FdProbe};
pub use ghost::{Lost, Source};
pub use out::{FilesOut, PathUse};
pub use plan::{FilesPlan, PlanFiles, Table, TableIx, Zone};
pub use root::{Path, Place, Root, Roots, Where};
pub use shared::FilesShared;
pub use sk::Connections;
pub use spaces::{Space, Spaces};
pub use task::FilesTask;
pub use tty::OpenMasters;
pub use tun::join as join_tuns;

/// One kind of open file: how it is recognised, dumped, and read back from an image.
pub trait FileKind: fmt::Debug + Sync {
    /// The tag in images and the name in logs.
    fn fd_type(&self) -> FdType;

    /// Whether this kind knows how to dump `fd`. Exactly one kind may claim a descriptor; one that no
    /// kind claims is refused by name.
    fn claims(&self, fd: &FdProbe) -> bool;

    /// Dumps the open file behind `fd`, called once per open file. Side images are written through `out`;
    /// the entry returned goes to files.img.
    fn dump(&self, fd: &DrainedFd, id: FileId, out: &mut FilesOut<'_>) -> Result<pb::FileEntry>;

    /// Whether [`FileKind::complete`] is wanted: the entry is then kept until all descriptors are known.
    fn is_late(&self) -> bool {
        false
    }

    /// Completes an entry once all descriptors of all tasks are known. `fd` is the descriptor it came from.
    fn complete(&self, _entry: &mut pb::FileEntry, _fd: &FdProbe, _out: &mut FilesOut<'_>) -> Result<()> {
        Ok(())
    }

    /// Reads an entry of files.img. No lasting system call: this runs before anything is created.
    fn collect(&self, entry: &pb::FileEntry, plan: &mut PlanFiles<'_>) -> Result<Box<dyn RestoredFile>>;
}

/// An open file that will be restored, part of the immutable [`FilesPlan`].
pub trait RestoredFile: fmt::Debug + Send + Sync {
    /// How messages and the plan's log call it: `pipe:[4711]`, `/var/log/x`.
    fn name(&self) -> String;

    /// What must be restored together with it or before it.
    fn needs(&self) -> Needs {
        Needs::default()
    }

    /// What is known to fail already, asked before anything is created.
    fn preflight(&self, _cx: &Preflight<'_>) -> Result<()> {
        Ok(())
    }

    /// Makes the open file. Called once, in the task that owns it; members of a group one after the other
    /// in the order of their ids.
    fn open(&self, cx: &mut FilesTask<'_>) -> Result<OwnedFd>;

    /// Whether [`RestoredFile::finish`] does anything: else there is no step for it.
    fn has_finish(&self) -> bool {
        true
    }

    /// Completes it once everything in [`Needs::at_hand`] is open. Called once, in the owner.
    fn finish(&self, _fd: BorrowedFd<'_>, _cx: &mut FilesTask<'_>) -> Result<()> {
        Ok(())
    }

    /// Owner and signal settings (`F_SETOWN_EX`, `F_SETSIG`); set after `open`.
    fn fown(&self) -> Option<&pb::FownEntry> {
        None
    }

    /// The inode has no name (any more): where its content is, and how it was known.
    fn lost(&self) -> Option<(Source<'_>, Lost<'_>)> {
        None
    }

    /// The connection it is an end of: its packets are locked out until tasks run.
    fn connection(&self) -> Option<Connection> {
        None
    }

    /// Number of the network namespace it belongs to, of sockets and the like: `open` and `revive` are called there.
    fn network(&self) -> Option<u32> {
        None
    }

    /// Makes it in the engine, before the first fork, if that is the only place where it can be made: then
    /// `open` finds it as `FilesTask::revived`. `close` says that connections come back closed.
    fn revive(&self, _close: bool, _images: &ImageDir) -> Result<Option<Revived>> {
        Ok(None)
    }

    /// Whether it is opened in the engine, before the first fork: it comes from outside, where the tree's users may not
    /// reach it.
    fn is_given(&self, _opts: &RestoreOptions) -> bool {
        false
    }

    /// Opens it there; then `open` finds it as `FilesTask::given`. `outside` is the descriptor that an option gives for it.
    fn give(&self, _outside: Option<OwnedFd>) -> Result<OwnedFd> {
        Err(Error::bug("a file that nobody gives"))
    }

    /// Control groups it is attached to, once they are there and everybody is in.
    fn groups(&self) -> &[pb::RcriuBpfGroup] {
        &[]
    }

    /// How many descriptors beside those of the table opening it needs for a while.
    fn spare(&self) -> usize {
        0
    }

    /// Opens the same inode once more, as a mapping or a cwd needs it. `None` if that makes no sense.
    fn open_again(&self, _how: OpenHow, _cx: &mut FilesTask<'_>) -> Option<Result<OwnedFd>> {
        None
    }
}

/// Files that are opened together, by one owner.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct GroupKey {
    /// What they are parts of; numbers of different kinds do not meet.
    pub kind: FdType,
    /// Number of that whole in the images: a pipe id, a pty's index.
    pub number: u64,
}

/// What a file needs of others.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Needs {
    /// It is opened together with the others of this key: both ends of a pipe, a pty pair.
    pub group: Option<GroupKey>,
    /// Files that must be open before `open` is called.
    pub opened: Vec<FileId>,
    /// Files that `finish` must have at hand in the owner: [`FilesTask::at_hand`].
    pub at_hand: Vec<FileId>,
}

/// How [`RestoredFile::open_again`] opens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OpenHow {
    /// Flags of open(2); O_CLOEXEC is added.
    pub flags: i32,
}

/// What [`RestoredFile::preflight`] may look at.
#[derive(Debug)]
pub struct Preflight<'a> {
    /// The image folder.
    pub images: &'a ImageDir,
    /// What was asked for.
    pub opts: &'a RestoreOptions,
    /// Paths are those of a mount namespace that is not there yet.
    pub elsewhere: bool,
    /// What was found at paths, without and with following a link at the end: files are often open many times.
    found: [RefCell<HashMap<Vec<u8>, nix::Result<FileStat>>>; 2],
}

impl<'a> Preflight<'a> {
    /// Of these images and options.
    pub fn new(images: &'a ImageDir, opts: &'a RestoreOptions, elsewhere: bool) -> Self {
        Preflight { images, opts, elsewhere, found: Default::default() }
    }

    /// Whether the file called `name` in images comes from outside (`--inherit-fd`).
    pub(crate) fn inherited(&self, name: impl FnOnce() -> String) -> bool {
        let given = &self.opts.inherit_fds;
        !given.is_empty() && {
            let name = name();
            given.iter().any(|fd| fd.is_for(&name))
        }
    }

    /// What is at `path`, asked for once; `follow` a link at its end or look at the link.
    pub(crate) fn stat(&self, path: &[u8], follow: bool) -> nix::Result<FileStat> {
        let mut found = self.found[usize::from(follow)].borrow_mut();
        if let Some(known) = found.get(path) {
            return *known;
        }
        let flags = if follow { AtFlags::empty() } else { AtFlags::AT_SYMLINK_NOFOLLOW };
        let stat = fstatat(AT_FDCWD, path, flags);
        found.insert(path.to_vec(), stat);
        stat
    }
}

/// File system of pipes without a name (`linux/magic.h`).
const PIPEFS_MAGIC: FsType = FsType(0x5049_5045);

/// All kinds. The order does not matter: claims exclude each other.
static KINDS: &[&dyn FileKind] = &[
    &reg::Reg,
    &pipe::Pipe,
    &fifo::Fifo,
    &tty::Tty,
    &eventfd::Eventfd,
    &eventpoll::Eventpoll,
    &signalfd::Signalfd,
    &timerfd::Timerfd,
    &memfd::Memfd,
    &pidfd::Pidfd,
    &bpfmap::Bpfmap,
    &inotify::InotifyKind,
    &fanotify::FanotifyKind,
    &nsfile::Nsfile,
    &tun::Tun,
    &bpf::Program,
    &uring::Uring,
    &sk::Unix,
    &sk::Inet,
    &sk::Netlink,
    &sk::Packet,
];
