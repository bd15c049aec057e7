//! One system call in somebody else's thread, without any code of ours there.

use super::{
    gadget,
    thread::StoppedThread,
    visit::{self, End},
};
use crate::{
    error::{Error, Kind, Result},
    procfs::ProcDir,
};

/// A `syscall` instruction in the memory of a process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gadget(u64);

impl Gadget {
    /// Looks for one in the process of `thread`, in the vdso first.
    pub fn find(thread: &StoppedThread) -> Result<Gadget> {
        let dir = ProcDir::open(thread.tid())?;
        gadget::find(&dir, thread.tid()).map(Gadget)
    }

    /// Has `thread` make system call `nr`, called `name` in messages. The thread is put back afterwards.
    ///
    /// If we are killed in the middle, some tens of microseconds, the thread runs on with the call's
    /// registers and its process is lost; [`super::Infected::syscall`] does not have that weakness.
    ///
    /// # Errors
    /// The call's own error number; [`Kind::TaskDied`].
    pub fn call(&self, thread: &StoppedThread, name: &'static str, nr: u64, args: [u64; 6]) -> Result<u64> {
        let regs = thread.regs().for_syscall(self.0, nr, args);
        let end = visit::run(thread, &regs, End::Syscall)
            .map_err(|e| if matches!(e.kind(), Kind::TaskDied(_)) { e } else { e.during(name) })?;
        value(end.rax).map_err(|errno| Error::sys(format!("{name} in thread {}", thread.tid()), errno))
    }
}

/// Splits what the kernel gave into value and error number.
pub(super) fn value(rax: u64) -> Result<u64, i32> {
    if rax > u64::MAX - 4095 { Err(-(rax as i64) as i32) } else { Ok(rax) }
}
