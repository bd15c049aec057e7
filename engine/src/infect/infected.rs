//! A stopped process with the parasite in it.

use std::cell::Cell;

use parasite::{Command, Control, DATA_LEN, Plain, STATE_DONE};

use super::{
    area::{Area, TOGETHER},
    blob::{PARASITE, PARASITE_ENTRY, PARASITE_SETUP_ENTRY},
    ledger, leftover, limits,
    plain::{bytes_of, value_of},
    syscall::{Gadget, Hints},
    task::StoppedTask,
    thread::{FAULTS, StoppedThread, bit},
    visit,
    whole::{Known, Question},
};
use crate::{
    arch::SigFrame,
    error::{Error, Kind, Result},
    kernel::Kernel,
    procfs::{maps, status::Status},
    pstree::RealPid,
    sys::{ptrace, vm},
};

const MMAP: u64 = libc::SYS_mmap as u64;
const MUNMAP: u64 = libc::SYS_munmap as u64;

/// So few threads are asked one after the other.
const FEW: usize = 4;

/// The parasite's mapping in a stopped process. Dropping it removes the mapping; the process stays
/// stopped.
#[derive(Debug)]
pub struct Infected<'t> {
    pub(super) task: &'t StoppedTask,
    pub(super) kernel: &'t Kernel,
    pub(super) area: Area,
    pub(super) gadget: Gadget,
    /// Signal that tells of the end of a visit, 0 to watch system calls.
    pub(super) end_signal: u64,
    /// Signals the process ignores.
    pub(super) ignored: u64,
    /// Thread whose signal frame is in place.
    framed: Cell<Option<RealPid>>,
    /// What was asked at the beginning.
    pub(super) known: Option<Known>,
    mapped: bool,
    entry: Option<ledger::Entry>,
    pub(super) pidfd: std::cell::OnceCell<std::os::fd::OwnedFd>,
}

impl<'t> Infected<'t> {
    /// Maps the parasite and sees that it answers.
    ///
    /// # Errors
    /// Refusals that say why nothing could be mapped (a hard limit, a security module); on every error
    /// the process is as it was.
    pub fn new(task: &'t StoppedTask, kernel: &'t Kernel) -> Result<Self> {
        Self::infect(task, kernel, None).map_err(|e| e.during(format!("task {}", task.pid())))
    }

    /// The same, and asks what is asked of every process on the way: the answers cost no visit of their own.
    pub fn asking(task: &'t StoppedTask, kernel: &'t Kernel, question: &mut Question<'_>) -> Result<Self> {
        Self::infect(task, kernel, Some(question)).map_err(|e| e.during(format!("task {}", task.pid())))
    }

    fn infect(
        task: &'t StoppedTask,
        kernel: &'t Kernel,
        mut question: Option<&mut Question<'_>>,
    ) -> Result<Self> {
        let dir = task.live_dir()?;
        let read;
        let status = match &question {
            Some(question) => question.status,
            None => {
                read = Status::read(&dir)?;
                &read
            }
        };
        let frame_len = task.threads().iter().map(|t| SigFrame::max_len(t.xsave())).max().unwrap_or(0) as u64;
        let mut none = Hints::default();
        let (hints, stack) =
            question.as_mut().map_or((&mut none, None), |q| (&mut *q.hints, Some(q.start_stack)));
        let mut infected = Infected {
            task,
            kernel,
            area: Area::new(0, &PARASITE, frame_len, if task.threads().len() > FEW { TOGETHER } else { 0 }),
            gadget: Gadget::find(first(task)?, &dir, stack, hints)?,
            end_signal: end_signal(status),
            ignored: status.sig_ignored,
            framed: Cell::new(None),
            known: None,
            mapped: false,
            entry: None,
            pidfd: std::cell::OnceCell::new(),
        };
        let (command, args, input) =
            question.as_ref().map_or((Command::Hello, [0; 6], Vec::new()), |q| q.command());
        let mut hello = infected.map(command, args, &input, infected.area.slot_count() == 0);
        if infected.area.slot_count() > 0 && matches!(&hello, Err(e) if is_limit(e)) {
            // There is no room for many at once.
            infected.unmap()?;
            infected.area = Area::new(0, &PARASITE, frame_len, 0);
            hello = infected.map(command, args, &input, true);
        }
        let hello = match hello {
            Ok(hello) => hello,
            Err(e) => {
                // The call may have been made although what followed it failed.
                if !infected.mapped
                    && let Ok(maps) = maps::smaps(&dir)
                    && let Err(second) = leftover::remove_from(task, &maps)
                {
                    log::error!("task {}: {second}", task.pid());
                }
                return Err(e);
            }
        };
        if hello.ret[0] != PARASITE.build {
            return Err(Error::bug("the parasite is of another build than the engine"));
        }
        if let Some(question) = question {
            infected.known = Some(infected.read_whole(question)?);
        }
        if !kernel.get_rseq_conf {
            infected.find_rseq()?;
        }
        Ok(infected)
    }

