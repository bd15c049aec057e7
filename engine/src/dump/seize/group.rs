//! A tree that is frozen through its control group before it is seized.

use super::{Frozen, attach, refuse};
use crate::{
    dump::freezer::Freezer,
    error::{Error, Kind, Result},
    procfs::{ProcDir, stat, status::Status},
    sys::wait,
};

impl Frozen {
    /// Freezes the group, seizes every thread in it, and lets it thaw: ptrace has them all by then.
    pub(super) fn freeze_group(&mut self, folder: &std::path::Path) -> Result<()> {
        let mut freezer = Freezer::open(folder)?;
        self.guardian.group_changes(freezer.was_frozen());
        freezer.freeze(self.deadline)?;
        let me = std::process::id().cast_signed();
        for tid in freezer.threads()? {
            if tid.0 == me {
                return Err(Error::usage(format!(
                    "this process is in the group {} itself",
                    folder.display()
                )));
            }
            if ProcDir::open(tid).is_ok_and(|dir| stat::is_io_worker(&dir, tid)) {
                continue;
            }
            match attach(tid) {
                Ok(()) => {
                    self.waiting.insert(tid);
                }
                Err(e) => {
                    // Ended ones and threads of the kernel stay where they are; a tracer is in the way.
                    let status = ProcDir::open(tid).and_then(|dir| Status::read(&dir));
                    match status {
                        Ok(s) if s.tracer != 0 => return Err(refuse::traced(tid, s.tracer)),
                        Ok(s) if s.is_zombie() || s.kthread => {}
                        Err(gone) if matches!(gone.kind(), Kind::TaskDied(_)) => {}
                        _ => return Err(e.during(refuse::name(tid))),
                    }
                }
            }
        }
        freezer.thaw()?;
        self.freezer = Some(freezer);
        Ok(())
    }

    /// Waits for the threads of the group that turned out not to be part of the tree.
    pub(super) fn settle_group(&mut self) -> Result<()> {
        for tid in std::mem::take(&mut self.waiting) {
            self.others.push(tid);
            match wait::until(tid, self.deadline) {
                Ok(Some(status)) if !status.is_end() => {
                    log::warn!("Unexpected {} in the freezer group: it is not dumped", refuse::name(tid));
                }
                Ok(Some(_)) => {
                    self.others.pop();
                }
                Ok(None) => {
                    return Err(Error::host(format!("{} does not stop", refuse::name(tid))));
                }
                Err(e) if matches!(e.kind(), Kind::TaskDied(_)) => {
                    self.others.pop();
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}
