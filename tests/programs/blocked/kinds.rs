//! Calls of many kinds, each ended by its event.
//!
//! # Safety
//!
//! As in the module above: structures outlive the calls they are given to.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::Context;
use nix::sys::eventfd::EventFd;
use nix::sys::signal::{
    SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, pthread_sigmask, sigaction,
};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, send, setsockopt, socketpair, sockopt};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::{pipe, write};

use super::{caller, raw, returned, still_in, tell_thread, until_handled};
use crate::kit::crew::member;
use crate::kit::{Check, mem, rest};

const FAR: libc::timespec = libc::timespec { tv_sec: 3000, tv_nsec: 0 };
/// FUTEX_32 of futex_waitv(2).
const WORD: u32 = 2;

#[repr(C)]
struct Waiter {
    value: u64,
    address: u64,
    flags: u32,
    reserved: u32,
}

extern "C" fn nothing(_: i32) {}

/// A set of only this signal, as the kernel takes it.
fn only(signal: i32) -> u64 {
    1 << (signal - 1)
}

fn pollfd(fd: i32) -> libc::pollfd {
    libc::pollfd { fd, events: libc::POLLIN, revents: 0 }
}

fn epoll(fd: i32) -> anyhow::Result<OwnedFd> {
    let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 1 };
    // SAFETY: a new descriptor that nobody else has; the event outlives the call.
    unsafe {
        let epoll = libc::epoll_create1(libc::EPOLL_CLOEXEC);
        raw(libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, fd, &mut event).into()).context("epoll_ctl")?;
        Ok(OwnedFd::from_raw_fd(epoll))
    }
}

