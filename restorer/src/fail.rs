//! Reporting a failure and ending.
//!
//! # Safety
//! Ends the process by a raw call.

use core::sync::atomic::Ordering::Relaxed;

use blobrt::syscall::{Errno, nr, syscall1};
use restorer::{
    Stage,
    report::{Call, Object},
};

use crate::image::Task;

/// What failed, on what.
pub struct Failed {
    call: Call,
    object: Object,
    errno: i32,
    a: u64,
    b: u64,
    text: &'static [u8],
}

impl Failed {
    /// A failure with the numbers that [`Object`] says.
    pub fn new(call: Call, object: Object, errno: i32, a: u64, b: u64) -> Failed {
        Failed { call, object, errno, a, b, text: &[] }
    }

    /// The same on something that has a name.
    pub fn named(self, text: &'static [u8]) -> Failed {
        Failed { text, ..self }
    }
}

/// Says on which object a call failed.
pub trait On<T> {
    /// Turns an error number into [`Failed`].
    fn on(self, call: Call, object: Object, a: u64, b: u64) -> Result<T, Failed>;
}

impl<T> On<T> for Result<T, Errno> {
    fn on(self, call: Call, object: Object, a: u64, b: u64) -> Result<T, Failed> {
        self.map_err(|e| Failed::new(call, object, e.0, a, b))
    }
}

/// Leaves the failure where the engine finds it, if it is the first, and ends the task.
pub fn fail(task: &Task, tid: i32, failed: Failed) -> ! {
    let slot = &task.shared.error;
    if slot.claim() {
        slot.stage.store(task.shared.stage.load(Relaxed), Relaxed);
        slot.pid.store(task.args.pid, Relaxed);
        slot.tid.store(tid, Relaxed);
        slot.errno.store(failed.errno, Relaxed);
        slot.call.store(failed.call as u32, Relaxed);
        slot.object.store(failed.object as u32, Relaxed);
        slot.a.store(failed.a, Relaxed);
        slot.b.store(failed.b, Relaxed);
        slot.set_text(failed.text);
        slot.publish();
    }
    task.shared.open(Stage::Fail);
    end()
}

/// Ends the task, all its threads.
pub fn end() -> ! {
    loop {
        // SAFETY: takes a number.
        let _ = unsafe { syscall1(nr::EXIT_GROUP, 1) };
    }
}
