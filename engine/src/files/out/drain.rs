//! Descriptors of a task, taken and looked at one by one, or where there are many by several threads: taking one and
//! asking what it is needs no more than the right to trace the task.
//!
//! ```text
//! threads      | take, look: part 2 | take, look: part 3 | ...
//! this thread  | dump: part 1       | dump: part 2       | ...
//! ```
//!
//! Most descriptors of a child are those of its parent. That is one question to the kernel, and then all is known of
//! them but what belongs to the descriptor itself: whether exec closes it, and locks of the child.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use rayon::{ThreadPool, ThreadPoolBuilder, prelude::*};
use rcriu_images::{ImageKind, ImageWriter, pb};

use super::FilesOut;
use crate::{
    error::{Context, Result},
    files::{DrainedFd, FdType, fd::Host},
    interrupt,
    procfs::{ProcDir, fdinfo::FdInfo, stat::Stat},
    pstree::{FileId, RealPid},
    sys::{
        kcmp::{self, What},
        pidfd,
    },
};

/// Descriptors looked at ahead: twice as many of ours are open meanwhile.
const PART: usize = 128;
/// Descriptors that a thread looks at in one go.
const GO: usize = 16;
/// Threads at most.
const MOST: usize = 4;
/// Tables with fewer descriptors are not worth waking threads for.
const MANY: usize = 2 * PART;

/// A descriptor of a table that was dumped.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    fd: i32,
    id: FileId,
    fd_type: FdType,
    socket: bool,
}

/// A table that was dumped, by descriptor.
pub(super) type Slots = Arc<Vec<Slot>>;

/// A task whose descriptors are looked at, and whose table it may have inherited.
#[derive(Debug)]
struct Whose<'a> {
    task: RealPid,
    proc: &'a ProcDir,
    parent: Option<(RealPid, Slots)>,
}

/// What was found behind a descriptor.
#[derive(Debug)]
enum Looked {
    /// The open file of the parent's descriptor of the same number, without locks.
    Inherited(Slot, FdInfo),
    Taken(Box<DrainedFd>),
}

/// Takes note of what was found behind a descriptor.
type Found<'f, 'a> = dyn FnMut(&mut FilesOut<'a>, i32, Result<Looked>) -> Result<()> + 'f;

impl Whose<'_> {
    fn look(&self, fd: i32, host: &mut Host, take: impl FnOnce(i32) -> Result<OwnedFd>) -> Result<Looked> {
        if let Some(slot) = self.inherited(fd) {
            let info = FdInfo::read(self.proc, fd)?;
            if info.value("lock").is_none() {
                return Ok(Looked::Inherited(slot, info));
            }
        }
        DrainedFd::new(self.proc, self.task, fd, take(fd)?, host).map(|drained| Looked::Taken(drained.into()))
    }

    fn inherited(&self, fd: i32) -> Option<Slot> {
        let (parent, slots) = self.parent.as_ref()?;
        let slot = slots[slots.binary_search_by_key(&fd, |slot| slot.fd).ok()?];
        kcmp::compare(*parent, self.task, What::File(fd, fd)).is_ok_and(|order| order.is_eq()).then_some(slot)
    }
}

/// `None` where there can be no more of them.
fn threads() -> Option<ThreadPool> {
    let processors = std::thread::available_parallelism().map_or(1, |n| n.get().min(MOST));
    ThreadPoolBuilder::new().num_threads(processors).build().ok()
}

impl<'a> FilesOut<'a> {
    /// Dumps the descriptor table of `task`, unless the table with the `files_id` of `ids` was dumped already. To be
    /// called for every living task of the tree.
    ///
    /// Preconditions: all tasks are frozen; parents come before their children. `stat` is the task's. `take` gives a
    /// duplicate of a descriptor of the task; the kernel gives them through `pidfd`, if there is one.
    ///
    /// # Errors
    /// A descriptor that cannot be dumped, with its reason.
    pub fn task_fds(
        &mut self,
        (task, ids, stat): (RealPid, &pb::TaskKobjIdsEntry, &Stat),
        proc: &ProcDir,
        pidfd: Option<BorrowedFd<'_>>,
        take: &mut dyn FnMut(i32) -> Result<OwnedFd>,
    ) -> Result<()> {
        let files_id = ids.files_id;
        self.namespaces = Some(*ids);
        self.ttys.task(task, stat);
        if let Some(slots) = self.tables.get(&files_id) {
            self.table_of.insert(task, slots.clone());
            return Ok(());
        }
        let parent = RealPid(stat.ppid);
        let inherits = self.table_of.get(&parent).filter(|_| self.kernel.kcmp);
        let whose = Whose { task, proc, parent: inherits.map(|slots| (parent, slots.clone())) };
        let mut numbers = proc.numbers("fd")?;
        numbers.sort_unstable();
        log::info!("Dumping opened files (pid: {task}), {} descriptors", numbers.len());
        let mut slots = Vec::with_capacity(numbers.len());
        let mut table = self.images.writer(ImageKind::Fdinfo, u64::from(files_id));
        match pidfd.filter(|_| numbers.len() >= MANY).and_then(|pidfd| Some((pidfd, threads()?))) {
            Some((pidfd, threads)) => {
                let mut found = |fds: &mut Self, fd, looked| {
                    slots.push(fds.one_fd((task, files_id), fd, looked, &mut table)?);
                    Ok(())
                };
                self.many_fds(&whose, (pidfd, &threads), &numbers, &mut found)?;
            }
            None => {
                for fd in numbers {
                    interrupt::check()?;
                    let looked = whose.look(fd, &mut self.host, &mut *take);
                    slots.push(self.one_fd((task, files_id), fd, looked, &mut table)?);
                }
            }
        }
        // A table without descriptors is an image without entries, not a missing one.
        table.write_nothing();
        table.finish()?;
        let slots = Arc::new(slots);
        self.tables.insert(files_id, slots.clone());
        self.table_of.insert(task, slots);
        Ok(())
    }

