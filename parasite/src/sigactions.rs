//! Actions of all signals.
//!
//! # Safety
//! rt_sigaction(2) without a new action only stores the present one.

use blobrt::syscall::{Result, nr, syscall4};

use crate::plain;

/// Number of signals, real-time ones included.
pub const SIGNALS: usize = 64;

plain! {
    /// `struct sigaction` as the kernel has it on x86_64.
    pub struct Sigaction[32] {
        /// Handler, 0 for the default, 1 to ignore.
        pub handler: u64,
        /// `SA_*` bits.
        pub flags: u64,
        /// Where a handler returns to.
        pub restorer: u64,
        /// Signals blocked while it runs.
        pub mask: u64,
    }
}

const SIGKILL: usize = 9;
const SIGSTOP: usize = 19;

/// Asks for signals 1..=64, in order. SIGKILL and SIGSTOP have no action: theirs stays zero.
pub fn read(to: &mut [Sigaction]) -> Result<()> {
    for (i, action) in to.iter_mut().enumerate() {
        *action = Sigaction::default();
        let signal = i + 1;
        if signal == SIGKILL || signal == SIGSTOP {
            continue;
        }
        // SAFETY: no new action; the old one is stored in a structure of the kernel's layout.
        unsafe { syscall4(nr::RT_SIGACTION, signal, 0, &raw mut *action as usize, 8) }?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Command, tests::Bench};

    #[test]
    fn actions_are_those_of_the_process() {
        let mut bench = Bench::new(Command::Sigactions);
        assert_eq!(bench.run(), 0);
        // Rust programs ignore SIGPIPE and handle SIGSEGV to report stack overflows.
        assert_eq!(bench.read::<Sigaction>(13 - 1).handler, 1);
        assert!(bench.read::<Sigaction>(11 - 1).handler > 1);
        assert_eq!(bench.read::<Sigaction>(SIGKILL - 1), Sigaction::default());
    }
}
