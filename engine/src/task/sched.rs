//! Scheduling policy and priorities of a thread.

use crate::{error::Result, pstree::RealPid, sys::sched};

/// What the core image says of a thread's scheduling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheduling {
    /// `SCHED_*`, with `SCHED_RESET_ON_FORK`.
    pub policy: u32,
    /// Static priority of the real-time policies.
    pub priority: Option<u32>,
    pub nice: i32,
}

/// `SCHED_RESET_ON_FORK` in a policy.
pub const RESET_ON_FORK: i32 = 0x4000_0000;

/// Reads the thread's scheduling.
pub fn dump(tid: RealPid) -> Result<Scheduling> {
    let policy = sched::policy(tid)?;
    let priority = match policy & !RESET_ON_FORK {
        libc::SCHED_FIFO | libc::SCHED_RR => Some(sched::priority(tid)?.cast_unsigned()),
        libc::SCHED_DEADLINE => {
            return Err(crate::error::Error::unsupported(format!(
                "thread {tid} has the deadline scheduling policy, whose parameters the image format cannot hold"
            ))
            .remedy("change it with chrt for the time of the dump"));
        }
        _ => None,
    };
    Ok(Scheduling { policy: policy.cast_unsigned(), priority, nice: sched::nice(tid)? })
}

/// Policy, priority and nice value for the restorer; the policy is [`restorer::args::NONE`] if the image does
/// not tell.
pub fn restore(core: &rcriu_images::pb::ThreadCoreEntry) -> (u32, u32, i32) {
    let policy = core.sched_policy.unwrap_or(restorer::args::NONE);
    (policy, core.sched_prio.unwrap_or(0), core.sched_nice.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_scheduling_is_read() {
        let me = RealPid(nix::unistd::gettid().as_raw());
        let now = dump(me).unwrap();
        assert_eq!((now.policy & !(RESET_ON_FORK as u32), now.priority), (0, None));
        assert!((-20..20).contains(&now.nice));
    }
}
