//! Calls that end by themselves: not before their time, and not much later.
//!
//! # Safety
//!
//! As in the module above: structures outlive the calls they are given to.

use std::time::{Duration, SystemTime};

use anyhow::{Context, ensure};
use nix::errno::Errno;

use super::{Caller, caller, futex, raw};
use crate::kit::{Check, mem, rest, same};

const SECONDS: i64 = 2;
const TIME: libc::timespec = libc::timespec { tv_sec: SECONDS, tv_nsec: 0 };

/// What a call returned, and how long it took from the start.
type Timed = std::sync::mpsc::Receiver<Duration>;

fn timed(
    name: &'static str,
    call: impl FnOnce() -> Result<(), Errno> + Send + 'static,
) -> anyhow::Result<(Caller, Timed)> {
    let (tell, took) = std::sync::mpsc::channel();
    let caller = caller(name, move || {
        // The clock that goes on while there is no process: the others go on from the dump.
        let start = SystemTime::now();
        let result = call();
        let _ = tell.send(start.elapsed().unwrap_or_default());
        result
    })?;
    Ok((caller, took))
}

/// The same point of the clock `SECONDS` from now.
fn deadline(clock: libc::clockid_t) -> Result<libc::timespec, Errno> {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a local structure.
    raw(unsafe { libc::clock_gettime(clock, &mut now) }.into())?;
    now.tv_sec += SECONDS;
    Ok(now)
}

fn socket() -> anyhow::Result<std::os::fd::OwnedFd> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
    let (a, b) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)
        .context("socketpair")?;
    let timeout = nix::sys::time::TimeVal::new(SECONDS, 0);
    setsockopt(&a, sockopt::ReceiveTimeout, &timeout).context("SO_RCVTIMEO")?;
    // The other end stays open for good.
    std::mem::forget(b);
    Ok(a)
}

/// Each call ends with what its timeout ends it with.
pub fn run(_: &[String]) -> Check {
    use std::os::fd::AsRawFd;
    let word = mem::shared(mem::PAGE)?;
    let at = word.at;
    let (receiver, reader) = (socket()?, socket()?);
    let none = std::ptr::null_mut::<libc::fd_set>;
    let callers: Vec<(_, Result<(), Errno>)> = vec![
        (
            timed("nanosleep", || {
                // SAFETY: the request is a constant.
                raw(unsafe { libc::syscall(libc::SYS_nanosleep, &TIME, 0) })
            })?,
            Ok(()),
        ),
        (
            timed("clock_nanosleep that asks for the rest", || {
                let mut rest = TIME;
                // SAFETY: both outlive the call.
                raw(unsafe {
                    libc::syscall(libc::SYS_clock_nanosleep, libc::CLOCK_MONOTONIC, 0, &TIME, &mut rest)
                })
            })?,
            Ok(()),
        ),
        (
            timed("clock_nanosleep to a point in time", move || {
                let flags = libc::TIMER_ABSTIME;
                let monotonic = deadline(libc::CLOCK_MONOTONIC)?;
                // SAFETY: the request outlives the call.
                raw(unsafe {
                    libc::syscall(libc::SYS_clock_nanosleep, libc::CLOCK_MONOTONIC, flags, &monotonic, 0)
                })
            })?,
            Ok(()),
        ),
        (
            timed("poll", || {
                // SAFETY: no structure at all.
                raw(unsafe { libc::poll(std::ptr::null_mut(), 0, SECONDS as i32 * 1000) }.into())
            })?,
            Ok(()),
        ),
        (
            timed("ppoll", || {
                // SAFETY: a constant that libc copies.
                raw(unsafe { libc::ppoll(std::ptr::null_mut(), 0, &TIME, std::ptr::null()) }.into())
            })?,
            Ok(()),
        ),
        (
            timed("select", move || {
                let mut time = libc::timeval { tv_sec: SECONDS, tv_usec: 0 };
                // SAFETY: the timeout outlives the call.
                raw(unsafe { libc::select(0, none(), none(), none(), &mut time) }.into())
            })?,
            Ok(()),
        ),
        (
            timed("pselect", move || {
                // SAFETY: a constant that libc copies.
                raw(unsafe { libc::pselect(0, none(), none(), none(), &TIME, std::ptr::null()) }.into())
            })?,
            Ok(()),
        ),
        (timed("futex", move || futex(at, libc::FUTEX_WAIT, 0, Some(&TIME)))?, Err(Errno::ETIMEDOUT)),
        (
            timed("futex to a point in time", move || {
                let op = libc::FUTEX_WAIT_BITSET | libc::FUTEX_CLOCK_REALTIME;
                let real = deadline(libc::CLOCK_REALTIME)?;
                let all = libc::FUTEX_BITSET_MATCH_ANY;
                // SAFETY: the word stays mapped; the point in time outlives the call.
                raw(unsafe { libc::syscall(libc::SYS_futex, at + 4, op, 0, &real, 0, all) })
            })?,
            Err(Errno::ETIMEDOUT),
        ),
        (
            timed("epoll_wait", || {
                let epoll = nix::sys::epoll::Epoll::new(nix::sys::epoll::EpollCreateFlags::empty())?;
                let timeout = nix::sys::epoll::EpollTimeout::from(SECONDS as u16 * 1000);
                epoll.wait(&mut [nix::sys::epoll::EpollEvent::empty()], timeout).map(drop)
            })?,
            Ok(()),
        ),
        (
            timed("sigtimedwait", || {
                let set = 1u64 << (libc::SIGUSR2 - 1);
                // SAFETY: set and timeout outlive the call.
                raw(unsafe { libc::syscall(libc::SYS_rt_sigtimedwait, &set, 0, &TIME, 8) })
            })?,
            Err(Errno::EAGAIN),
        ),
        (
            timed("recv with a timeout", move || {
                nix::sys::socket::recv(receiver.as_raw_fd(), &mut [0], nix::sys::socket::MsgFlags::empty())
                    .map(drop)
            })?,
            Err(Errno::EAGAIN),
        ),
        (
            timed("read of a socket with a timeout", move || nix::unistd::read(&reader, &mut [0]).map(drop))?,
            Err(Errno::EAGAIN),
        ),
    ];
    rest()?;
    let whole = Duration::from_secs(SECONDS.unsigned_abs());
    for ((caller, took), expected) in callers {
        let result = caller.result.recv_timeout(Duration::from_secs(30));
        same(caller.name, result.with_context(|| format!("{} never returned", caller.name))?, expected)?;
        let took = took.recv().context("a caller died")?;
        // A clock of scheduling ticks may be a little early.
        ensure!(took + Duration::from_millis(20) >= whole, "{} took only {took:?}", caller.name);
        ensure!(took < whole + Duration::from_secs(20), "{} took {took:?}", caller.name);
    }
    Ok(())
}
