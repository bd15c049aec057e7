//! What a stop did to a thread's system call is undone at once, so that it holds whenever the thread goes on,
//! with us or without; and what an image has to know of the call is found out.

use std::time::{Duration, Instant};

use super::{
    seccomp,
    thread::{StopKind, next_stop, park, stuck},
};
use crate::{
    arch::{Origin, Regs, SYSCALL_INSN},
    error::{Error, Kind, Result},
    procfs::{ProcDir, stat::Stat},
    pstree::RealPid,
    sys::{
        ptrace::{self, NT_PRSTATUS},
        vm,
        wait::{self, Status},
    },
};

/// Longest time a thread may take into its call again, and out of it.
const LIMIT: Duration = Duration::from_secs(5);

/// Puts the registers of a thread that has just stopped right, in the thread too.
pub(super) fn mend(tid: RealPid, kind: StopKind, regs: &mut Regs) -> Result<()> {
    let before = *regs;
    if kind == StopKind::Running {
        // A process that job control had stopped has had its EINTR from that.
        regs.make_again(|fd| is_socket(tid, fd));
    }
    if regs.is_resumed() {
        find_origin(tid, kind, regs)?;
    }
    if seccomp::forbids_restart(tid, regs)? {
        regs.begin_anew();
    }
    if *regs == before { Ok(()) } else { ptrace::set_regset(tid, NT_PRSTATUS, &regs.to_bytes()) }
}

/// Lets go of an attached thread that ran, wherever it stops first once it is asked to: what it was doing goes on.
pub fn let_go(tid: RealPid, stop: Status) -> Result<()> {
    match stop {
        Status::EventStop(libc::SIGTRAP) => {
            let mut bytes = [0; 512];
            let n = ptrace::get_regset(tid, NT_PRSTATUS, &mut bytes)?;
            mend(tid, StopKind::Running, &mut Regs::from_bytes(&bytes[..n])?)?;
            ptrace::detach(tid, 0)
        }
        Status::Signal(signal) => ptrace::detach(tid, signal),
        _ => ptrace::detach(tid, 0),
    }
}

fn is_socket(tid: RealPid, fd: i32) -> bool {
    std::fs::read_link(format!("/proc/{tid}/fd/{fd}"))
        .is_ok_and(|target| target.as_os_str().as_encoded_bytes().starts_with(b"socket:"))
}

/// Puts the number of the call a thread was in before it first was interrupted in place of
/// restart_syscall(2)'s. The kernel does not mind: it goes by its restart block.
fn find_origin(tid: RealPid, kind: StopKind, regs: &mut Regs) -> Result<()> {
    // The instruction, and the one before that loads the number.
    const LOADED: usize = 5 + SYSCALL_INSN.len();
    let mut code = [0; LOADED];
    let read = vm::read(tid, regs.rip.wrapping_sub(LOADED as u64), &mut code);
    let nr = match regs.origin(if read.is_ok() { &code } else { &[] }) {
        Some(Origin::Call(nr)) => Some(nr),
        // A task stopped by job control does not run for us.
        Some(Origin::Unclear) if kind == StopKind::Running => {
            let place = place(tid, regs)?;
            if !regs.is_resumed() {
                return Ok(());
            }
            regs.origin_by_place(&place)
        }
        _ => None,
    };
    match nr {
        Some(nr) => regs.orig_rax = nr.cast_unsigned(),
        None => log::debug!("Thread {tid} was interrupted before, in a call that is not known"),
    }
    Ok(())
}

/// Lets a thread into its call again, sees where in the kernel it waits, and stops it again, without an
/// instruction of its own run. The call may come to its end meanwhile: `regs` are those afterwards.
fn place(tid: RealPid, regs: &mut Regs) -> Result<String> {
    let deadline = Instant::now() + LIMIT;
    let mask = ptrace::get_sigmask(tid)?;
    let mut place = String::new();
    let mut signal = 0;
    ptrace::syscall(tid, 0)?;
    match next_stop(tid, deadline)?.ok_or_else(|| stuck(tid, "did not go on"))? {
        s if s.is_end() => return Err(Error::new(Kind::TaskDied(tid.0))),
        Status::Signal(s) => signal = s,
        Status::Syscall => {
            ptrace::syscall(tid, 0)?;
            let dir = ProcDir::open(tid)?.thread(tid)?;
            let mut over = None;
            while over.is_none() && Instant::now() < deadline {
                if Stat::read(&dir)?.state == b'S' {
                    place = String::from_utf8_lossy(&dir.read("wchan")?).into_owned();
                    break;
                }
                over = wait::poll(tid)?;
                std::thread::yield_now();
            }
            if over.is_none() {
                ptrace::interrupt(tid)?;
                over = next_stop(tid, deadline)?;
            }
            match over.ok_or_else(|| stuck(tid, "did not stop again"))? {
                s if s.is_end() => return Err(Error::new(Kind::TaskDied(tid.0))),
                Status::Signal(s) => signal = s,
                _ => {}
            }
        }
        _ => {}
    }
    park(tid, mask, signal, deadline)?;
    let mut bytes = [0; 512];
    let n = ptrace::get_regset(tid, NT_PRSTATUS, &mut bytes)?;
    *regs = Regs::from_bytes(&bytes[..n])?;
    Ok(place)
}
