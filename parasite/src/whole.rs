//! Everything that a dump asks of every process, in one visit: each visit costs as much as hundreds of system calls.
//!
//! The answers lie behind each other in the data area; the block says which build gave them.
//!
//! # Safety
//! Works on the data area, whose length is checked part by part.

use blobrt::syscall::{Errno, Result};

use crate::{
    BUILD, Control, DATA_LEN, policies,
    sigactions::{self, SIGNALS, Sigaction},
    task::{self, TaskInfo},
    thread::{self, ThreadInfo},
    timers::{self, ITIMERS, Itimer},
};

/// Where [`TaskInfo`] is.
pub const TASK_AT: usize = 0;
/// Where [`ThreadInfo`] of the calling thread is.
pub const THREAD_AT: usize = TASK_AT + size_of::<TaskInfo>();
/// Where the interval timers are.
pub const ITIMERS_AT: usize = THREAD_AT + size_of::<ThreadInfo>();
/// Where the actions of all signals are.
pub const SIGACTIONS_AT: usize = ITIMERS_AT + ITIMERS * size_of::<Itimer>();
/// Where addresses are, which memory policies replace.
pub const POLICIES_AT: usize = SIGACTIONS_AT + SIGNALS * size_of::<Sigaction>();
/// Most addresses that fit.
pub const MAX_POLICIES: usize = (DATA_LEN - POLICIES_AT) / 8;

/// `args[0]` and `args[1]` as for the command about a thread, `args[2]` addresses as for that about policies.
///
/// # Safety
/// As [`Control::data_mut`].
pub unsafe fn read(control: &mut Control) -> Result<()> {
    let [inspect, session, addresses, ..] = control.args;
    // SAFETY: as the caller says.
    unsafe {
        *part(control, TASK_AT)?.data_one()? = task::read();
        *part(control, THREAD_AT)?.data_one()? = thread::read(inspect, session != 0);
        timers::read_itimers(part(control, ITIMERS_AT)?.data_mut(ITIMERS)?)?;
        sigactions::read(part(control, SIGACTIONS_AT)?.data_mut(SIGNALS)?)?;
        let mut last = part(control, POLICIES_AT)?;
        last.args[0] = addresses;
        policies::read(&mut last)?;
    }
    control.ret[0] = BUILD;
    Ok(())
}

/// The block with the data area from `at` on.
fn part(control: &Control, at: usize) -> Result<Control> {
    let at = at as u64;
    let left = control.data_len.checked_sub(at).ok_or(Errno(22))?;
    Ok(Control { data: control.data + at, data_len: left, ..*control })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Command, tests::Bench};

    #[test]
    fn all_answers_are_those_of_the_single_commands() {
        let mut whole = Bench::new(Command::Whole);
        whole.control.args = [u64::from(std::process::id()), 0, 1, 0, 0, 0];
        whole.data[POLICIES_AT / 8] = 0;
        assert_eq!(whole.run(), 0);
        let mut single = Bench::new(Command::Task);
        assert_eq!(single.run(), 0);
        let bytes = |bench: &Bench, at: usize, len: usize| bench.data[at / 8..(at + len) / 8].to_vec();
        let len = size_of::<TaskInfo>();
        assert_eq!(bytes(&whole, TASK_AT, len), bytes(&single, 0, len));
        let mut single = Bench::new(Command::Sigactions);
        assert_eq!(single.run(), 0);
        let len = SIGNALS * size_of::<Sigaction>();
        assert_eq!(bytes(&whole, SIGACTIONS_AT, len), bytes(&single, 0, len));
        assert!((whole.data[POLICIES_AT / 8] as i64) < 0, "nothing is mapped there");
        whole.control.args[2] = MAX_POLICIES as u64 + 1;
        assert_eq!(whole.run(), -22);
    }
}
