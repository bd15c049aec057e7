//! timerfd: clocks, values, intervals, expirations that were not read.

use std::time::Duration;

use anyhow::{Context, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::unistd::read;

use crate::kit::{Check, rest, same};

/// See the module.
pub fn run(_: &[String]) -> Check {
    let make =
        |clock| TimerFd::new(clock, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC).context("timerfd");
    let far = make(ClockId::CLOCK_MONOTONIC)?;
    let interval =
        Expiration::IntervalDelayed(Duration::from_secs(900).into(), Duration::from_secs(60).into());
    far.set(interval, TimerSetTimeFlags::empty()).context("timerfd_settime")?;
    let unset = make(ClockId::CLOCK_REALTIME)?;
    let boot = make(ClockId::CLOCK_BOOTTIME)?;
    boot.set(Expiration::OneShot(Duration::from_secs(800).into()), TimerSetTimeFlags::empty())
        .context("timerfd_settime")?;
    // Has expired, and nobody has read it.
    let expired = make(ClockId::CLOCK_MONOTONIC)?;
    expired
        .set(Expiration::OneShot(Duration::from_nanos(1).into()), TimerSetTimeFlags::empty())
        .context("timerfd_settime")?;
    poll(&mut [PollFd::new(std::os::fd::AsFd::as_fd(&expired), PollFlags::POLLIN)], PollTimeout::NONE)
        .context("poll")?;
    rest()?;
    let mut ticks = [0; 8];
    read(&expired, &mut ticks).context("reading the expired timer")?;
    same("expirations that were not read", u64::from_ne_bytes(ticks), 1)?;
    same("a timer that has not expired", read(&far, &mut ticks), Err(Errno::EAGAIN))?;
    same("a timer that is not set", unset.get().context("timerfd_gettime")?, None)?;
    match far.get().context("timerfd_gettime")? {
        Some(Expiration::IntervalDelayed(left, every)) => {
            same("interval", Duration::from(every), Duration::from_secs(60))?;
            let left = Duration::from(left).as_secs();
            if !(780..=900).contains(&left) {
                bail!("{left} s are left of 900");
            }
        }
        other => bail!("the timer is {other:?}"),
    }
    match boot.get().context("timerfd_gettime")? {
        Some(Expiration::OneShot(left)) if (680..=800).contains(&Duration::from(left).as_secs()) => {}
        other => bail!("the timer of CLOCK_BOOTTIME is {other:?}"),
    }
    far.set(Expiration::OneShot(Duration::from_nanos(1).into()), TimerSetTimeFlags::empty())
        .context("set")?;
    poll(&mut [PollFd::new(std::os::fd::AsFd::as_fd(&far), PollFlags::POLLIN)], 30_000u16).context("poll")?;
    read(&far, &mut ticks).context("reading a timer that was set anew").map(drop)
}
