//! Attributes of a thread that only the thread itself can set: timer slack, faults of RDTSC and CPUID, machine
//! check policy, its role in reclaim, mitigations of speculative execution, memory policy.
//!
//! The restorer makes the calls that [`restore`] lists, before it changes credentials.

use parasite::thread::ThreadInfo;
use rcriu_images::pb;
use restorer::args::Setting;

use super::numa;
use crate::{
    error::{Error, Result},
    sys::attributes,
};

const PR_SET_TSC: u64 = 26;
const PR_TSC_SIGSEGV: i64 = 2;
const PR_SET_TIMERSLACK: u64 = 29;
const PR_MCE_KILL: u64 = 33;
const PR_MCE_KILL_SET: u64 = 1;
const PR_MCE_KILL_DEFAULT: u32 = 2;
const PR_SET_SPECULATION_CTRL: u64 = 53;
const PR_SET_IO_FLUSHER: u64 = 57;
const ARCH_SET_CPUID: u64 = 0x1012;
/// `PR_SPEC_PRCTL`: the thread may choose.
const SPEC_PRCTL: u64 = 1;
/// `PR_SPEC_ENABLE`, `PR_SPEC_DISABLE`, `PR_SPEC_FORCE_DISABLE`.
const SPEC_ENABLE: u64 = 2;
const SPEC_DISABLE: u64 = 4;
const SPEC_FORCE_DISABLE: u64 = 8;
/// What threads have that never chose: of store bypass, indirect branches, and flushing of the L1 cache.
const SPEC_USUAL: [u64; 3] = [SPEC_ENABLE, SPEC_ENABLE, SPEC_DISABLE];
/// Nanoseconds that timers of ordinary threads may be late.
const USUAL_SLACK: u64 = 50_000;
/// `PF_MEMALLOC_NOIO` and `PF_LOCAL_THROTTLE` of the kernel: both are set for `PR_SET_IO_FLUSHER`.
const PF_IO_FLUSHER: u32 = 0x0008_0000 | 0x0010_0000;
/// `CAP_SYS_RESOURCE`.
const CAP_SYS_RESOURCE: u64 = 1 << 24;

/// Adds what differs from a fresh thread's to `entry`. `flags` gives the kernel's `PF_*` of the thread, for what
/// the thread itself may not ask.
pub fn dump(
    info: &ThreadInfo,
    flags: impl FnOnce() -> Result<u32>,
    entry: &mut pb::RcriuThreadEntry,
) -> Result<()> {
    // 0 is that of real-time threads: theirs cannot be set.
    entry.timer_slack =
        u64::try_from(info.timer_slack).ok().filter(|slack| *slack != 0 && *slack != USUAL_SLACK);
    entry.tsc_faults = (info.tsc == PR_TSC_SIGSEGV).then_some(true);
    entry.cpuid_faults = (info.cpuid_allowed == 0).then_some(true);
    entry.mce_kill = u32::try_from(info.mce_kill).ok().filter(|policy| *policy != PR_MCE_KILL_DEFAULT);
    let flusher = match info.io_flusher {
        // Without CAP_SYS_RESOURCE it must not even be asked for.
        asked if asked == -i64::from(libc::EPERM) => flags()? & PF_IO_FLUSHER == PF_IO_FLUSHER,
        asked => asked == 1,
    };
    entry.io_flusher = flusher.then_some(true);
    for (which, (state, usual)) in (0..).zip(info.speculation.iter().zip(SPEC_USUAL)) {
        let state = u64::try_from(*state).unwrap_or(0);
        let control = state & !SPEC_PRCTL;
        if state & SPEC_PRCTL != 0 && control != usual {
            entry.speculation.push(pb::RcriuSpeculationEntry { which, control: control as u32 });
        }
    }
    entry.policy = numa::dump(info.policy, &info.nodes);
    Ok(())
}

/// What threads have from the process they are made in.
#[derive(Debug)]
pub struct Own {
    slack: u64,
    mce_kill: u64,
    speculation: [u64; 3],
    cap_eff: u64,
    /// The policy that the leader was given.
    policy: Option<pb::RcriuPolicyEntry>,
    nodes: numa::Nodes,
}

impl Own {
    /// Asks the kernel. `leader` is the entry of the leader, whose memory policy the process has already.
    pub fn read(cap_eff: u64, leader: Option<&pb::RcriuThreadEntry>) -> Result<Own> {
        let mut own = Own {
            slack: attributes::timer_slack()?,
            mce_kill: attributes::mce_kill().unwrap_or(PR_MCE_KILL_DEFAULT.into()),
            speculation: [0; 3],
            cap_eff,
            policy: leader.and_then(|l| l.policy.clone()),
            nodes: numa::Nodes::own()?,
        };
        for (which, state) in (0..).zip(&mut own.speculation) {
            // Unknown here is as good as not there.
            *state = attributes::speculation(which).unwrap_or(0);
        }
        Ok(own)
    }
}

