//! Objects that are descriptors and nothing else: signalfd, timerfd, and what of them nix does not know.
//!
//! # Safety
//! Pointers passed are to locals of the size the call names; a descriptor the kernel returns is new and ours.
#![allow(unsafe_code)]

use std::os::fd::{FromRawFd, OwnedFd};

use restorer::args::Late;

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

/// The call that sets the timer: `flags` are `TFD_TIMER_*`, `value` the first expiration (zero disarms), then
/// every `interval`.
pub(crate) fn set_timer_later(timer: i32, flags: i32, value: Time, interval: Time) -> Late {
    let words = [interval.0, interval.1, value.0, value.1];
    Late {
        call: libc::SYS_timerfd_settime as u32,
        fd: timer.cast_unsigned(),
        arg: flags as u64,
        data: words.map(i64::cast_unsigned),
    }
}

/// The call that sets how many expirations a read will report (Linux 3.17, CONFIG_CHECKPOINT_RESTORE).
pub(crate) fn set_ticks_later(timer: i32, ticks: u64) -> Late {
    const TFD_IOC_SET_TICKS: u64 = 0x4008_5400;
    let call = libc::SYS_ioctl as u32;
    Late { call, fd: timer.cast_unsigned(), arg: TFD_IOC_SET_TICKS, data: [ticks, 0, 0, 0] }
}
