//! Class and level of a thread's I/O, `ioprio_set(2)`.

use crate::{error::Result, pstree::RealPid, sys::sched};

/// What the thread has; `None` if nobody set any.
pub fn dump(tid: RealPid) -> Result<Option<u32>> {
    Ok(Some(sched::io_priority(tid)?).filter(|value| *value != 0))
}

/// Sets it, unless it is what the thread has from us, `own`.
///
/// # Errors
/// EPERM for the real-time class without CAP_SYS_NICE.
pub fn restore(tid: RealPid, wanted: Option<u32>, own: u32) -> Result<()> {
    let wanted = wanted.unwrap_or(0);
    if wanted == own { Ok(()) } else { sched::set_io_priority(tid, wanted) }
}
