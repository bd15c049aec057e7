//! What /proc tells of a task that stands still, before anything of ours is in it. Reading that needs no tracer: a
//! second thread does it for the next task while this one is asked.

use crate::{
    error::Result,
    infect::StoppedThread,
    procfs::{
        ProcDir, cgroup,
        maps::{Came, Listing},
        status::Status,
    },
    pstree::RealPid,
    spread,
};

use super::{collect::Pstree, seize::Frozen};

/// Whom to read about.
pub(super) struct About<'a> {
    dir: &'a ProcDir,
    threads: Vec<RealPid>,
}

/// What was read.
pub(super) struct Told {
    /// All mappings with their flags, perhaps still coming; `None` where somebody else knows them.
    pub maps: Option<Result<Listing>>,
    /// Of each thread, in their order, what it is and the content of its file of control groups.
    pub threads: Result<Vec<(Status, Vec<u8>)>>,
}

/// One for each task of the tree. Of those that have ended there is nothing to read.
pub(super) fn whom<'a>(tree: &'a Pstree, frozen: &mut Frozen) -> Result<Vec<About<'a>>> {
    let about = |task: &'a super::collect::Task| {
        let stopped = frozen.task_mut(task.pid)?.stopped.as_ref();
        let threads = stopped.map_or_else(Vec::new, |s| s.threads().iter().map(StoppedThread::tid).collect());
        Ok(About { dir: &task.dir, threads })
    };
    tree.tasks.iter().map(about).collect()
}

impl About<'_> {
    /// Reads; mappings to the end if `whole`.
    pub(super) fn read(&self, with_maps: bool, whole: bool) -> Told {
        let thread =
            |tid: &RealPid| Ok((Status::read_thread(self.dir, *tid)?, cgroup::read_thread(self.dir, *tid)?));
        let with_maps = with_maps && !self.threads.is_empty();
        let (maps, threads) =
            spread::map_beside(&self.threads, thread, || with_maps.then(|| self.maps(whole)));
        Told { maps, threads }
    }

    fn maps(&self, whole: bool) -> Result<Listing> {
        let mut maps = Listing::open(self.dir)?;
        while whole && maps.more(true)? != Came::End {}
        Ok(maps)
    }
}
