//! Objects that are descriptors and nothing else: signalfd, timerfd, and what of them nix does not know.
//!
//! # Safety
//! Pointers passed are to locals of the size the call names; a descriptor the kernel returns is new and ours.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::{error::Result, sys::errno};

fn owned(ret: libc::c_long, call: &'static str) -> Result<OwnedFd> {
    let fd = errno::check(ret, call)?;
    // SAFETY: a new descriptor of ours.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// A signalfd for `mask`, bit n - 1 standing for signal n. Close-on-exec.
pub(crate) fn signalfd(mask: u64) -> Result<OwnedFd> {
    // SAFETY: the mask is a local of eight bytes, as the size says.
    let ret = unsafe {
        libc::syscall(libc::SYS_signalfd4, -1, &raw const mask, size_of::<u64>(), libc::SFD_CLOEXEC)
    };
    owned(ret, "signalfd4")
}

/// A timer of `clock` as a descriptor. Close-on-exec.
///
/// # Errors
/// EINVAL for an unknown clock, EPERM for alarm clocks without CAP_WAKE_ALARM.
pub(crate) fn timerfd(clock: i32) -> Result<OwnedFd> {
    // SAFETY: numbers only.
    let ret = unsafe { libc::timerfd_create(clock, libc::TFD_CLOEXEC) };
    owned(ret.into(), "timerfd_create")
}

/// Seconds and nanoseconds.
pub(crate) type Time = (i64, i64);

/// Sets the timer: `flags` are `TFD_TIMER_*`, `value` the first expiration (zero disarms), then every `interval`.
pub(crate) fn set_timer(timer: BorrowedFd<'_>, flags: i32, value: Time, interval: Time) -> Result<()> {
    let spec = |(tv_sec, tv_nsec)| libc::timespec { tv_sec, tv_nsec };
    let new = libc::itimerspec { it_interval: spec(interval), it_value: spec(value) };
    // SAFETY: the new value is a local, the old one is not asked for.
    let ret =
        unsafe { libc::timerfd_settime(timer.as_raw_fd(), flags, &raw const new, std::ptr::null_mut()) };
    errno::check(ret.into(), "timerfd_settime").map(drop)
}

/// Sets how many expirations a read will report (Linux 3.17, CONFIG_CHECKPOINT_RESTORE).
pub(crate) fn set_ticks(timer: BorrowedFd<'_>, ticks: u64) -> Result<()> {
    const TFD_IOC_SET_TICKS: libc::Ioctl = 0x4008_5400;
    // SAFETY: the kernel reads eight bytes of a local.
    let ret = unsafe { libc::ioctl(timer.as_raw_fd(), TFD_IOC_SET_TICKS, &raw const ticks) };
    errno::check(ret.into(), "ioctl(TFD_IOC_SET_TICKS)").map(drop)
}
