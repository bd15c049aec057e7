//! One system call in somebody else's thread, without any code of ours there.

use super::{
    gadget,
    thread::StoppedThread,
    visit::{self, End},
};
use crate::{
    arch::{FRAME_ALIGN, Layout, RED_ZONE, SigFrame},
    error::{Error, Kind, Result},
    procfs::ProcDir,
    sys::vm,
};

pub use gadget::Hints;

/// Instructions of a process with which its threads can be made to call the kernel.
#[derive(Clone, Debug)]
pub struct Gadget {
    code: gadget::Code,
    pub(super) layout: &'static Layout,
}

/// A signal frame below a thread's stack, and what was there.
struct Frame {
    at: u64,
    before: Vec<u8>,
}

impl Gadget {
    /// Address of a `syscall` instruction of the process.
    pub(super) fn syscall_instruction(&self) -> u64 {
        self.code.syscall
    }

    /// Looks for them in the process of `thread`, whose folder is `dir`; `start_stack` is what `stat` says, if that is
    /// known.
    pub fn find(
        thread: &StoppedThread,
        dir: &ProcDir,
        start_stack: Option<u64>,
        hints: &mut Hints,
    ) -> Result<Gadget> {
        let code = gadget::find(dir, thread.tid(), start_stack, hints)?;
        Ok(Gadget { code, layout: Layout::host() })
    }

    /// Has `thread` make system call `nr`, called `name` in messages. The thread is put back afterwards.
    ///
    /// If we are killed in the middle, some tens of microseconds, a thread on its process's first stack
    /// goes on by itself; any other runs on with the call's registers, and its process is lost.
    /// [`super::Infected::syscall`] does not have that weakness.
    ///
    /// # Errors
    /// The call's own error number; [`Kind::TaskDied`].
    pub fn call(&self, thread: &StoppedThread, name: &'static str, nr: u64, args: [u64; 6]) -> Result<u64> {
        let mut regs = thread.regs().for_syscall(self.code.syscall, nr, args);
        let frame = self.spread_net(thread)?;
        if let (Some(frame), Some(net)) = (&frame, &self.code.net) {
            regs.rip = net.syscall_ret;
            regs.rsp = frame.at;
        }
        let end = visit::run(thread, &regs, End::Syscall { net: frame.is_some() });
        if let Some(frame) = frame
            && !matches!(&end, Err(e) if matches!(e.kind(), Kind::TaskDied(_)))
        {
            vm::write(thread.tid(), frame.at, &frame.before)?;
        }
        let end = end.map_err(|e| if matches!(e.kind(), Kind::TaskDied(_)) { e } else { e.during(name) })?;
        value(end.rax).map_err(|errno| Error::sys(format!("{name} in thread {}", thread.tid()), errno))
    }

    /// Puts a signal frame below the thread's stack, if it is certain that nothing else is there.
    fn spread_net(&self, thread: &StoppedThread) -> Result<Option<Frame>> {
        let Some(net) = &self.code.net else { return Ok(None) };
        let mut regs = *thread.regs();
        if !net.stack.contains(&regs.rsp) {
            return Ok(None);
        }
        let len = SigFrame::max_len(thread.xsave());
        let at = (regs.rsp - RED_ZONE - len as u64) & !(FRAME_ALIGN - 1);
        let mut before = vec![0; len];
        // The stack may not reach that far yet, and is not to grow because of us.
        if vm::read(thread.tid(), at, &mut before).is_err() {
            return Ok(None);
        }
        regs.settle();
        let mut frame = SigFrame::build(at, &regs, thread.xsave(), self.layout, thread.sigmask(), None)?;
        frame.set_return(net.sigreturn);
        before.truncate(frame.bytes.len());
        vm::write(thread.tid(), at, &frame.bytes)?;
        Ok(Some(Frame { at, before }))
    }
}

/// Splits what the kernel gave into value and error number.
pub(super) fn value(rax: u64) -> Result<u64, i32> {
    if rax > u64::MAX - 4095 { Err(-(rax as i64) as i32) } else { Ok(rax) }
}
