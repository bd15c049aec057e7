//! Many threads asked together.
//!
//! One after the other, the engine waits for each thread to be woken, to answer, and to stop: most of the time
//! nobody works. So a number of them are sent out at once, each with a stack, a control block and a signal frame of
//! its own, and are taken back when all have been. The other processors work on them meanwhile.
//!
//! Threads that cannot tell of their end by a signal, or whose system calls are dispatched, are asked alone.

use nix::sys::uio::RemoteIoVec;
use parasite::{Command, Control, STATE_DONE, thread::ThreadInfo};

use super::{
    Infected, StoppedThread,
    area::Slot,
    plain::{bytes_of, value_of},
    visit::Visit,
};
use crate::{
    error::{Error, Kind, Result},
    pstree::RealPid,
    sys::{vm, wait::Status},
};

/// What stands at the end of a small stack.
const MARK: u64 = 0x6b72_616d_5f72_6372;

/// A thread and what to ask it beside what all are asked, see [`Infected::thread_info_and`].
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// The thread.
    pub thread: &'a StoppedThread,
    /// A process whose inspection it is to try, 0 for none.
    pub inspect: RealPid,
    /// The keyring of its session is to be told.
    pub session: bool,
}

impl Infected<'_> {
    /// The answers of all, in their order.
    pub fn threads_info(&self, all: &[Asked<'_>]) -> Result<Vec<ThreadInfo>> {
        let mut answers: Vec<Option<ThreadInfo>> = vec![None; all.len()];
        let together: Vec<usize> = (0..all.len()).filter(|at| self.may_join(all[*at].thread)).collect();
        if together.len() > 1 && self.area.slot_count() > 1 {
            for part in together.chunks(self.area.slot_count()) {
                let asked: Vec<Asked<'_>> = part.iter().map(|at| all[*at]).collect();
                for (at, info) in part.iter().zip(self.ask_together(&asked)?) {
                    answers[*at] = Some(info);
                }
            }
        }
        let alone = |(asked, answer): (&Asked<'_>, Option<ThreadInfo>)| match answer {
            Some(info) => Ok(info),
            None => self.thread_info_and(asked.thread, asked.inspect, asked.session),
        };
        all.iter().zip(answers).map(alone).collect()
    }

    fn may_join(&self, thread: &StoppedThread) -> bool {
        let known = self.known.as_ref().is_some_and(|known| known.thread.0 == thread.tid());
        !known && self.signal_for(thread) != 0 && thread.syscall_user_dispatch().mode == 0
    }

    fn ask_together(&self, all: &[Asked<'_>]) -> Result<Vec<ThreadInfo>> {
        let slots: Vec<Slot> = self.area.slots().take(all.len()).collect();
        self.furnish(all, &slots)?;
        let mut visits: Vec<Visit<'_>> =
            all.iter().zip(&slots).map(|(asked, slot)| self.visit_of(asked.thread, slot)).collect();
        let outcome = self.send_out(&mut visits, &slots);
        if outcome.is_err() {
            visits.iter_mut().for_each(Visit::give_up);
        }
        outcome.map_err(|e| self.after_crash(e))
    }

    /// Writes what each finds in its slot.
    fn furnish(&self, all: &[Asked<'_>], slots: &[Slot]) -> Result<()> {
        let mut own = Vec::with_capacity(all.len());
        for (asked, slot) in all.iter().zip(slots) {
            let inspect = u64::from(asked.inspect.0.cast_unsigned());
            let control = Control {
                command: Command::Thread as u32,
                args: [inspect, asked.session.into(), 0, 0, 0, 0],
                frame_sp: slot.frame + 8,
                data: slot.data,
                data_len: size_of::<ThreadInfo>() as u64,
                ..self.control(asked.thread)?
            };
            own.push((control, self.frame_at(asked.thread, slot.frame)?));
        }
        let mark = MARK.to_ne_bytes();
        let pieces: Vec<(u64, &[u8])> = own
            .iter()
            .zip(slots)
            .flat_map(|((control, frame), slot)| {
                [(slot.mark, &mark[..]), (slot.control, bytes_of(control)), (slot.frame, &frame.bytes[..])]
            })
            .collect();
        vm::write_pieces(self.task.live(), &pieces)
    }

    /// All go, and all come back before the first is looked at: none keeps another waiting.
    fn send_out(&self, visits: &mut [Visit<'_>], slots: &[Slot]) -> Result<Vec<ThreadInfo>> {
        for visit in visits.iter_mut() {
            visit.begin()?;
        }
        let stops: Vec<Status> = visits.iter().map(Visit::wait).collect::<Result<_>>()?;
        let mut answers = self.answers(slots)?;
        for ((visit, stop), at) in visits.iter_mut().zip(stops).zip(0..) {
            if answers[at].0.state == STATE_DONE && visit.is_end(stop) {
                visit.end()?;
            } else {
                // Something came in between.
                let stop = visit.go_on(Some(stop))?;
                visit.end_at(stop)?;
                answers[at] = self.answers(&slots[at..=at])?.remove(0);
            }
        }
        let checked = |((control, info, mark), visit): ((Control, ThreadInfo, u64), &Visit<'_>)| {
            if control.state != STATE_DONE {
                return Err(Error::bug(format!("the parasite ended in state {}", control.state)));
            }
            if mark != MARK {
                return Err(Error::bug("the parasite's stack is too short"));
            }
            match control.result {
                0 => Ok(info),
                e => Err(Error::sys(format!("Thread in thread {}", visit.thread().tid()), -e as i32)),
            }
        };
        answers.into_iter().zip(&*visits).map(checked).collect()
    }

    /// What is in the slots now.
    fn answers(&self, slots: &[Slot]) -> Result<Vec<(Control, ThreadInfo, u64)>> {
        const CONTROL: usize = size_of::<Control>();
        const INFO: usize = size_of::<ThreadInfo>();
        const EACH: usize = CONTROL + INFO + size_of::<u64>();
        let piece = |base: u64, len| RemoteIoVec { base: base as usize, len };
        let pieces: Vec<_> = slots
            .iter()
            .flat_map(|slot| [piece(slot.control, CONTROL), piece(slot.data, INFO), piece(slot.mark, 8)])
            .collect();
        let mut bytes = vec![0; slots.len() * EACH];
        if vm::read_pieces(self.task.live(), &pieces, &mut bytes)? != bytes.len() {
            return Err(Error::new(Kind::TaskDied(self.task.pid().0)));
        }
        let values = |b: &[u8]| (value_of(b), value_of(&b[CONTROL..]), value_of(&b[CONTROL + INFO..]));
        Ok(bytes.chunks_exact(EACH).map(values).collect())
    }
}
