//! Terminals: what the kernel only tells a process of the terminal's session.
//!
//! # Safety
//! Each ioctl stores one int.

use blobrt::syscall::{Errno, Result, nr, syscall3};

use crate::plain;

plain! {
    /// State of a terminal. ENOTTY for a value (not this process's terminal, not a pty) reads as 0.
    pub struct TtyInfo[24] {
        /// Session the terminal controls, as this process numbers it.
        pub sid: i32,
        /// Foreground process group.
        pub pgrp: i32,
        /// Packet mode (`TIOCGPKT`).
        pub packet: i32,
        /// Lock of a pty's other side (`TIOCGPTLCK`).
        pub locked: i32,
        /// Exclusive mode (`TIOCGEXCL`).
        pub exclusive: i32,
        /// 1 if the other side is gone; then the other values are 0.
        pub hung_up: i32,
    }
}

const TIOCGSID: usize = 0x5429;
const TIOCGPGRP: usize = 0x540f;
const TIOCGPKT: usize = 0x8004_5438;
const TIOCGPTLCK: usize = 0x8004_5439;
const TIOCGEXCL: usize = 0x8004_5440;
const EIO: Errno = Errno(5);
const ENOTTY: Errno = Errno(25);
const EINVAL: Errno = Errno(22);

/// Asks descriptor `fd`.
pub fn read(fd: i32) -> Result<TtyInfo> {
    let ask = |request| {
        let mut v = 0i32;
        // SAFETY: each of these requests stores one int.
        match unsafe { syscall3(nr::IOCTL, fd as usize, request, (&raw mut v) as usize) } {
            Ok(_) => Ok(v),
            // Consoles answer pty requests with EINVAL.
            Err(ENOTTY | EINVAL) => Ok(0),
            Err(e) => Err(e),
        }
    };
    let all = || {
        Ok(TtyInfo {
            sid: ask(TIOCGSID)?,
            pgrp: ask(TIOCGPGRP)?,
            packet: ask(TIOCGPKT)?,
            locked: ask(TIOCGPTLCK)?,
            exclusive: ask(TIOCGEXCL)?,
            hung_up: 0,
        })
    };
    match all() {
        Err(EIO) => Ok(TtyInfo { hung_up: 1, ..TtyInfo::default() }),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fresh_pty_is_locked_and_has_no_session() {
        let Ok(master) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/ptmx") else {
            eprintln!("SKIP: no /dev/ptmx");
            return;
        };
        use std::os::fd::AsRawFd;
        let info = read(master.as_raw_fd()).unwrap();
        assert_eq!((info.sid, info.packet, info.locked, info.hung_up), (0, 0, 1, 0));
        assert_eq!(read(-1), Err(Errno(9)));
    }
}
