//! What went wrong inside injected code, in words.

use blobrt::abi::PANIC_MARK;

use super::thread::StoppedThread;
use crate::{
    error::{Error, Result},
    sys::{ptrace, vm},
};

/// Longest file name that is believed.
const MAX_NAME: u64 = 256;

/// The error for `thread`, stopped by `signal` at foreign code.
pub(super) fn report(thread: &StoppedThread, signal: i32) -> Result<Error> {
    let regs = thread.current_regs()?;
    if signal == libc::SIGILL && regs.rax == PANIC_MARK && regs.rsi <= MAX_NAME {
        let mut file = vec![0; regs.rsi as usize];
        vm::read(thread.tid, regs.rdi, &mut file)?;
        let file = String::from_utf8_lossy(&file).into_owned();
        return Ok(Error::bug(format!(
            "the code in thread {} panicked at {file}:{}:{}",
            thread.tid, regs.rdx, regs.r8
        )));
    }
    let info = ptrace::get_siginfo(thread.tid)?;
    Ok(Error::bug(format!(
        "the code in thread {} got signal {signal} (code {}, address {:#x}) at {:#x}",
        thread.tid,
        info.code(),
        info.addr(),
        regs.rip
    )))
}
