//! The process that serves page faults of one task while its memory is under protection.
//!
//! A process of its own: the dump forks helpers and so must have one thread, and nobody of the tree may wait longer
//! than it takes to put 64 KiB aside. It ends with the dump; then the kernel lifts the protection, and threads that
//! wait go on.

use std::os::fd::{AsFd, OwnedFd};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rcriu_images::pagemap::PAGE_SIZE;

use super::chunks::{CHUNK, Chunks, Reader, gone};
use crate::{
    error::{Error, Result},
    pstree::RealPid,
    restore::fork,
    sys::{
        clone3::{Side, fork_alone},
        pidfd,
        userfaultfd::{self, Event},
        wait,
    },
};

/// Faults handled with the lock held.
const BATCH: usize = 16;
/// `UFFD_PAGEFAULT_FLAG_WP`.
const WRITE_PROTECTED: u64 = 1 << 1;

/// The process; dropped, it ends.
#[derive(Debug)]
pub struct Server {
    pid: RealPid,
    pidfd: OwnedFd,
}

impl Server {
    /// Forks it.
    ///
    /// Precondition: this process has one thread.
    pub fn start(uffd: &OwnedFd, chunks: &Chunks, reader: &mut Reader) -> Result<Server> {
        let dump = pidfd::open(RealPid(std::process::id().cast_signed()), 0)?;
        match fork_alone()? {
            Side::Child => {
                // Signals for the group of the terminal are not for us.
                let _ = fork::block_all_signals();
                let _ = nix::unistd::setsid();
                let _ = nix::sys::prctl::set_name(c"rcriu-faults");
                if let Err(e) = serve(uffd, chunks, reader, &dump) {
                    log::error!("Serving page faults: {e}");
                }
                fork::leave(0)
            }
            Side::Parent(pid) => Ok(Server { pid, pidfd: pidfd::open(pid, 0)? }),
        }
    }

    /// For [`Chunks::lock`].
    pub fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    /// Fails if it has ended.
    pub fn check(&self) -> Result<()> {
        match gone(&self.pidfd)? {
            false => Ok(()),
            true => Err(Error::host("the process that serves page faults of the tree has ended")
                .remedy("dump again, or without --background")),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.pid.0), Signal::SIGKILL);
        wait::end(self.pid);
    }
}

fn serve(uffd: &OwnedFd, chunks: &Chunks, reader: &mut Reader, dump: &OwnedFd) -> Result<()> {
    loop {
        let mut fds =
            [PollFd::new(uffd.as_fd(), PollFlags::POLLIN), PollFd::new(dump.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(e) => return Err(Error::sys("poll", e as i32)),
        }
        if fds[1].any().unwrap_or(true) {
            return Ok(());
        }
        let locked = chunks.lock(dump)?;
        for _ in 0..BATCH {
            let Some(event) = userfaultfd::read_event(uffd)? else { break };
            let Event::Fault { address, flags } = event else { continue };
            let place = chunks.at(address);
            match place {
                Some(place) if chunks.frozen() => chunks.save(place, reader, &locked)?,
                Some((chunk, ..)) => chunks.written(chunk, &locked),
                // The mapping has grown since: nothing of it is of interest.
                None => {}
            }
            if flags & WRITE_PROTECTED == 0 {
                fill(uffd, address)?;
            } else {
                let (start, end) =
                    place.map_or((address, address + PAGE_SIZE), |(_, start, end)| (start, end));
                lift(uffd, start, end)?;
            }
            // Where nothing is registered any more the fault is tried again all the same.
            tolerate(userfaultfd::wake(uffd, address, PAGE_SIZE))?;
        }
    }
}

/// A page that is missing is one of zeros.
fn fill(uffd: &OwnedFd, address: u64) -> Result<()> {
    loop {
        match userfaultfd::zero(uffd, address, PAGE_SIZE) {
            Err(e) if e.errno() == Some(libc::EAGAIN) => std::thread::yield_now(),
            other => return tolerate(other.map(drop)),
        }
    }
}

/// Lifts the protection of `start` to `end`, of which parts may not be there any more. Whoever waits goes on.
pub fn lift(uffd: &OwnedFd, start: u64, end: u64) -> Result<()> {
    match protect(uffd, start, end, false) {
        Err(e) if e.errno() == Some(libc::ENOENT) => {
            // Not one mapping of ours: in smaller parts.
            let step = if end - start > CHUNK { CHUNK } else { PAGE_SIZE };
            if end - start <= PAGE_SIZE {
                return Ok(());
            }
            let mut at = start;
            while at < end {
                let next = ((at & !(step - 1)) + step).min(end);
                lift(uffd, at, next)?;
                at = next;
            }
            Ok(())
        }
        other => tolerate(other),
    }
}

/// Sets or lifts protection, however often the address space changes meanwhile.
pub fn protect(uffd: &OwnedFd, start: u64, end: u64, on: bool) -> Result<()> {
    loop {
        match userfaultfd::write_protect(uffd, start, end - start, on) {
            Err(e) if e.errno() == Some(libc::EAGAIN) => std::thread::yield_now(),
            other => return other,
        }
    }
}

/// Errors of a range or a process that is gone: whoever waited will see for himself.
fn tolerate(result: Result<()>) -> Result<()> {
    match result {
        Err(e) if matches!(e.errno(), Some(libc::ENOENT | libc::EEXIST | libc::ESRCH | libc::EINVAL)) => {
            Ok(())
        }
        other => other,
    }
}
