//! Resource limits of a task.

use rcriu_images::pb;

use crate::{
    error::Result,
    procfs::{ProcDir, limits},
    sys::rlimit,
};

/// All limits, in order of `RLIMIT_*`; no limit is [`u64::MAX`].
///
/// prlimit(2) needs CAP_SYS_RESOURCE for tasks of other users, `/proc/PID/limits` does not.
pub fn dump(dir: &ProcDir) -> Result<pb::TaskRlimitsEntry> {
    let by_call: Result<Vec<_>> = (0..limits::COUNT as u32)
        .map(|resource| {
            let limit = rlimit::get(dir.pid(), resource)?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pstree::RealPid;

    #[test]
    fn our_own_limits_agree_either_way() {
        let me = ProcDir::open(RealPid(std::process::id() as i32)).unwrap();
        let entry = dump(&me).unwrap();
        let file = limits::read(&me).unwrap();
        let pairs: Vec<_> = file.iter().map(|l| (l.cur, l.max)).collect();
        assert_eq!(entry.rlimits.iter().map(|l| (l.cur, l.max)).collect::<Vec<_>>(), pairs);
    }
}
