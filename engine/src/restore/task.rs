//! Inside a task being rebuilt.

use crate::error::Result;
use crate::kernel::Kernel;
use crate::options::RestoreOptions;
use crate::restore::plan::{self, Plan};
use crate::restore::read::{Snapshot, TaskImage, TaskIx};
use crate::restore::stages::Area;
use crate::restore::tree::Node;

/// What a task being rebuilt may touch. Everything was there before the fork and is the task's own copy, but
/// for the shared area.
#[derive(Clone, Copy)]
pub struct TaskCx<'a> {
    /// What was asked for.
    pub opts: &'a RestoreOptions,
    /// What this kernel offers.
    pub kernel: &'a Kernel,
    /// What the images say.
    pub snapshot: &'a Snapshot,
    /// What will be done.
    pub plan: &'a Plan,
    /// Stages and first error.
    pub area: &'a Area,
    /// Which task this is.
    pub task: TaskIx,
}

impl<'a> TaskCx<'a> {
    /// The image of this task. A helper has none.
    pub fn image(&self) -> Result<&'a TaskImage> {
        plan::image(self.snapshot, self.task)
    }

    /// This process in the plan.
    pub fn node(&self) -> &'a Node {
        self.plan.node(self.task)
    }
}
