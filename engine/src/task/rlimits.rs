//! Resource limits of a task.

use rcriu_images::pb;
use restorer::args;

use crate::{
    error::Result,
    procfs::{ProcDir, limits},
    pstree::RealPid,
    sys::rlimit,
};

/// All limits, in order of `RLIMIT_*`; no limit is [`u64::MAX`].
///
/// prlimit(2) needs CAP_SYS_RESOURCE for tasks of other users, `/proc/PID/limits` does not.
pub fn dump(dir: &ProcDir) -> Result<pb::TaskRlimitsEntry> {
    of(dir.pid(), dir)
}

/// Those of the calling process, whatever number it has.
pub fn own() -> Result<pb::TaskRlimitsEntry> {
    of(RealPid(0), &ProcDir::own()?)
}

fn of(pid: RealPid, dir: &ProcDir) -> Result<pb::TaskRlimitsEntry> {
    let by_call: Result<Vec<_>> = (0..limits::COUNT as u32)
        .map(|resource| {
            let limit = rlimit::get(pid, resource)?;
            Ok(pb::RlimitEntry { cur: limit.soft, max: limit.hard })
        })
        .collect();
    let rlimits = match by_call {
        Err(e) if matches!(e.errno(), Some(libc::EPERM | libc::EINVAL)) => {
            limits::read(dir)?.iter().map(|l| pb::RlimitEntry { cur: l.cur, max: l.max }).collect()
        }
        other => other?,
    };
    Ok(pb::TaskRlimitsEntry { rlimits })
}

/// Limits for the restorer to set, given those it will start `from`.
///
/// Without CAP_SYS_RESOURCE (`may_raise` false) a hard limit can only be kept or lowered: where the dumped one
/// is higher ours stays, with a warning.
pub fn restore(
    entry: &pb::TaskRlimitsEntry,
    from: &pb::TaskRlimitsEntry,
    may_raise: bool,
) -> Vec<args::Limit> {
    (0..)
        .zip(entry.rlimits.iter().zip(&from.rlimits))
        .map(|(resource, (wanted, have))| {
            let (soft, hard) = (wanted.cur.min(wanted.max), wanted.max);
            let reachable = if may_raise { hard } else { hard.min(have.max) };
            if reachable < hard {
                log::warn!(
                    "Hard limit of resource {resource} is {reachable} instead of {hard}: no CAP_SYS_RESOURCE"
                );
            }
            args::Limit { soft: soft.min(reachable), hard: reachable, resource, pad: 0 }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pstree::RealPid;

    #[test]
    fn limits_are_raised_only_where_that_is_allowed() {
        let entry = |pairs: &[(u64, u64)]| pb::TaskRlimitsEntry {
            rlimits: pairs.iter().map(|&(cur, max)| pb::RlimitEntry { cur, max }).collect(),
        };
        let wanted = entry(&[(10, u64::MAX), (5, 50), (9, 9)]);
        let have = entry(&[(1, 100), (100, 100), (1, 7)]);
        let pairs = |may| restore(&wanted, &have, may).iter().map(|l| (l.soft, l.hard)).collect::<Vec<_>>();
        assert_eq!(pairs(true), [(10, u64::MAX), (5, 50), (9, 9)]);
        assert_eq!(pairs(false), [(10, 100), (5, 50), (7, 7)]);
        assert_eq!(restore(&wanted, &have, true)[2].resource, 2);
    }

    #[test]
    fn our_own_limits_agree_either_way() {
        let me = ProcDir::open(RealPid(std::process::id() as i32)).unwrap();
        let entry = dump(&me).unwrap();
        let file = limits::read(&me).unwrap();
        let pairs: Vec<_> = file.iter().map(|l| (l.cur, l.max)).collect();
        assert_eq!(entry.rlimits.iter().map(|l| (l.cur, l.max)).collect::<Vec<_>>(), pairs);
    }
}
