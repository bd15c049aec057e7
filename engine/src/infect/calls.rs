//! The parasite's commands as ordinary functions.

use parasite::{
    Command, DATA_LEN,
    aio::AioRing,
    policies, rseq,
    sigactions::{SIGNALS, Sigaction},
    task::TaskInfo,
    thread::{NODE_WORDS, ThreadInfo},
    timers::{ITIMERS, Itimer, MAX_POSIX, PosixTimer},
    tty::TtyInfo,
};

use super::{
    Infected, StoppedThread, syscall,
    thread::{Rseq, rseq_at},
};
use crate::{
    error::{Error, Result},
    pstree::RealPid,
    sys::ptrace::RseqConfig,
};

impl Infected<'_> {
    /// What only the process itself can be asked.
    pub fn task_info(&self) -> Result<TaskInfo> {
        if let Some(known) = &self.known {
            return Ok(known.task);
        }
        self.call(Command::Task, [0; 6], &[])?;
        self.one()
    }

    /// What only the thread itself can be asked.
    pub fn thread_info(&self, thread: &StoppedThread) -> Result<ThreadInfo> {
        self.thread_info_and(thread, RealPid(0), false)
    }

    /// The same and more. `inspect` is a process whose inspection it is to try, 0 for
    /// none; `session` says that the keyring of its session is to be told too.
    pub fn thread_info_and(
        &self,
        thread: &StoppedThread,
        inspect: RealPid,
        session: bool,
    ) -> Result<ThreadInfo> {
        if let Some(known) = &self.known
            && (known.thread.0, known.thread.1) == (thread.tid(), (inspect, session))
        {
            return Ok(known.thread.2);
        }
        let inspect = u64::from(inspect.0.cast_unsigned());
        self.call_in(thread, Command::Thread, [inspect, session.into(), 0, 0, 0, 0], &[])?;
        self.one()
    }

    /// The memory policy of each mapping that has one of its own, by an address in it: mode and nodes.
    pub fn policies(&self, addresses: &[u64]) -> Result<Vec<(u64, i64, Vec<u64>)>> {
        let mut found = Vec::new();
        for part in addresses.chunks(policies::MAX) {
            let modes = match &self.known {
                Some(known) if known.policies.0 == part => known.policies.1.clone(),
                _ => {
                    let bytes: Vec<u8> = part.iter().flat_map(|at| at.to_ne_bytes()).collect();
                    self.call(Command::Policies, [part.len() as u64, 0, 0, 0, 0, 0], &bytes)?;
                    self.answer(part.len())?
                }
            };
            for (at, mode) in part.iter().zip(modes) {
                match mode as i64 {
                    // A kernel without NUMA.
                    mode if mode == -i64::from(libc::ENOSYS) => return Ok(found),
                    mode if mode > 0 => found.push((*at, mode, self.policy_nodes(*at)?)),
                    _ => {}
                }
            }
        }
        Ok(found)
    }

    /// Nodes of the policy of the mapping at `address`.
    fn policy_nodes(&self, address: u64) -> Result<Vec<u64>> {
        let bits = NODE_WORDS as u64 * 64;
        let args = [0, self.data_address(), bits, address, policies::MPOL_F_ADDR as u64];
        self.syscall("get_mempolicy", libc::SYS_get_mempolicy as u64, args, &[0; NODE_WORDS * 8])?;
        self.answer(NODE_WORDS)
    }

    /// Actions of signals 1 to 64, in order; zero for SIGKILL and SIGSTOP.
    pub fn sigactions(&self) -> Result<Vec<Sigaction>> {
        if let Some(known) = &self.known {
            return Ok(known.sigactions.clone());
        }
        self.call(Command::Sigactions, [0; 6], &[])?;
        self.answer(SIGNALS)
    }

    /// Interval timers: real, virtual, profiling.
    pub fn itimers(&self) -> Result<[Itimer; ITIMERS]> {
        if let Some(known) = &self.known {
            return Ok(known.itimers);
        }
        self.call(Command::Itimers, [0; 6], &[])?;
        let list: Vec<Itimer> = self.answer(ITIMERS)?;
        list.try_into().map_err(|_| Error::bug("three timers"))
    }

    /// The POSIX timers with these ids, in this order.
    pub fn posix_timers(&self, ids: &[i32]) -> Result<Vec<PosixTimer>> {
        let mut timers = Vec::with_capacity(ids.len());
        for ids in ids.chunks(MAX_POSIX) {
            let input: Vec<u8> = ids.iter().flat_map(|id| id.to_ne_bytes()).collect();
            self.call(Command::PosixTimers, [ids.len() as u64, 0, 0, 0, 0, 0], &input)?;
            timers.extend(self.answer::<PosixTimer>(ids.len())?);
        }
        Ok(timers)
    }

    /// State of the terminal behind descriptor `fd`, as a process of its session sees it.
    pub fn tty(&self, fd: i32) -> Result<TtyInfo> {
        self.call(Command::Tty, [fd as u64, 0, 0, 0, 0, 0], &[])?;
        self.one()
    }

    /// Head of the asynchronous I/O ring mapped at `address`.
    pub fn aio_ring(&self, address: u64) -> Result<AioRing> {
        self.call(Command::Aio, [address, 0, 0, 0, 0, 0], &[])?;
        self.one()
    }

    /// Has the process make a copy of itself that only holds its memory; its pid in the process's pid namespace.
    ///
    /// # Errors
    /// EAGAIN, ENOMEM: a limit forbids it. Filters of the process may kill whoever makes the copy.
    pub fn copy_memory(&self) -> Result<u64> {
        Ok(self.call(Command::Copy, [0; 6], &[])?.ret[0])
    }

    /// Finds the areas for restartable sequences on a kernel that does not tell a tracer. A section that
    /// was interrupted in the thread that is asked first goes unnoticed; the others' are guessed from it.
    pub(super) fn find_rseq(&self) -> Result<()> {
        let config = |at| RseqConfig::new(at, rseq::LEN, rseq::SIGNATURE);
        let mut offset = None;
        for thread in self.task().threads() {
            let fs = thread.regs().fs_base;
            // Asking clears the word that names the section.
            let guess = offset.map(|o| rseq_at(thread.tid(), config(fs.wrapping_add(o)))).transpose()?;
            let at = self.call_in(thread, Command::Rseq, [fs, 0, 0, 0, 0, 0], &[])?.ret[0];
            thread.found_rseq(match at {
                rseq::NONE => None,
                rseq::UNKNOWN => {
                    return Err(Error::unsupported(format!(
                        "thread {} has registered restartable sequences, and this kernel does not say where",
                        thread.tid()
                    ))
                    .remedy("Linux 5.13 or later does"));
                }
                at => {
                    offset = Some(at.wrapping_sub(fs));
                    let known = guess.filter(|g| g.config.pointer == at);
                    Some(known.unwrap_or(Rseq { config: config(at), cs: 0 }))
                }
            })?;
        }
        Ok(())
    }

    /// System call `nr` with up to five arguments, called `name` in messages. `data` is put where
    /// [`Infected::data_address`] says, for arguments that are addresses; [`Infected::data`] reads what
    /// the call stored there.
    pub fn syscall(&self, name: &'static str, nr: u64, args: [u64; 5], data: &[u8]) -> Result<u64> {
        self.syscall_in(self.runner()?, name, nr, args, data)
    }

    /// The same in a thread that matters.
    pub fn syscall_in(
        &self,
        thread: &StoppedThread,
        name: &'static str,
        nr: u64,
        args: [u64; 5],
        data: &[u8],
    ) -> Result<u64> {
        let [a, b, c, d, e] = args;
        let done = self.call_in(thread, Command::Syscall, [nr, a, b, c, d, e], data)?;
        let task = self.task().pid();
        syscall::value(done.ret[0]).map_err(|errno| Error::sys(format!("{name} in task {task}"), errno))
    }

    /// Address of the data area in the process.
    pub fn data_address(&self) -> u64 {
        self.area.data
    }

    /// The first `len` bytes of the data area.
    pub fn data(&self, len: usize) -> Result<Vec<u8>> {
        self.answer(len.min(DATA_LEN))
    }

    /// Makes the parasite panic, to try how that is reported and survived.
    ///
    /// # Errors
    /// Always: the report.
    pub fn panic(&self) -> Result<()> {
        self.call(Command::Panic, [0; 6], &[]).map(drop)
    }

    fn one<T: parasite::Plain>(&self) -> Result<T> {
        self.answer(1)?.pop().ok_or_else(|| Error::bug("an answer"))
    }
}
