//! A copy of a task's memory, made by fork.
//!
//! Copy-on-write, so what is copied while the task is frozen are its page tables: 25 ms for a gigabyte in small
//! pages, next to nothing in huge ones. The copy is reaped here; if the dump is killed, it ends too.

use rcriu_images::ImageKind;

use crate::{
    error::{Context, Error, Kind, Result},
    kernel::Kernel,
    mm::{
        pagemap::Scanner,
        pages::{Copier, PageStore, Written},
        vma::Vma,
    },
    procfs::ProcDir,
    pstree::{RealPid, VirtPid},
    stats::DumpStats,
    sys::{ptrace, wait},
};

/// Memory to be written from a copy.
#[derive(Debug)]
pub struct Later {
    pub copy: MemoryCopy,
    pub task: VirtPid,
    pub vmas: Vec<Vma>,
    pub stacks: Vec<u64>,
}

impl Later {
    /// Writes pagemap and pages.
    pub fn write(&self, pages: &PageStore, kernel: &Kernel, stats: &mut DumpStats) -> Result<()> {
        let dir = ProcDir::open(self.copy.0)?;
        log::info!("Dumping pages (pid: {}) from copy {}", self.task, self.copy.0);
        stats.memwrite.start();
        let mut out = pages.create(ImageKind::Pagemap, self.task.0.cast_unsigned().into())?;
        let mut copier = Copier::new(&dir, &mut out, &self.stacks)?;
        let scanned = Scanner::new(&dir, kernel)?
            .pages(&self.vmas, None, |vma, start, end, _| copier.add(vma, start, end))?;
        copier.flush()?;
        drop(copier);
        // Its end while it was read would have looked like memory that is gone.
        self.copy.check()?;
        let Written { written, .. } = out.finish()?;
        stats.memwrite.stop();
        stats.pages_scanned += scanned;
        stats.pages_written += written;
        Ok(())
    }
}

/// A process that holds a task's memory. Dropped, it ends; so it does if we are killed.
#[derive(Debug)]
pub struct MemoryCopy(RealPid);

impl MemoryCopy {
    /// Takes over the copy that was just made.
    pub fn take(pid: u64) -> Result<MemoryCopy> {
        let pid = i32::try_from(pid).map(RealPid).map_err(|_| Error::bug("a copy without a pid"))?;
        ptrace::seize(pid, ptrace::O_EXITKILL).during(|| format!("copy {pid}"))?;
        let copy = MemoryCopy(pid);
        // Until it has closed its descriptors, others may wait in vain for the last one to be closed.
        let fds = format!("/proc/{pid}/fd");
        while std::fs::read_dir(&fds).is_ok_and(|mut list| list.next().is_some()) {
            crate::interrupt::check()?;
            std::thread::yield_now();
        }
        copy.check()?;
        Ok(copy)
    }

    fn check(&self) -> Result<()> {
        match wait::poll(self.0)? {
            Some(status) if status.is_end() => {
                Err(Error::host(format!("the copy of its memory has ended: {status:?}"))
                    .remedy("dump without --background"))
            }
            _ => Ok(()),
        }
    }
}

impl Drop for MemoryCopy {
    fn drop(&mut self) {
        let _ =
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.0.0), nix::sys::signal::Signal::SIGKILL);
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        loop {
            match wait::until(self.0, deadline) {
                Ok(Some(status)) if !status.is_end() => {}
                Err(e) if !matches!(e.kind(), Kind::TaskDied(_)) => {
                    log::error!("The copy {} of a task's memory may be left: {e}", self.0);
                    return;
                }
                _ => return,
            }
        }
    }
}
