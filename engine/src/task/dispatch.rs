//! Syscall user dispatch: system calls from outside of a range of code become SIGSYS, when a byte of the program
//! says so.

use rcriu_images::pb;

use crate::{
    error::Result,
    infect::StoppedThread,
    pstree::RealPid,
    sys::ptrace::{self, SudConfig},
};

/// `PR_SYS_DISPATCH_EXCLUSIVE_ON`: calls from the range are let through.
const EXCLUSIVE: u64 = 1;
/// `PR_SYS_DISPATCH_INCLUSIVE_ON`: only those from the range are caught (Linux 6.17).
const INCLUSIVE: u64 = 2;

/// What the thread has set, `None` if it is off.
pub fn dump(thread: &StoppedThread) -> Option<pb::RcriuDispatchEntry> {
    let SudConfig { mode, selector, offset, len } = thread.syscall_user_dispatch();
    (mode != 0).then_some(pb::RcriuDispatchEntry { selector, offset, len })
}

/// The words to set. The kernel keeps an inclusive range as the exclusive one around it, which wraps; it takes
/// that only the way it was first told.
fn config(entry: &pb::RcriuDispatchEntry) -> SudConfig {
    let pb::RcriuDispatchEntry { selector, offset, len } = *entry;
    match offset.checked_add(len) {
        Some(_) => SudConfig { mode: EXCLUSIVE, selector, offset, len },
        None => {
            SudConfig { mode: INCLUSIVE, selector, offset: offset.wrapping_add(len), len: len.wrapping_neg() }
        }
    }
}

/// Switches it on in a thread that will make no further calls for us.
pub fn restore(tid: RealPid, entry: Option<&pb::RcriuDispatchEntry>) -> Result<()> {
    entry.map_or(Ok(()), |entry| ptrace::set_syscall_user_dispatch(tid, &config(entry)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_that_wraps_is_an_inclusive_one() {
        let entry = |offset, len| pb::RcriuDispatchEntry { selector: 9, offset, len };
        let plain = SudConfig { mode: 1, selector: 9, offset: 0x1000, len: 0x2000 };
        assert_eq!(config(&entry(0x1000, 0x2000)), plain);
        let inverted = entry(0x3000, 0x2000u64.wrapping_neg());
        assert_eq!(config(&inverted), SudConfig { mode: 2, ..plain });
    }
}