/// The calls to make in the thread. `words` puts a table of words where the restorer finds it and gives its
/// place in the arena. `real_time` threads have no timer slack.
///
/// # Errors
/// What this process has not the right to set.
pub fn restore(
    tid: i32,
    entry: Option<&pb::RcriuThreadEntry>,
    own: &Own,
    real_time: bool,
    mut words: impl FnMut(&[u64]) -> u64,
) -> Result<Vec<Setting>> {
    let fresh = pb::RcriuThreadEntry::default();
    let entry = entry.unwrap_or(&fresh);
    let mut calls = Vec::new();
    let slack = entry.timer_slack.unwrap_or(USUAL_SLACK);
    if slack != own.slack && (!real_time || entry.timer_slack.is_some()) {
        calls.push(Setting::prctl(PR_SET_TIMERSLACK, [slack, 0, 0, 0]));
    }
    let mce_kill = entry.mce_kill.unwrap_or(PR_MCE_KILL_DEFAULT);
    if u64::from(mce_kill) != own.mce_kill {
        calls.push(Setting::prctl(PR_MCE_KILL, [PR_MCE_KILL_SET, mce_kill.into(), 0, 0]));
    }
    if entry.io_flusher() {
        if own.cap_eff & CAP_SYS_RESOURCE == 0 {
            return Err(Error::host("it has PR_SET_IO_FLUSHER, which takes CAP_SYS_RESOURCE to set"));
        }
        calls.push(Setting::prctl(PR_SET_IO_FLUSHER, [1, 0, 0, 0]));
    }
    if entry.policy != own.policy {
        let what = format!("thread {tid}");
        let fitted = entry.policy.as_ref().and_then(|policy| own.nodes.fit(&what, policy));
        let (mode, nodes) = fitted.unwrap_or((numa::DEFAULT, &[]));
        let set: Vec<u64> = nodes.chunks(8).map(word).collect();
        let bits = if set.is_empty() { 0 } else { set.len() as u64 * 64 + 1 };
        let at = if set.is_empty() { 0 } else { words(&set) };
        let call = Setting::call(libc::SYS_set_mempolicy, [mode.into(), at, bits, 0, 0]);
        calls.push(if set.is_empty() { call } else { call.pointing(1) });
    }
    calls.extend(speculation(tid, entry, own));
    // From here on the thread must do neither.
    if entry.cpuid_faults() {
        calls.push(Setting::call(libc::SYS_arch_prctl, [ARCH_SET_CPUID, 0, 0, 0, 0]));
    }
    if entry.tsc_faults() {
        calls.push(Setting::prctl(PR_SET_TSC, [PR_TSC_SIGSEGV as u64, 0, 0, 0]));
    }
    Ok(calls)
}

fn word(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

fn speculation(tid: i32, entry: &pb::RcriuThreadEntry, own: &Own) -> Vec<Setting> {
    let mut calls = Vec::new();
    for (which, (own, usual)) in (0u32..).zip(own.speculation.iter().zip(SPEC_USUAL)) {
        let chosen = entry.speculation.iter().find(|s| s.which == which);
        let wanted = chosen.map_or(usual, |s| s.control.into());
        let has = own & !SPEC_PRCTL;
        if wanted == has {
            continue;
        }
        let forced = has == SPEC_FORCE_DISABLE && wanted == SPEC_ENABLE;
        if own & SPEC_PRCTL != 0 && !forced {
            calls.push(Setting::prctl(PR_SET_SPECULATION_CTRL, [which.into(), wanted, 0, 0]));
        } else if chosen.is_some() && *own != 0 && !matches!(has, SPEC_DISABLE | SPEC_FORCE_DISABLE) {
            log::warn!("Thread {tid}: mitigation {which} of speculative execution cannot be chosen here");
        }
    }
    calls
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fresh() -> ThreadInfo {
        ThreadInfo {
            timer_slack: 50_000,
            tsc: 1,
            cpuid_allowed: 1,
            mce_kill: 2,
            io_flusher: -1,
            speculation: [3, 3, 5],
            ..ThreadInfo::default()
        }
    }

    fn kept(info: ThreadInfo, flags: u32) -> pb::RcriuThreadEntry {
        let mut entry = pb::RcriuThreadEntry::default();
        dump(&info, || Ok(flags), &mut entry).unwrap();
        entry
    }

    fn own() -> Own {
        Own {
            slack: 50_000,
            mce_kill: 2,
            speculation: [3, 2, 0],
            cap_eff: 0,
            policy: None,
            nodes: numa::Nodes::own().unwrap(),
        }
    }

    #[test]
    fn a_fresh_thread_has_nothing_to_tell_and_nothing_to_set() {
        let entry = kept(fresh(), 0x0040_0040);
        assert_eq!(entry, pb::RcriuThreadEntry::default());
        assert_eq!(restore(1, Some(&entry), &own(), false, |_| 0).unwrap(), []);
        assert_eq!(restore(1, None, &own(), true, |_| 0).unwrap(), []);
    }

    #[test]
    fn what_was_chosen_is_set_and_what_we_have_is_taken_back() {
        let info = ThreadInfo { tsc: 2, timer_slack: 1, speculation: [5, 5, 5], mce_kill: 1, ..fresh() };
        let entry = kept(info, PF_IO_FLUSHER);
        assert_eq!((entry.timer_slack, entry.io_flusher, entry.speculation.len()), (Some(1), Some(true), 2));
        assert!(
            restore(1, Some(&entry), &own(), false, |_| 0).unwrap_err().to_string().contains("SYS_RESOURCE")
        );
        let entry = pb::RcriuThreadEntry { io_flusher: None, ..entry };
        let options: Vec<u64> =
            restore(1, Some(&entry), &own(), false, |_| 0).unwrap().iter().map(|s| s.args[0]).collect();
        assert_eq!(options, [PR_SET_TIMERSLACK, PR_MCE_KILL, PR_SET_SPECULATION_CTRL, PR_SET_TSC]);
        let slow = Own { slack: 7, ..own() };
        assert_eq!(restore(1, None, &slow, false, |_| 0).unwrap()[0].args[1], 50_000);
        assert_eq!(restore(1, None, &slow, true, |_| 0).unwrap(), []);
    }
}