pub fn run(_: &[String]) -> Check {
    // A member must be forked before there are threads.
    let child = member(rest)?;
    let pid = child.pid;
    let handler = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing.
    unsafe { sigaction(Signal::SIGUSR1, &handler) }.context("sigaction")?;
    let (from, to) = pipe().context("pipe")?;
    let fd = from.as_raw_fd();
    let event = EventFd::new().context("eventfd")?;
    let event_fd = event.as_raw_fd();
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::empty()).context("timerfd")?;
    let timer_fd = timer.as_fd_number();
    let (receiver, sender) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)
        .context("socketpair")?;
    setsockopt(&receiver, sockopt::ReceiveTimeout, &nix::sys::time::TimeVal::new(3000, 0))
        .context("SO_RCVTIMEO")?;
    let receiver_fd = receiver.as_raw_fd();
    let (waits, waits2) = (epoll(fd)?, epoll(fd)?);
    let word = mem::shared(mem::PAGE)?;
    let at = word.at;
    let bitset = libc::FUTEX_WAIT_BITSET;
    let all = libc::FUTEX_BITSET_MATCH_ANY;
    let callers = vec![
        caller("ppoll", move || {
            let mut fd = pollfd(fd);
            // SAFETY: structures outlive the call.
            raw(unsafe { libc::ppoll(&mut fd, 1, &FAR, std::ptr::null()) }.into())
        })?,
        caller("pselect", move || {
            let none = std::ptr::null_mut();
            // SAFETY: structures outlive the call; the descriptor is below FD_SETSIZE.
            unsafe {
                let mut set: libc::fd_set = std::mem::zeroed();
                libc::FD_SET(fd, &mut set);
                raw(libc::pselect(fd + 1, &mut set, none, none, &FAR, std::ptr::null()).into())
            }
        })?,
        caller("epoll_pwait", move || {
            let mut event = libc::epoll_event { events: 0, u64: 0 };
            // SAFETY: room for one event.
            raw(unsafe { libc::epoll_pwait(waits.as_raw_fd(), &mut event, 1, 3_000_000, std::ptr::null()) }
                .into())
        })?,
        caller("epoll_pwait2", move || {
            let mut event = libc::epoll_event { events: 0, u64: 0 };
            let fd = waits2.as_raw_fd();
            // SAFETY: room for one event; the timeout is a constant.
            raw(unsafe { libc::syscall(libc::SYS_epoll_pwait2, fd, &mut event, 1, &FAR, 0, 8) })
        })?,
        caller("read of an eventfd", move || nix::unistd::read(&event, &mut [0; 8]).map(drop))?,
        caller("read of a timerfd", move || timer.wait())?,
        caller("recv with SO_RCVTIMEO", move || {
            nix::sys::socket::recv(receiver_fd, &mut [0; 1], nix::sys::socket::MsgFlags::empty()).map(drop)
        })?,
        caller("futex, bits, to a point in time", move || {
            let far = libc::timespec { tv_sec: i64::MAX / 4, tv_nsec: 0 };
            // SAFETY: the word stays mapped; the point in time outlives the call.
            raw(unsafe { libc::syscall(libc::SYS_futex, at, bitset, 0, &far, 0, all) })
        })?,
        caller("futex_waitv", move || {
            let wait = Waiter { value: 0, address: at as u64, flags: WORD, reserved: 0 };
            // SAFETY: one waiter that outlives the call; the word stays mapped.
            raw(unsafe { libc::syscall(libc::SYS_futex_waitv, &wait, 1, 0, 0, libc::CLOCK_MONOTONIC) })
        })?,
        caller("waitid", move || waitid(Id::Pid(pid), WaitPidFlag::WEXITED).map(drop))?,
    ];
    let mut signalled = vec![
        // SAFETY: no memory is involved.
        caller("pause", || until_handled(raw(unsafe { libc::pause() }.into())))?,
    ];
    // In this thread and those it starts, so that only calls with a mask of their own take it.
    pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&SigSet::from(Signal::SIGUSR1)), None).context("sigmask")?;
    signalled.extend([
        caller("sigsuspend", || {
            until_handled(raw({
                let none = 0u64;
                // SAFETY: the mask outlives the call.
                unsafe { libc::syscall(libc::SYS_rt_sigsuspend, &none, 8) }
            }))
        })?,
        caller("ppoll with a mask", || {
            let none = 0u64;
            // SAFETY: timeout and mask outlive the call.
            until_handled(raw(unsafe { libc::syscall(libc::SYS_ppoll, 0, 0, &mut { FAR }, &none, 8) }))
        })?,
        caller("sigtimedwait", || {
            let set = only(libc::SIGUSR1);
            // SAFETY: set and timeout outlive the call.
            raw(unsafe { libc::syscall(libc::SYS_rt_sigtimedwait, &set, 0, &FAR, 8) })
        })?,
    ]);
    rest()?;
    still_in(&callers)?;
    still_in(&signalled)?;
    write(&to, b"x").context("write")?;
    // SAFETY: eight bytes to a descriptor that its reader keeps open.
    raw(unsafe { libc::write(event_fd, std::ptr::from_ref(&ONE).cast(), 8) } as i64).context("write")?;
    expire(timer_fd)?;
    send(sender.as_raw_fd(), b"x", nix::sys::socket::MsgFlags::empty()).context("send")?;
    word.atomic(0).store(1, std::sync::atomic::Ordering::SeqCst);
    super::futex(at, libc::FUTEX_WAKE, i32::MAX as u32, None).context("FUTEX_WAKE")?;
    for caller in &signalled {
        tell_thread(caller, libc::SIGUSR1)?;
    }
    child.ask()?;
    returned(callers)?;
    returned(signalled)
}

const ONE: u64 = 1;

trait FdNumber {
    fn as_fd_number(&self) -> i32;
}

impl FdNumber for TimerFd {
    fn as_fd_number(&self) -> i32 {
        use std::os::fd::AsFd;
        self.as_fd().as_raw_fd()
    }
}

/// Sets the timer, which its reader keeps open, to one nanosecond.
fn expire(fd: i32) -> Check {
    // SAFETY: the descriptor is open, and is not closed by this second owner.
    let timer = std::mem::ManuallyDrop::new(unsafe { TimerFd::from_owned_fd(OwnedFd::from_raw_fd(fd)) });
    let soon = Expiration::OneShot(nix::sys::time::TimeSpec::new(0, 1));
    timer.set(soon, TimerSetTimeFlags::empty()).context("timerfd_settime")
}
