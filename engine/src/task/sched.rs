//! Scheduling policy and priorities of a thread, with what sched_setattr(2) has beyond them: parameters of the
//! deadline policy, a time slice of its own, utilisation clamps.

use rcriu_images::pb;

use crate::{
    error::{Error, Result},
    pstree::RealPid,
    sys::sched::{self, Attr},
};

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

/// What the core image says of the scheduling of a thread with these attributes.
pub fn dump(tid: RealPid, attr: &Attr) -> Result<Scheduling> {
    let reset = if attr.flags & FLAG_RESET == 0 { 0 } else { RESET_ON_FORK.cast_unsigned() };
    // Attributes have the nice value of the fair policies only, although the others keep one too.
    let nice = if fair(attr.policy) { attr.nice } else { sched::nice(tid)? };
    let priority = is_real_time(attr.policy).then_some(attr.priority);
    Ok(Scheduling { policy: attr.policy | reset, priority, nice })
}

/// `SCHED_FLAG_*` that the deadline policy keeps: RECLAIM and DL_OVERRUN.
const DEADLINE_FLAGS: u64 = 0x2 | 0x4;
/// `SCHED_FLAG_RESET_ON_FORK`.
const FLAG_RESET: u64 = 0x1;
/// `SCHED_FLAG_KEEP_POLICY | SCHED_FLAG_KEEP_PARAMS`.
const FLAG_KEEP: u64 = 0x8 | 0x10;
/// `SCHED_FLAG_UTIL_CLAMP_MIN | SCHED_FLAG_UTIL_CLAMP_MAX`.
const FLAG_CLAMPS: u64 = 0x20 | 0x40;
/// Upper end of utilisation clamps (`SCHED_CAPACITY_SCALE`).
const FULL: u32 = 1024;

fn fair(policy: u32) -> bool {
    matches!(policy as i32, libc::SCHED_OTHER | libc::SCHED_BATCH | libc::SCHED_IDLE)
}

/// The time slice that threads of a fair policy have if they never asked for another; 0 where the kernel has no
/// such thing (before Linux 6.12), or if this process cannot tell.
pub fn usual_slice() -> u64 {
    let me = RealPid(nix::unistd::gettid().as_raw());
    sched::attributes(me).ok().filter(|a| fair(a.policy)).map_or(0, |a| a.runtime)
}

/// What the core image has no room for; `None` for a thread without.
pub fn dump_more(attr: &Attr, usual_slice: u64) -> Option<pb::RcriuSchedEntry> {
    let mut entry = pb::RcriuSchedEntry::default();
    if attr.policy as i32 == libc::SCHED_DEADLINE {
        entry.flags = Some(attr.flags & DEADLINE_FLAGS);
        (entry.runtime, entry.deadline) = (Some(attr.runtime), Some(attr.deadline));
        entry.period = Some(attr.period);
    } else if fair(attr.policy) && usual_slice != 0 && attr.runtime != usual_slice {
        entry.runtime = Some(attr.runtime);
    }
    let real_time = !fair(attr.policy) && entry.deadline.is_none();
    match (attr.util_min, attr.util_max) {
        (0, 0 | FULL) => {}
        // What the kernel gives every real-time thread.
        (FULL, FULL) if real_time => {}
        (min, max) => (entry.util_min, entry.util_max) = (Some(min), Some(max)),
    }
    (entry != pb::RcriuSchedEntry::default()).then_some(entry)
}

/// Policy, priority and nice value for the restorer; the policy is [`restorer::args::NONE`] if the image does
/// not tell. The deadline policy comes later: see [`restore_more`].
pub fn restore(core: &pb::ThreadCoreEntry) -> (u32, u32, i32) {
    let policy = core.sched_policy.unwrap_or(restorer::args::NONE);
    let policy = if is_deadline(core) { libc::SCHED_OTHER as u32 } else { policy };
    (policy, core.sched_prio.unwrap_or(0), core.sched_nice.unwrap_or(0))
}

