//! Descriptors of a task, taken and looked at one by one, or where there are many by several threads: taking one and
//! asking what it is needs no more than the right to trace the task.
//!
//! ```text
//! threads      | take, look: part 2 | take, look: part 3 | ...
//! this thread  | dump: part 1       | dump: part 2       | ...
//! ```

use std::os::fd::{BorrowedFd, OwnedFd};

use rayon::{ThreadPool, ThreadPoolBuilder, prelude::*};
use rcriu_images::{ImageKind, ImageWriter, pb};

use super::FilesOut;
use crate::{
    error::{Context, Result},
    files::{DrainedFd, fd::Host},
    interrupt,
    procfs::ProcDir,
    pstree::RealPid,
    sys::pidfd,
};

/// Descriptors looked at ahead: twice as many of ours are open meanwhile.
const PART: usize = 128;
/// Descriptors that a thread looks at in one go.
const GO: usize = 16;
/// Threads at most.
const MOST: usize = 4;
/// Tables with fewer descriptors are not worth waking threads for.
const MANY: usize = 2 * PART;

/// `None` where there can be no more of them.
fn threads() -> Option<ThreadPool> {
    let processors = std::thread::available_parallelism().map_or(1, |n| n.get().min(MOST));
    ThreadPoolBuilder::new().num_threads(processors).build().ok()
}

impl FilesOut<'_> {
    /// Dumps the descriptor table of `task`, unless the table with the `files_id` of `ids` was dumped already. To be
    /// called for every living task of the tree.
    ///
    /// Preconditions: all tasks are frozen. `take` gives a duplicate of a descriptor of the task; the kernel gives them
    /// through `pidfd`, if there is one.
    ///
    /// # Errors
    /// A descriptor that cannot be dumped, with its reason.
    pub fn task_fds(
        &mut self,
        task: RealPid,
        ids: &pb::TaskKobjIdsEntry,
        proc: &ProcDir,
        pidfd: Option<BorrowedFd<'_>>,
        take: &mut dyn FnMut(i32) -> Result<OwnedFd>,
    ) -> Result<()> {
        let files_id = ids.files_id;
        self.namespaces = Some(*ids);
        self.ttys.task(task, proc)?;
        if !self.tables.insert(files_id) {
            return Ok(());
        }
        let mut numbers = proc.numbers("fd")?;
        numbers.sort_unstable();
        log::info!("Dumping opened files (pid: {task}), {} descriptors", numbers.len());
        let mut table = self.images.writer(ImageKind::Fdinfo, u64::from(files_id));
        match pidfd.filter(|_| numbers.len() >= MANY).and_then(|pidfd| Some((pidfd, threads()?))) {
            Some((pidfd, threads)) => {
                let source = (proc, pidfd, &threads);
                self.many_fds((task, files_id), source, &numbers, &mut table)?;
            }
            None => {
                for fd in numbers {
                    interrupt::check()?;
                    let drained =
                        take(fd).and_then(|file| DrainedFd::new(proc, task, fd, file, &mut self.host));
                    self.one_fd((task, files_id), fd, drained, &mut table)?;
                }
            }
        }
        // A table without descriptors is an image without entries, not a missing one.
        table.write_nothing();
        table.finish()?;
        Ok(())
    }

    fn many_fds(
        &mut self,
        (task, files_id): (RealPid, u32),
        (proc, pidfd, threads): (&ProcDir, BorrowedFd<'_>, &ThreadPool),
        numbers: &[i32],
        table: &mut ImageWriter,
    ) -> Result<()> {
        let shmem_dev = self.host.shmem_dev;
        let look = |fds: &[i32]| -> Vec<_> {
            let mut host = Host::new(shmem_dev);
            let mut one = |fd: &i32| {
                let drained =
                    pidfd::getfd(pidfd, *fd).and_then(|f| DrainedFd::new(proc, task, *fd, f, &mut host));
                (*fd, drained)
            };
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
                now.into_iter().try_for_each(|(fd, drained)| {
                    interrupt::check()?;
                    self.one_fd((task, files_id), fd, drained, table)
                })
            })?;
        }
    }

    fn one_fd(
        &mut self,
        (task, files_id): (RealPid, u32),
        fd: i32,
        drained: Result<DrainedFd>,
        table: &mut ImageWriter,
    ) -> Result<()> {
        let entry = drained.and_then(|drained| {
            let cloexec = drained.probe.cloexec;
            let number = self.number(&drained)?;
            self.locks.dump(&drained, number, files_id, self.opts.common.file_locks)?;
            let (id, fd_type) = self.open_file(drained, number)?;
            Ok(pb::FdinfoEntry {
                id: id.0,
                flags: if cloexec { libc::FD_CLOEXEC.cast_unsigned() } else { 0 },
                r#type: fd_type as i32,
                fd: fd.cast_unsigned(),
                xattr_security_selinux: None,
            })
        });
        Ok(table.write(&entry.during(|| format!("fd {fd} of task {task}"))?)?)
    }
}
