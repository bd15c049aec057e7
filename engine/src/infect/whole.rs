//! What is asked of every process when it is infected, and is known from then on.

use parasite::{
    Command,
    sigactions::{SIGNALS, Sigaction},
    task::TaskInfo,
    thread::ThreadInfo,
    timers::{ITIMERS, Itimer},
    whole,
};

use super::{Hints, Infected, plain::value_of};
use crate::{
    error::{Error, Result},
    procfs::status::Status,
    pstree::RealPid,
};

/// What to ask beside what everybody is asked.
#[derive(Debug)]
pub struct Question<'a> {
    /// Of the thread that stands for the process, read since it stopped.
    pub status: &'a Status,
    /// Where its first stack starts, as `stat` says.
    pub start_stack: u64,
    /// As for [`Infected::thread_info_and`], of the first thread.
    pub inspect: RealPid,
    /// As above.
    pub session: bool,
    /// Addresses for [`Infected::policies`].
    pub addresses: Vec<u64>,
    /// What was found out about processes before; to be used again for the next.
    pub hints: &'a mut Hints,
}

/// The answers.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) task: TaskInfo,
    /// Which thread was asked, and what.
    pub(super) thread: (RealPid, (RealPid, bool), ThreadInfo),
    pub(super) sigactions: Vec<Sigaction>,
    pub(super) itimers: [Itimer; ITIMERS],
    /// Addresses and the modes of their policies.
    pub(super) policies: (Vec<u64>, Vec<u64>),
}

impl Question<'_> {
    /// The parasite's command, its arguments and its data.
    pub(super) fn command(&self) -> (Command, [u64; 6], Vec<u8>) {
        let asked = self.addresses();
        let inspect = u64::from(self.inspect.0.cast_unsigned());
        let mut input = Vec::new();
        if !asked.is_empty() {
            input.resize(whole::POLICIES_AT, 0);
            input.extend(asked.iter().flat_map(|at| at.to_ne_bytes()));
        }
        (Command::Whole, [inspect, self.session.into(), asked.len() as u64, 0, 0, 0], input)
    }

    /// Those that fit; none of more, which are asked in visits of their own.
    fn addresses(&self) -> &[u64] {
        if self.addresses.len() > whole::MAX_POLICIES { &[] } else { &self.addresses }
    }
}

impl Infected<'_> {
    /// Reads the answers.
    pub(super) fn read_whole(&self, question: &Question<'_>) -> Result<Known> {
        let asked = question.addresses();
        let bytes = self.data(whole::POLICIES_AT + 8 * asked.len())?;
        let at = |at: usize| bytes.get(at..).ok_or_else(|| Error::bug("an answer"));
        let all = |at: usize, len: usize, size: usize| {
            bytes
                .get(at..at + len * size)
                .map(|b| b.chunks_exact(size))
                .ok_or_else(|| Error::bug("an answer"))
        };
        let itimers: Vec<Itimer> =
            all(whole::ITIMERS_AT, ITIMERS, size_of::<Itimer>())?.map(value_of).collect();
        let tid = self.runner()?.tid();
        Ok(Known {
            task: value_of(at(whole::TASK_AT)?),
            thread: (tid, (question.inspect, question.session), value_of(at(whole::THREAD_AT)?)),
            sigactions: all(whole::SIGACTIONS_AT, SIGNALS, size_of::<Sigaction>())?.map(value_of).collect(),
            itimers: itimers.try_into().map_err(|_| Error::bug("three timers"))?,
            policies: (asked.to_vec(), all(whole::POLICIES_AT, asked.len(), 8)?.map(value_of).collect()),
        })
    }
}
