//! What a task does on each signal.

use parasite::sigactions::{SIGNALS, Sigaction};
use rcriu_images::pb;
use restorer::args;

use crate::error::{Error, Result};

/// Entries for all signals, given those of signal 1 first. The two that have no action are left out.
pub fn dump(actions: &[Sigaction]) -> Vec<pb::SaEntry> {
    (1..).zip(actions).filter(|(signal, _)| has_action(*signal)).map(|(_, a)| entry(a)).collect()
}

fn has_action(signal: i32) -> bool {
    signal != libc::SIGKILL && signal != libc::SIGSTOP
}

fn entry(action: &Sigaction) -> pb::SaEntry {
    pb::SaEntry {
        sigaction: action.handler,
        flags: action.flags,
        restorer: action.restorer,
        mask: action.mask,
        compat_sigaction: Some(false),
        mask_extended: None,
    }
}

/// Actions for the restorer to set.
pub fn restore(entries: &[pb::SaEntry]) -> Result<Vec<args::Action>> {
    let signals: Vec<i32> = (1..=SIGNALS as i32).filter(|s| has_action(*s)).collect();
    if entries.len() != signals.len() {
        return Err(Error::image(format!("{} signal actions instead of {}", entries.len(), signals.len())));
    }
    let action = |(signal, e): (i32, &pb::SaEntry)| {
        if e.compat_sigaction == Some(true) {
            return Err(Error::unsupported(format!(
                "the action of signal {signal} is that of a 32-bit program"
            )));
        }
        Ok(args::Action {
            handler: e.sigaction,
            flags: e.flags,
            restorer: e.restorer,
            mask: e.mask,
            signal: signal.cast_unsigned(),
            pad: 0,
        })
    };
    signals.into_iter().zip(entries).map(action).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kill_and_stop_have_no_entry() {
        let mut actions = [Sigaction::default(); SIGNALS];
        for (signal, action) in (1..).zip(&mut actions) {
            action.handler = signal;
        }
        let entries = dump(&actions);
        assert_eq!(entries.len(), 62);
        let handlers: Vec<_> = entries.iter().map(|e| e.sigaction).collect();
        assert_eq!(handlers[7..10], [8, 10, 11]);
        assert_eq!(handlers[15..18], [17, 18, 20]);
        assert_eq!(handlers[61], 64);
        let back = restore(&entries).unwrap();
        assert!(back.iter().all(|a| a.handler == u64::from(a.signal)));
        assert!(restore(&entries[1..]).is_err());
    }
}
