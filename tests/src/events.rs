//! Waiting for things to happen: a process to die, a file to be written. Nothing here sleeps.
//!
//! # Safety
//!
//! pidfd_open(2), pidfd_send_signal(2) and waitid(2) on a pidfd are called raw: nix has no wrapper for the
//! first two. Every argument is a value or a pointer to a local that outlives the call.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::unistd::Pid;

/// How long anything that should happen at once may take on a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A process, held by descriptor: the number cannot be reused under us.
#[derive(Debug)]
pub struct PidFd {
    pid: Pid,
    fd: OwnedFd,
}

impl PidFd {
    /// Opens a pidfd; zombies can be opened too. Errors: ESRCH when there is no such process.
    pub fn open(pid: Pid) -> Result<PidFd, Errno> {
        // SAFETY: two integers; a non-negative result is a new descriptor owned by nobody else.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
        let fd = Errno::result(fd)?;
        // SAFETY: as above.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        Ok(PidFd { pid, fd })
    }

    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Sends a signal; a process that is gone already is no error.
    pub fn kill(&self, signal: nix::sys::signal::Signal) {
        // SAFETY: a valid descriptor, integers, and a null siginfo which the call accepts.
        unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.fd.as_raw_fd(),
                signal as i32,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
    }

    /// Waits until the process is dead (a zombie counts).
    pub fn wait_dead(&self, patience: Duration) -> Result<()> {
        if readable(&[self.fd.as_fd()], patience)?.is_empty() {
            bail!("pid {} is still alive after {patience:?}", self.pid);
        }
        Ok(())
    }

    /// Whether the process is dead by now.
    pub fn is_dead(&self) -> bool {
        readable(&[self.fd.as_fd()], Duration::ZERO).is_ok_and(|r| !r.is_empty())
    }

    /// Reaps a dead child: (exited normally, status or signal). None when it is not ours (any more).
    pub fn reap(&self) -> Option<(bool, i32)> {
        // SAFETY: an all-zero siginfo is a valid value; the call fills it.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let id = self.fd.as_raw_fd() as libc::id_t;
        // SAFETY: `info` outlives the call.
        let r = unsafe {
            libc::waitid(libc::P_PIDFD, id, &mut info, libc::WEXITED | libc::WNOHANG | libc::__WALL)
        };
        // SAFETY: waitid filled the child fields, or left zero.
        let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
        (r == 0 && pid != 0).then_some((info.si_code == libc::CLD_EXITED, status))
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Indexes of the descriptors that became readable (or hung up) within `patience`; empty on expiry.
pub fn readable(fds: &[BorrowedFd<'_>], patience: Duration) -> Result<Vec<usize>> {
    let end = Instant::now() + patience;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let mut polled: Vec<PollFd> = fds.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match nix::poll::poll(&mut polled, timeout) {
            Err(Errno::EINTR) => continue,
            Err(e) => return Err(e).context("poll"),
            Ok(_) => {
                return Ok((0..fds.len()).filter(|i| polled[*i].any().unwrap_or(false)).collect());
            }
        }
    }
}

/// Waits until `seen` holds, looking again whenever something below `dir` changes; an early death of
/// `process` ends the wait with Ok(false).
pub fn wait_file(
    dir: &Path,
    process: Option<&PidFd>,
    patience: Duration,
    mut seen: impl FnMut() -> bool,
) -> Result<bool> {
    let watch = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).context("inotify_init")?;
    let what = AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO;
    watch.add_watch(dir, what).with_context(|| format!("inotify_add_watch {}", dir.display()))?;
    let end = Instant::now() + patience;
    loop {
        if seen() {
            return Ok(true);
        }
        let mut fds = vec![watch.as_fd()];
        fds.extend(process.map(|p| p.as_fd()));
        let ready = readable(&fds, end.saturating_duration_since(Instant::now()))?;
        if ready.is_empty() {
            bail!("nothing happened in {} within {patience:?}", dir.display());
        }
        if ready.contains(&1) {
            return Ok(seen());
        }
        while watch.read_events().is_ok_and(|e| !e.is_empty()) {}
    }
}
