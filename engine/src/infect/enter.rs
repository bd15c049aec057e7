//! Entering the blob and coming back: what a thread finds there, where it would go without us, what is done after a
//! crash.

use std::time::Duration;

use parasite::{Control, DATA_LEN, STATE_POSTED};

use super::{
    Infected, StoppedThread,
    area::Slot,
    blob::{PARASITE, PARASITE_END, PARASITE_ENTRY},
    thread::{FAULTS, bit},
    visit::{self, End, Visit},
};
use crate::{
    arch::{Regs, SigFrame},
    error::{Error, Kind, Result},
    procfs::status::Status,
    sys::{ptrace, vm},
};

const RT_SIGACTION: u64 = libc::SYS_rt_sigaction as u64;

impl Infected<'_> {
    /// What every control block holds.
    pub(super) fn control(&self, thread: &StoppedThread) -> Result<Control> {
        let (rseq_cs_at, rseq_cs) = thread.rseq_word().unwrap_or((0, 0));
        Ok(Control {
            build: PARASITE.build,
            state: STATE_POSTED,
            end_signal: self.signal_for(thread),
            frame_sp: self.area.frame + 8,
            rseq_cs_at,
            rseq_cs,
            data: self.area.data,
            data_len: DATA_LEN as u64,
            ..Control::default()
        })
    }

    /// Where the thread would go if we died while it is in the blob.
    pub(super) fn frame(&self, thread: &StoppedThread) -> Result<SigFrame> {
        self.frame_at(thread, self.area.frame)
    }

    /// The same, to be put at this address.
    pub(super) fn frame_at(&self, thread: &StoppedThread, at: u64) -> Result<SigFrame> {
        let mut regs = *thread.regs();
        regs.settle();
        SigFrame::build(at, &regs, thread.xsave(), self.gadget.layout, thread.sigmask(), None)
    }

    /// A thread that blocks the end signal might have one pending: there, system calls are watched.
    pub(super) fn signal_for(&self, thread: &StoppedThread) -> u64 {
        match self.end_signal {
            0 => 0,
            signal if thread.sigmask() & bit(signal as i32) != 0 => 0,
            signal => signal,
        }
    }

    /// Enters the blob at `entry` and gives the registers at its end.
    pub(super) fn visit(&self, thread: &StoppedThread, entry: u64, limit: Duration) -> Result<Regs> {
        let a = &self.area;
        let regs = thread.regs().for_call(entry, a.stack_top(), a.control);
        visit::run(thread, &regs, self.end(thread, limit)).map_err(|e| self.after_crash(e))
    }

    fn end(&self, thread: &StoppedThread, limit: Duration) -> End {
        End::Blob { at: self.area.base + PARASITE_END, signal: self.signal_for(thread) as i32, limit }
    }

    /// A visit of a thread that uses this slot.
    pub(super) fn visit_of<'a>(&self, thread: &'a StoppedThread, slot: &Slot) -> Visit<'a> {
        let regs = thread.regs().for_call(self.area.base + PARASITE_ENTRY, slot.control, slot.control);
        Visit::new(thread, regs, self.end(thread, visit::LIMIT))
    }

    /// When the blob has failed.
    pub(super) fn after_crash(&self, e: Error) -> Error {
        if !matches!(e.kind(), Kind::TaskDied(_))
            && let Err(second) = self.ignore_again()
        {
            log::error!("task {}: {second}", self.task.pid());
        }
        e
    }

    /// A fault whose signal the process ignores makes the kernel set the signal's action to its
    /// default. After a crash of the blob: makes it ignored again.
    fn ignore_again(&self) -> Result<()> {
        let lost = self.ignored & FAULTS & !Status::read(&self.task.live_dir()?)?.sig_ignored;
        for signal in (1..=64).filter(|s| lost & bit(*s) != 0) {
            let (at, size) = (self.area.data, 8);
            let args = [signal as u64, 0, at, size, 0, 0];
            self.bare_syscall("rt_sigaction", RT_SIGACTION, args)?;
            vm::write(self.task.live(), at, &(libc::SIG_IGN as u64).to_ne_bytes())?;
            let args = [signal as u64, at, 0, size, 0, 0];
            self.bare_syscall("rt_sigaction", RT_SIGACTION, args)?;
        }
        Ok(())
    }

    /// Writes to pages that are read-execute.
    pub(super) fn write_through(&self, pieces: &[(u64, &[u8])]) -> Result<()> {
        let file = vm::MemFile::open(self.task.live())?;
        for (at, data) in pieces {
            match file.write(*at, data) {
                // proc_mem.force_override=never; ptrace has no such switch.
                Err(e) if matches!(e.errno(), Some(libc::EIO | libc::EFAULT | libc::EACCES)) => {
                    data.chunks(8).zip((*at..).step_by(8)).try_for_each(|(chunk, at)| {
                        let mut word = [0; 8];
                        word[..chunk.len()].copy_from_slice(chunk);
                        ptrace::poke(self.runner()?.tid(), at, u64::from_ne_bytes(word))
                    })
                }
                other => other,
            }?;
        }
        Ok(())
    }
}