    /// Whether a task, whose table was dumped, has an io_uring open.
    pub fn has_uring(&self, task: RealPid) -> bool {
        let slots = self.table_of.get(&task);
        slots.is_some_and(|slots| slots.iter().any(|slot| slot.fd_type == FdType::RcriuUring))
    }

    fn many_fds(
        &mut self,
        whose: &Whose<'_>,
        (pidfd, threads): (BorrowedFd<'_>, &ThreadPool),
        numbers: &[i32],
        found: &mut Found<'_, 'a>,
    ) -> Result<()> {
        let (shmem_dev, numbering, users) = (self.host.shmem_dev, self.numbering.clone(), self.users.clone());
        let look = |fds: &[i32]| -> Vec<_> {
            let mut host = Host::new(shmem_dev, numbering.clone(), users.clone());
            let mut one = |fd: &i32| (*fd, whose.look(*fd, &mut host, |fd| pidfd::getfd(pidfd, fd)));
            fds.iter().map(&mut one).collect()
        };
        let look_ahead = |part: &[i32]| -> Vec<_> { part.par_chunks(GO).flat_map_iter(look).collect() };
        let mut parts = numbers.chunks(PART);
        let mut ahead = Vec::new();
        loop {
            let now = std::mem::take(&mut ahead);
            let part = parts.next();
            if now.is_empty() && part.is_none() {
                return Ok(());
            }
            threads.in_place_scope(|scope| {
                if let Some(part) = part {
                    scope.spawn(|_| ahead = look_ahead(part));
                }
                now.into_iter().try_for_each(|(fd, looked)| {
                    interrupt::check()?;
                    found(self, fd, looked)
                })
            })?;
        }
    }

    fn one_fd(
        &mut self,
        (task, files_id): (RealPid, u32),
        fd: i32,
        looked: Result<Looked>,
        table: &mut ImageWriter,
    ) -> Result<Slot> {
        let found = looked.and_then(|looked| match looked {
            Looked::Inherited(slot, info) => {
                let cloexec = info.flags & libc::O_CLOEXEC.cast_unsigned();
                if slot.socket {
                    self.sockets.met(slot.id, task);
                }
                let (pos, flags, id) = (info.pos, info.flags & !cloexec, slot.id);
                let sign = u32::from(cloexec != 0);
                log::info!("{task} fdinfo {fd}: pos: {pos:#x} flags: {flags:o}/{sign:#x} id {id} (known)");
                Ok((slot, cloexec != 0))
            }
            Looked::Taken(drained) => {
                let (cloexec, socket) = (drained.probe.cloexec, drained.probe.socket.is_some());
                let number = self.number(&drained)?;
                if socket {
                    self.labels.met(number.0, drained.file.as_fd())?;
                }
                let virt = self.numbering.of(task);
                self.locks.dump(&drained, (number, virt), files_id, self.opts.common.file_locks)?;
                let (id, fd_type) = self.open_file(*drained, number)?;
                Ok((Slot { fd, id, fd_type, socket }, cloexec))
            }
        });
        let (slot, cloexec) = found.during(|| format!("fd {fd} of task {task}"))?;
        table.write(&pb::FdinfoEntry {
            id: slot.id.0,
            flags: if cloexec { libc::FD_CLOEXEC.cast_unsigned() } else { 0 },
            r#type: slot.fd_type as i32,
            fd: fd.cast_unsigned(),
            xattr_security_selinux: self.labels.of(slot.id),
        })?;
        Ok(slot)
    }
}
