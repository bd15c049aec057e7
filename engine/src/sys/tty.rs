//! Requests to terminals, ioctl_tty(2), with the kernel's own structures.
//!
//! # Safety
//! Every request passes a number or a pointer to a local of the size the request names.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

use crate::error::{Error, Result};

/// `struct termios` of the kernel, which has fewer control characters than libc's.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub(crate) struct Termios {
    pub(crate) iflag: u32,
    pub(crate) oflag: u32,
    pub(crate) cflag: u32,
    pub(crate) lflag: u32,
    pub(crate) line: u8,
    pub(crate) cc: [u8; 19],
}

/// `struct winsize`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub(crate) struct Winsize {
    pub(crate) row: u16,
    pub(crate) col: u16,
    pub(crate) xpixel: u16,
    pub(crate) ypixel: u16,
}

const TCGETS: libc::Ioctl = 0x5401;
const TCSETS: libc::Ioctl = 0x5402;
const TIOCEXCL: libc::Ioctl = 0x540c;
const TIOCSCTTY: libc::Ioctl = 0x540e;
const TIOCGPGRP: libc::Ioctl = 0x540f;
const TIOCSPGRP: libc::Ioctl = 0x5410;
const TIOCGWINSZ: libc::Ioctl = 0x5413;
const TIOCSWINSZ: libc::Ioctl = 0x5414;
const TIOCPKT: libc::Ioctl = 0x5420;
const TIOCGSID: libc::Ioctl = 0x5429;
const TIOCGPTN: libc::Ioctl = 0x8004_5430;
const TIOCSPTLCK: libc::Ioctl = 0x4004_5431;
const TIOCGDEV: libc::Ioctl = 0x8004_5432;
const TIOCGPKT: libc::Ioctl = 0x8004_5438;
const TIOCGPTLCK: libc::Ioctl = 0x8004_5439;
const TIOCGEXCL: libc::Ioctl = 0x8004_5440;
const TIOCGLCKTRMIOS: libc::Ioctl = 0x5456;
const TIOCSLCKTRMIOS: libc::Ioctl = 0x5457;

fn request<T>(tty: BorrowedFd<'_>, name: &'static str, number: libc::Ioctl, value: &mut T) -> Result<()> {
    // SAFETY: callers in this file pair each number with the type its argument has.
    let r = unsafe { libc::ioctl(tty.as_raw_fd(), number, std::ptr::from_mut(value)) };
    if r < 0 { Err(Error::io(name, &std::io::Error::last_os_error())) } else { Ok(()) }
}

fn get<T: Default>(tty: BorrowedFd<'_>, name: &'static str, number: libc::Ioctl) -> Result<T> {
    let mut value = T::default();
    request(tty, name, number, &mut value)?;
    Ok(value)
}

/// Settings of the line; on a master those of its slave. EIO once the terminal was hung up.
pub(crate) fn termios(tty: BorrowedFd<'_>) -> Result<Termios> {
    get(tty, "ioctl(TCGETS)", TCGETS)
}

/// Sets them at once. From a background group this is SIGTTOU to the caller.
pub(crate) fn set_termios(tty: BorrowedFd<'_>, mut to: Termios) -> Result<()> {
    request(tty, "ioctl(TCSETS)", TCSETS, &mut to)
}

/// Settings that cannot be changed: bits that are 1 here.
pub(crate) fn locked_termios(tty: BorrowedFd<'_>) -> Result<Termios> {
    get(tty, "ioctl(TIOCGLCKTRMIOS)", TIOCGLCKTRMIOS)
}

/// Sets them. Needs CAP_SYS_ADMIN of the first user namespace.
pub(crate) fn set_locked_termios(tty: BorrowedFd<'_>, mut to: Termios) -> Result<()> {
    request(tty, "ioctl(TIOCSLCKTRMIOS)", TIOCSLCKTRMIOS, &mut to)
}

