//! What a task does on each signal.

use rcriu_images::pb;

/// Number of signals, and the highest of them.
pub const SIGNALS: usize = 64;

/// The kernel's `struct sigaction` of rt_sigaction(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Action {
    pub handler: u64,
    pub flags: u64,
    pub restorer: u64,
    pub mask: u64,
}

/// Entries for all signals, given those of signal 1 first. The two that have no action are left out.
pub fn dump(actions: &[Action; SIGNALS]) -> Vec<pb::SaEntry> {
    (1..).zip(actions).filter(|(signal, _)| has_action(*signal)).map(|(_, a)| entry(a)).collect()
}

fn has_action(signal: i32) -> bool {
    signal != libc::SIGKILL && signal != libc::SIGSTOP
}

fn entry(action: &Action) -> pb::SaEntry {
    pb::SaEntry {
        sigaction: action.handler,
        flags: action.flags,
        restorer: action.restorer,
        mask: action.mask,
        compat_sigaction: Some(false),
        mask_extended: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kill_and_stop_have_no_entry() {
        let mut actions = [Action::default(); SIGNALS];
        for (signal, action) in (1..).zip(&mut actions) {
            action.handler = signal;
        }
        let entries = dump(&actions);
        assert_eq!(entries.len(), 62);
        let handlers: Vec<_> = entries.iter().map(|e| e.sigaction).collect();
        assert_eq!(handlers[7..10], [8, 10, 11]);
        assert_eq!(handlers[16..19], [17, 18, 20]);
        assert_eq!(handlers[61], 64);
    }
}
