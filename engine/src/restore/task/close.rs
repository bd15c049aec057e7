//! What a restored task must not keep open.

use std::os::fd::RawFd;

use super::TaskCx;
use crate::error::{Result, SysContext};

/// Every number that is none of the task's descriptors, as ranges (first and last). /proc, where it is needed to the
/// end, is in none of them.
pub(super) fn not_of_the_task(cx: &TaskCx<'_>) -> Result<Vec<(RawFd, RawFd)>> {
    let highest = if cx.kernel.close_range {
        RawFd::MAX
    } else {
        // The restorer must close them one by one. A few more may come until then.
        let open = std::fs::read_dir("/proc/self/fd").call("open(/proc/self/fd)")?;
        let numbers = open.flatten().filter_map(|e| e.file_name().to_str()?.parse::<RawFd>().ok());
        numbers.max().unwrap_or(0).saturating_add(64)
    };
    let mut free = 0;
    let mut ranges = Vec::new();
    let mut stay: Vec<RawFd> = cx.snapshot.fds(cx.image()?).iter().map(|e| e.fd as RawFd).collect();
    if let Some(proc) = cx.proc {
        stay.push(proc);
        stay.sort_unstable();
    }
    for fd in stay {
        if fd > free {
            ranges.push((free, fd - 1));
        }
        free = fd.saturating_add(1);
    }
    if free <= highest {
        ranges.push((free, highest));
    }
    Ok(ranges)
}