/// Size of the window.
pub(crate) fn winsize(tty: BorrowedFd<'_>) -> Result<Winsize> {
    get(tty, "ioctl(TIOCGWINSZ)", TIOCGWINSZ)
}

/// Sets it. A change is SIGWINCH to the foreground group.
pub(crate) fn set_winsize(tty: BorrowedFd<'_>, mut to: Winsize) -> Result<()> {
    request(tty, "ioctl(TIOCSWINSZ)", TIOCSWINSZ, &mut to)
}

/// Session whose controlling terminal this is. For a slave only members of that session learn it (ENOTTY).
pub(crate) fn session(tty: BorrowedFd<'_>) -> Result<i32> {
    get(tty, "ioctl(TIOCGSID)", TIOCGSID)
}

/// Foreground group, under the same conditions.
pub(crate) fn foreground(tty: BorrowedFd<'_>) -> Result<i32> {
    get(tty, "ioctl(TIOCGPGRP)", TIOCGPGRP)
}

/// Sets the foreground group of the caller's controlling terminal.
///
/// # Errors
/// ESRCH, EPERM: no such group in the caller's session.
pub(crate) fn set_foreground(tty: BorrowedFd<'_>, mut group: i32) -> Result<()> {
    request(tty, "ioctl(TIOCSPGRP)", TIOCSPGRP, &mut group)
}

/// Makes it the controlling terminal of the caller, who must lead a session without one; taken away from
/// another session (CAP_SYS_ADMIN).
pub(crate) fn control(tty: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: the argument is a number.
    let r = unsafe { libc::ioctl(tty.as_raw_fd(), TIOCSCTTY, 1) };
    if r < 0 { Err(Error::io("ioctl(TIOCSCTTY)", &std::io::Error::last_os_error())) } else { Ok(()) }
}

/// Nobody may open it any more (TIOCGEXCL, Linux 3.8).
pub(crate) fn exclusive(tty: BorrowedFd<'_>) -> Result<bool> {
    get::<i32>(tty, "ioctl(TIOCGEXCL)", TIOCGEXCL).map(|v| v != 0)
}

/// Forbids further opening.
pub(crate) fn set_exclusive(tty: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: no argument.
    let r = unsafe { libc::ioctl(tty.as_raw_fd(), TIOCEXCL) };
    if r < 0 { Err(Error::io("ioctl(TIOCEXCL)", &std::io::Error::last_os_error())) } else { Ok(()) }
}

/// Whether a master reads packets with a status byte (Linux 3.8).
pub(crate) fn packets(master: BorrowedFd<'_>) -> Result<bool> {
    get::<i32>(master, "ioctl(TIOCGPKT)", TIOCGPKT).map(|v| v != 0)
}

/// Sets that.
pub(crate) fn set_packets(master: BorrowedFd<'_>, on: bool) -> Result<()> {
    request(master, "ioctl(TIOCPKT)", TIOCPKT, &mut i32::from(on))
}

/// Whether the slave of a master cannot be opened (Linux 3.8).
pub(crate) fn locked(master: BorrowedFd<'_>) -> Result<bool> {
    get::<i32>(master, "ioctl(TIOCGPTLCK)", TIOCGPTLCK).map(|v| v != 0)
}

/// Sets that.
pub(crate) fn set_locked(master: BorrowedFd<'_>, on: bool) -> Result<()> {
    request(master, "ioctl(TIOCSPTLCK)", TIOCSPTLCK, &mut i32::from(on))
}

/// Number of the pair a master belongs to.
pub(crate) fn pty_number(master: BorrowedFd<'_>) -> Result<u32> {
    get(master, "ioctl(TIOCGPTN)", TIOCGPTN)
}

/// Device number of the terminal itself, in the form of `tty_nr` in /proc/PID/stat; for /dev/tty that of the
/// terminal behind it, for a master that of its slave (Linux 2.6.39).
pub(crate) fn device(tty: BorrowedFd<'_>) -> Result<u32> {
    get(tty, "ioctl(TIOCGDEV)", TIOCGDEV)
}
