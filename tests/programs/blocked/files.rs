//! Calls on files that wait for what somebody else does: opens the other end, writes, releases a lock.
//!
//! # Safety
//!
//! As in the module above: structures outlive the calls they are given to.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use anyhow::Context;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::Mode;
use nix::unistd::{mkfifo, pipe};

use super::{caller, raw, read_one, returned, still_in, tell_thread, until_handled};
use crate::kit::crew::member;
use crate::kit::{Check, rest, skip, sys, write};

const FAR: libc::timespec = libc::timespec { tv_sec: 3000, tv_nsec: 0 };
/// A signal whose handler does nothing, and one that is only read.
const HANDLED: Signal = Signal::SIGUSR1;
const READ: Signal = Signal::SIGUSR2;

extern "C" fn nothing(_: i32) {}

/// Both ends of a pseudo-terminal without line editing.
fn terminal() -> anyhow::Result<(File, File)> {
    let master =
        File::options().read(true).write(true).open("/dev/ptmx").map_err(|e| skip(format!("{e}")))?;
    let unlock = 0;
    // SAFETY: one int.
    sys("TIOCSPTLCK", unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock) })?;
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: the ioctl opens a new descriptor, which nobody else has.
    let slave = unsafe {
        let fd = sys("TIOCGPTPEER", libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags))?;
        File::from_raw_fd(fd)
    };
    let mut modes = nix::sys::termios::tcgetattr(&slave).context("tcgetattr")?;
    nix::sys::termios::cfmakeraw(&mut modes);
    nix::sys::termios::tcsetattr(&slave, nix::sys::termios::SetArg::TCSANOW, &modes).context("tcsetattr")?;
    Ok((master, slave))
}

/// open of a FIFO, read of a terminal, a signalfd, an inotify queue; waits with a signal mask of their own.
pub fn run(_: &[String]) -> Check {
    use std::io::Write as _;
    for name in ["to-read", "to-write"] {
        mkfifo(name, Mode::from_bits_truncate(0o600)).context("mkfifo")?;
    }
    let (mut master, slave) = terminal()?;
    let (from, to) = pipe().context("pipe")?;
    let fd: RawFd = from.as_raw_fd();
    let watch = Inotify::init(InitFlags::IN_CLOEXEC).context("inotify_init")?;
    std::fs::create_dir("watched").context("mkdir")?;
    watch.add_watch("watched", AddWatchFlags::IN_CREATE).context("inotify_add_watch")?;
    let handler = nix::sys::signal::SigAction::new(
        nix::sys::signal::SigHandler::Handler(nothing),
        nix::sys::signal::SaFlags::empty(),
        SigSet::empty(),
    );
    // SAFETY: the handler does nothing.
    unsafe { nix::sys::signal::sigaction(HANDLED, &handler) }.context("sigaction")?;
    let mut blocked = SigSet::from(HANDLED);
    blocked.add(READ);
    // In this thread and those it starts.
    pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&blocked), None).context("sigmask")?;
    let signals = SignalFd::with_flags(&SigSet::from(READ), SfdFlags::SFD_CLOEXEC).context("signalfd")?;
    let epoll = nix::sys::epoll::Epoll::new(nix::sys::epoll::EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(&from, nix::sys::epoll::EpollEvent::new(nix::sys::epoll::EpollFlags::EPOLLIN, 1))?;
    let epoll_fd = epoll.0.as_raw_fd();
    let callers = vec![
        caller("open of a FIFO to read", || {
            nix::fcntl::open("to-read", OFlag::O_RDONLY, Mode::empty()).map(drop)
        })?,
        caller("open of a FIFO to write", || {
            nix::fcntl::open("to-write", OFlag::O_WRONLY, Mode::empty()).map(drop)
        })?,
        caller("read of a terminal", move || read_one(&OwnedFd::from(slave)))?,
        caller("read of an inotify queue", move || watch.read_events().map(drop))?,
        caller("read of a signalfd", move || signals.read_signal().map(drop))?,
    ];
    // A handler ends them: before that, nothing.
    let masked = vec![
        caller("pselect with a mask", move || {
            // SAFETY: sets, timeout and mask outlive the call.
            until_handled(unsafe {
                let mut set: libc::fd_set = std::mem::zeroed();
                libc::FD_SET(fd, &mut set);
                let (none, mask) = (std::ptr::null_mut(), SigSet::from(READ));
                raw(libc::pselect(fd + 1, &mut set, none, none, &FAR, mask.as_ref()).into())
            })
        })?,
        caller("epoll_pwait with a mask", move || {
            let mut event = libc::epoll_event { events: 0, u64: 0 };
            let mask = SigSet::from(READ);
            // SAFETY: room for one event; the mask outlives the call.
            until_handled(
                raw(unsafe { libc::epoll_pwait(epoll_fd, &mut event, 1, -1, mask.as_ref()) }.into()),
            )
        })?,
        caller("epoll_pwait2 with a mask", move || {
            let mut event = libc::epoll_event { events: 0, u64: 0 };
            let mask = 1u64 << (READ as i32 - 1);
            // SAFETY: room for one event; timeout and mask outlive the call.
            until_handled(raw(unsafe {
                libc::syscall(libc::SYS_epoll_pwait2, epoll_fd, &mut event, 1, &FAR, &mask, 8)
            }))
        })?,
        caller("ppoll of a pipe with a mask", move || {
            let mut fd = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
            let mask = SigSet::from(READ);
            // SAFETY: structures outlive the call.
            until_handled(raw(unsafe { libc::ppoll(&mut fd, 1, &FAR, mask.as_ref()) }.into()))
        })?,
    ];
    rest()?;
    still_in(&callers)?;
    still_in(&masked)?;
    let _writer = File::options().write(true).open("to-read").context("open")?;
    let _reader = File::options().read(true).open("to-write").context("open")?;
    master.write_all(b"x").context("write")?;
    write("watched/new", b"")?;
    // SAFETY: a signal to this process.
    sys("kill", unsafe { libc::kill(libc::getpid(), READ as i32) })?;
    for caller in &masked {
        tell_thread(caller, HANDLED as i32)?;
    }
    returned(callers)?;
    returned(masked)?;
    drop((from, to));
    Ok(())
}

/// F_SETLKW for a lock that another process holds.
pub fn lock_of_another(_: &[String]) -> Check {
    write("posix", b"")?;
    let lock = || libc::flock { l_type: libc::F_WRLCK as i16, l_whence: 0, l_start: 0, l_len: 0, l_pid: 0 };
    let open = || File::options().read(true).write(true).open("posix").context("open");
    let holder = member(move || {
        let file = open()?;
        fcntl(&file, FcntlArg::F_SETLK(&lock())).context("F_SETLK")?;
        rest()
    })?;
    let file = open()?;
    let callers = vec![caller("F_SETLKW", move || fcntl(&file, FcntlArg::F_SETLKW(&lock())).map(drop))?];
    rest()?;
    still_in(&callers)?;
    // It ends, and with it its lock.
    holder.verify()?;
    returned(callers)
}