/// Whether the policy is a real-time one.
pub fn is_real_time(policy: u32) -> bool {
    matches!(policy as i32 & !RESET_ON_FORK, libc::SCHED_FIFO | libc::SCHED_RR)
}

fn is_deadline(core: &pb::ThreadCoreEntry) -> bool {
    core.sched_policy.is_some_and(|p| p as i32 & !RESET_ON_FORK == libc::SCHED_DEADLINE)
}

/// Sets the rest from outside.
///
/// Preconditions: the restorer has set policy, priority and nice value; the thread is bound to its CPUs.
///
/// # Errors
/// EBUSY if the kernel has not enough bandwidth left for a deadline; an image without its parameters.
pub fn restore_more(
    tid: RealPid,
    core: &pb::ThreadCoreEntry,
    entry: Option<&pb::RcriuSchedEntry>,
) -> Result<()> {
    let deadline = is_deadline(core);
    let Some(entry) = entry else {
        return match deadline {
            true => Err(Error::image("its deadline policy has no parameters in rcriu-tasks.img")),
            false => Ok(()),
        };
    };
    let now = sched::attributes(tid)?;
    if deadline {
        let reset = core.sched_policy.is_some_and(|p| p as i32 & RESET_ON_FORK != 0);
        let wanted = Attr {
            policy: libc::SCHED_DEADLINE as u32,
            flags: entry.flags() & DEADLINE_FLAGS | if reset { FLAG_RESET } else { 0 },
            runtime: entry.runtime(),
            deadline: entry.deadline(),
            period: entry.period(),
            ..Attr::default()
        };
        sched::set_attributes(tid, &wanted).map_err(|e| match e.errno() {
            Some(libc::EBUSY) => e.remedy("deadline threads of this system already use all that it grants"),
            Some(libc::EPERM) => {
                e.remedy("a deadline thread must be free to use every CPU, and needs CAP_SYS_NICE")
            }
            _ => e,
        })?;
    } else if let Some(slice) = entry.runtime {
        let flags = now.flags & FLAG_RESET;
        let wanted = Attr { flags, runtime: slice, ..now };
        sched::set_attributes(tid, &wanted)?;
    }
    if let (Some(min), Some(max)) = (entry.util_min, entry.util_max) {
        let wanted = Attr { flags: FLAG_KEEP | FLAG_CLAMPS, util_min: min, util_max: max, ..now };
        match sched::set_attributes(tid, &wanted) {
            Err(e) if e.errno() == Some(libc::EOPNOTSUPP) => {
                log::warn!("This kernel has no utilisation clamps: {min} to {max} of thread {tid} are lost");
            }
            other => other?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_scheduling_is_read() {
        let me = RealPid(nix::unistd::gettid().as_raw());
        let now = dump(me, &sched::attributes(me).unwrap()).unwrap();
        assert_eq!((now.policy & !(RESET_ON_FORK as u32), now.priority), (0, None));
        assert!((-20..20).contains(&now.nice));
    }

    #[test]
    fn only_what_differs_from_the_usual_is_kept() {
        let plain = Attr { runtime: 2_800_000, util_max: 1024, ..Attr::default() };
        assert_eq!(dump_more(&plain, 2_800_000), None);
        assert_eq!(dump_more(&plain, 0), None);
        assert_eq!(dump_more(&Attr { runtime: 100_000, ..plain }, 2_800_000).unwrap().runtime, Some(100_000));
        let clamped = dump_more(&Attr { util_max: 512, ..plain }, 2_800_000).unwrap();
        assert_eq!((clamped.util_min, clamped.util_max, clamped.runtime), (Some(0), Some(512), None));
        let fifo = Attr { policy: 1, util_min: 1024, util_max: 1024, ..Attr::default() };
        assert_eq!(dump_more(&fifo, 1), None);
        let deadline = Attr { policy: 6, runtime: 1, deadline: 2, period: 3, flags: 7, ..Attr::default() };
        let kept = dump_more(&deadline, 5).unwrap();
        assert_eq!(
            (kept.flags, kept.runtime, kept.deadline, kept.period),
            (Some(6), Some(1), Some(2), Some(3))
        );
    }
}