    /// Makes the mapping: read-execute as a whole, because no page may ever be writable and executable
    /// (a process can forbid that); then the blob itself, from its own code, makes its data and stack
    /// read-write, and goes on with its first command. So a single system call runs without the blob's net.
    /// `insist` says to raise limits that stand in the way.
    fn map(&mut self, command: Command, args: [u64; 6], input: &[u8], insist: bool) -> Result<Control> {
        let mut raised = None;
        if let Some(ledger) = self.task.ledger() {
            self.entry = ledger.enter(self.task.pid(), self.task.dir(), self.area.len)?;
        }
        let base = match self.map_region() {
            Err(e) if is_limit(&e) && insist => {
                raised = Some(limits::Raised::new(self.task.pid())?);
                self.map_region().map_err(|e| limits::Raised::explain(self.task.pid(), e))?
            }
            other => other?,
        };
        self.area = self.area.at(base);
        self.mapped = true;
        if let Some(entry) = &self.entry {
            entry.mapped(base);
        }
        let thread = self.runner()?;
        let a = &self.area;
        let control = Control {
            command: command as u32,
            args,
            setup: [a.rw.0, a.rw.1, a.stack.0, a.stack.1],
            ..self.control(thread)?
        };
        // Code, data and control block lie behind each other.
        let mut image = vec![0; (a.control - base) as usize];
        let (code, data) = (PARASITE.code(), PARASITE.data(base));
        image[..code.len()].copy_from_slice(code);
        image[PARASITE.rx_len..PARASITE.rx_len + data.len()].copy_from_slice(&data);
        image.extend_from_slice(bytes_of(&control));
        self.write_through(&[(base, &image), (a.data, input), (a.frame, &self.frame(thread)?.bytes)])?;
        self.framed.set(Some(thread.tid()));
        match self.first_call(thread) {
            Err(e) if is_limit(&e) && insist && raised.is_none() => {
                raised = Some(limits::Raised::new(self.task.pid())?);
                self.first_call(thread).map_err(|e| limits::Raised::explain(self.task.pid(), e))?;
            }
            other => other?,
        }
        drop(raised);
        self.result(thread, command)
    }

