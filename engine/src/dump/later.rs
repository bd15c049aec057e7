//! Pages of tasks that have few: written by a second thread while the next tasks are asked. Reading memory needs no
//! tracer, and so little of it is not worth having the task write it itself.

use std::time::{Duration, Instant};

use rcriu_images::{ImageKind, pb};

use super::{DumpCx, collect::Task, finish::one, refuse};
use crate::{
    error::{Context, Result},
    kernel::Kernel,
    mm::{
        pagemap::Scanner,
        pages::{Copier, PageStore, Written},
        vma::{self, Vma},
    },
    procfs::{ProcDir, maps::Map},
    stats::DumpStats,
};

/// For so few tasks no thread is started.
pub(super) const FEW: usize = 4;
/// Bytes of own pages up to which a task has few.
const SMALL: u64 = 1 << 20;

/// What remains to be done for a task, which stands still and has nothing of ours in it any more.
pub(super) struct Pages<'a> {
    pub task: &'a Task,
    /// Without guard pages.
    pub vmas: Vec<Vma>,
    pub stacks: Vec<u64>,
    /// Without mappings.
    pub mm: pb::MmEntry,
}

/// What was written.
pub(super) struct Counts {
    took: Duration,
    scanned: u64,
    written: u64,
}

/// Whether the pages of a task may wait: there are few, they go to plain files here, all of them.
pub(super) fn suits(cx: &DumpCx<'_>, maps: &[Map]) -> bool {
    are_plain(cx) && maps.iter().map(|map| map.anonymous).sum::<u64>() <= SMALL
}

/// Whether pages go to plain files here, all of them.
pub(super) fn are_plain(cx: &DumpCx<'_>) -> bool {
    let plain = cx.opts.compress.is_none() && cx.pages.link().is_none();
    plain && cx.late.is_none() && cx.background.is_off() && !cx.track.is_on()
}

impl Pages<'_> {
    /// Writes `pagemap-PID.img`, its pages and `mm-PID.img`.
    pub(super) fn write(self, store: &PageStore, kernel: &Kernel) -> Result<Counts> {
        let pid = self.task.pid;
        self.write_all(store, kernel).during(|| refuse::name(pid))
    }

    fn write_all(self, store: &PageStore, kernel: &Kernel) -> Result<Counts> {
        let start = Instant::now();
        let Pages { task, vmas, stacks, mut mm } = self;
        log::info!("Dumping pages (pid: {})", task.pid);
        let id = task.virt.0.cast_unsigned().into();
        let vmas = with_guards(vmas, &task.dir, kernel)?;
        let mut out = store.create(ImageKind::Pagemap, id)?;
        let mut copier = Copier::new(&task.dir, &mut out, &stacks)?;
        let mut scanner = Scanner::new(&task.dir, kernel)?;
        let scanned = scanner.pages(&vmas, None, |vma, start, end, _| copier.add(vma, start, end))?;
        copier.flush()?;
        let Written { written, .. } = out.finish()?;
        log::info!("Dumped {written} pages of {}, none are in the parent images", task.pid);
        mm.vmas = vmas.into_iter().map(|v| v.entry).collect();
        one(&store.images, ImageKind::Mm, id, &mm)?;
        Ok(Counts { took: start.elapsed(), scanned, written })
    }
}

impl Counts {
    pub(super) fn add_to(&self, stats: &mut DumpStats) {
        stats.memdump.add(self.took);
        stats.pages_scanned += self.scanned;
        stats.pages_written += self.written;
    }
}

/// Ranges of guard pages follow the mappings, as entries of their own.
pub(super) fn with_guards(mut vmas: Vec<Vma>, dir: &ProcDir, kernel: &Kernel) -> Result<Vec<Vma>> {
    for (start, end) in Scanner::new(dir, kernel)?.guards()? {
        vmas.push(vma::guard(start, end));
    }
    Ok(vmas)
}