    fn map_region(&self) -> Result<u64> {
        let prot = (libc::PROT_READ | libc::PROT_EXEC) as u64;
        // Without reserve: by that the mapping is known should we be killed.
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE) as u64;
        let args = [0, self.area.len, prot, flags, u64::MAX, 0];
        self.bare_syscall("mmap", MMAP, args).map_err(|e| match e.errno() {
            Some(libc::EACCES | libc::EPERM) => {
                e.remedy("a security module forbids the process anonymous executable memory")
            }
            _ => e,
        })
    }

    /// The visit of the blob's setup entry, which goes on with the command in the control block.
    fn first_call(&self, thread: &StoppedThread) -> Result<()> {
        let end = self.visit(thread, self.area.base + PARASITE_SETUP_ENTRY, visit::LIMIT)?;
        match i32::try_from(-(end.r13 as i64)) {
            Ok(0) => Ok(()),
            Ok(errno) => Err(Error::sys("mprotect in the process", errno)),
            Err(_) => Err(Error::bug(format!("parasite setup gave {:#x}", end.r13))),
        }
    }

    /// The process this is in.
    pub fn task(&self) -> &'t StoppedTask {
        self.task
    }

    /// Range of the mapping in the process: not part of it, to be left out of what is dumped.
    pub fn range(&self) -> std::ops::Range<u64> {
        self.area.base..self.area.base + self.area.len
    }

    /// Address of a `syscall` instruction that is part of the process.
    pub fn syscall_instruction(&self) -> u64 {
        self.gadget.syscall_instruction()
    }

    /// Removes the mapping; an explicit drop, with its error.
    pub fn cure(mut self) -> Result<()> {
        self.unmap()
    }

    fn unmap(&mut self) -> Result<()> {
        let _entry = self.entry.take();
        if !self.mapped {
            return Ok(());
        }
        self.mapped = false;
        match self.bare_syscall("munmap", MUNMAP, [self.area.base, self.area.len, 0, 0, 0, 0]) {
            // Nothing left to cure.
            Err(e) if matches!(e.kind(), Kind::TaskDied(_)) => Ok(()),
            other => other.map(drop).map_err(|e| e.during(format!("task {}", self.task.pid()))),
        }
    }

    /// The thread that runs what need not run in a particular one: the first that still lives.
    pub(super) fn runner(&self) -> Result<&'t StoppedThread> {
        let alive = |t: &&StoppedThread| ptrace::get_sigmask(t.tid()).is_ok();
        self.task.threads().iter().find(alive).ok_or_else(|| Error::new(Kind::TaskDied(self.task.pid().0)))
    }

    /// One system call from the target's own instruction, without the parasite.
    pub(super) fn bare_syscall(&self, name: &'static str, nr: u64, args: [u64; 6]) -> Result<u64> {
        self.gadget.call(self.runner()?, name, nr, args)
    }

    /// Runs `command` in the runner thread; `input` goes to the data area.
    pub(super) fn call(&self, command: Command, args: [u64; 6], input: &[u8]) -> Result<Control> {
        self.call_in(self.runner()?, command, args, input)
    }

    /// Runs `command` in `thread`.
    ///
    /// # Errors
    /// The command's own error number, under the command's name; what went wrong inside the parasite.
    pub(super) fn call_in(
        &self,
        thread: &StoppedThread,
        command: Command,
        args: [u64; 6],
        input: &[u8],
    ) -> Result<Control> {
        if input.len() > DATA_LEN {
            return Err(Error::bug(format!("{} bytes for the parasite's data area", input.len())));
        }
        let a = &self.area;
        let control = Control { command: command as u32, args, ..self.control(thread)? };
        let frame;
        let mut pieces: Vec<(u64, &[u8])> = vec![(a.control, bytes_of(&control))];
        if !input.is_empty() {
            pieces.push((a.data, input));
        }
        if self.framed.get() != Some(thread.tid()) {
            frame = self.frame(thread)?;
            pieces.push((a.frame, &frame.bytes));
            self.framed.set(None);
        }
        vm::write_pieces(thread.tid(), &pieces)?;
        self.framed.set(Some(thread.tid()));

        let limit = if command == Command::WritePages { visit::LIMIT_IO } else { visit::LIMIT };
        self.visit(thread, a.base + PARASITE_ENTRY, limit)?;
        self.result(thread, command)
    }

    /// The control block as the blob left it.
    fn result(&self, thread: &StoppedThread, command: Command) -> Result<Control> {
        let control: Control = self.read_at(thread, self.area.control)?;
        if control.state != STATE_DONE {
            return Err(Error::bug(format!("the parasite ended in state {}", control.state)));
        }
        match control.result {
            0 => Ok(control),
            e => Err(Error::sys(format!("{command:?} in thread {}", thread.tid()), -e as i32)),
        }
    }

    /// `count` values from the start of the data area.
    pub(super) fn answer<T: Plain>(&self, count: usize) -> Result<Vec<T>> {
        let len = count * size_of::<T>();
        if len > DATA_LEN {
            return Err(Error::bug(format!("{len} bytes from the parasite's data area")));
        }
        let mut bytes = vec![0; len];
        vm::read(self.task.live(), self.area.data, &mut bytes)?;
        Ok(bytes.chunks_exact(size_of::<T>()).map(value_of).collect())
    }

    fn read_at<T: Plain>(&self, thread: &StoppedThread, at: u64) -> Result<T> {
        let mut bytes = vec![0; size_of::<T>()];
        vm::read(thread.tid(), at, &mut bytes)?;
        Ok(value_of(&bytes))
    }
}

impl Drop for Infected<'_> {
    fn drop(&mut self) {
        if let Err(e) = self.unmap() {
            log::error!("{e}");
        }
    }
}

/// The thread that stands for the process.
fn first(task: &StoppedTask) -> Result<&StoppedThread> {
    task.threads().first().ok_or_else(|| Error::new(Kind::TaskDied(task.pid().0)))
}

/// Whether a limit of the process may be the reason.
fn is_limit(e: &Error) -> bool {
    matches!(e.errno(), Some(libc::ENOMEM | libc::EAGAIN))
}

/// A signal that the process neither handles nor minds, and whose sending has no side effect: delivered
/// by accident, when we die at the wrong moment, it does nothing.
fn end_signal(status: &Status) -> u64 {
    let by_default = [libc::SIGURG, libc::SIGWINCH, libc::SIGCHLD];
    // Ignored by the process itself; not those that stop or continue it, nor those of faults.
    let spared = FAULTS | bit(libc::SIGCONT) | bit(libc::SIGTSTP) | bit(libc::SIGTTIN) | bit(libc::SIGTTOU);
    let by_choice = (1..32).filter(|s| status.sig_ignored & !spared & bit(*s) != 0);
    let fits = |s: &i32| status.sig_caught & bit(*s) == 0;
    by_default.into_iter().chain(by_choice).find(fits).map_or(0, |s| s as u64)
}
