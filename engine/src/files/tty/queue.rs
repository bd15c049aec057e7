//! What lies in the buffers of a pty pair.
//!
//! The kernel only gives it by reading, so it is read and put back at once. Nobody may see a difference: the
//! line is switched to settings that change no byte meanwhile. A line that waits for its end (canonical mode)
//! is written back in canonical mode with every special character off, so that it goes on waiting.

use std::os::fd::BorrowedFd;

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::{read, write},
};

use crate::{
    error::{Error, Result},
    sys::tty::{self, Termios},
};

/// More than the kernel's buffers of one direction hold; an endless stream would be a mistake.
const MOST: usize = 1 << 20;

/// Both directions.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Queued {
    /// Written on the slave, not read from the master yet.
    pub(super) for_master: Vec<u8>,
    /// Written on the master, not read from the slave yet.
    pub(super) for_slave: Vec<u8>,
}

/// Copies both directions. Precondition: nobody who uses the pair runs.
pub(super) fn copy(master: BorrowedFd<'_>, slave: BorrowedFd<'_>) -> Result<Queued> {
    let before = tty::termios(slave)?;
    let packets = tty::packets(master)?;
    if packets {
        tty::set_packets(master, false)?;
    }
    let taken = (|| {
        // What was written last may still be on its way through the line, to be echoed for one.
        is_ready(slave, PollFlags::POLLIN, PollTimeout::ZERO)?;
        let for_master = drain(master)?;
        tty::set_termios(slave, plain(&before, false))?;
        Ok(Queued { for_master, for_slave: drain(slave)? })
    })();
    // Put back even if reading failed half way: what was read is all there is.
    let restored = match &taken {
        Ok(queued) => put(master, slave, queued, &before),
        Err(_) => tty::set_termios(slave, before),
    };
    if packets {
        tty::set_packets(master, true)?;
    }
    restored?;
    taken
}

/// Fills both directions and leaves the line with the settings `after`.
pub(super) fn put(
    master: BorrowedFd<'_>,
    slave: BorrowedFd<'_>,
    queued: &Queued,
    after: &Termios,
) -> Result<()> {
    if !queued.for_master.is_empty() || !queued.for_slave.is_empty() {
        tty::set_termios(slave, plain(after, after.lflag & libc::ICANON != 0))?;
        for (to, bytes) in [(slave, &queued.for_master), (master, &queued.for_slave)] {
            if let Err(e) = fill(to, bytes) {
                tty::set_termios(slave, *after)?;
                return Err(e);
            }
        }
        // It must have gone through the line before the line changes.
        is_ready(slave, PollFlags::POLLIN, PollTimeout::ZERO)?;
        is_ready(master, PollFlags::POLLIN, PollTimeout::ZERO)?;
    }
    tty::set_termios(slave, *after)
}

/// Settings under which bytes pass unchanged.
fn plain(line: &Termios, canonical: bool) -> Termios {
    Termios {
        iflag: 0,
        oflag: 0,
        cflag: line.cflag,
        lflag: if canonical { libc::ICANON } else { 0 },
        line: line.line,
        // Without lines a read must give what there is; with lines 0 disables a character.
        cc: std::array::from_fn(|at| u8::from(!canonical && at == libc::VMIN)),
    }
}

/// Asking makes the kernel process what waits before the line.
fn is_ready(tty: BorrowedFd<'_>, what: PollFlags, timeout: PollTimeout) -> Result<bool> {
    loop {
        let mut ready = [PollFd::new(tty, what)];
        match poll(&mut ready, timeout) {
            Err(Errno::EINTR) => crate::interrupt::check()?,
            Err(e) => return Err(Error::sys("poll", e as i32)),
            Ok(_) => return Ok(ready[0].revents().is_some_and(|r| r.contains(what))),
        }
    }
}

fn drain(tty: BorrowedFd<'_>) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        if !is_ready(tty, PollFlags::POLLIN, PollTimeout::ZERO)? {
            return Ok(all);
        }
        match read(tty, &mut chunk) {
            Ok(0) | Err(Errno::EAGAIN | Errno::EIO) => return Ok(all),
            Ok(n) => all.extend_from_slice(&chunk[..n]),
            Err(Errno::EINTR) => {}
            Err(e) => return Err(Error::sys("read", e as i32)),
        }
        if all.len() > MOST {
            return Err(Error::host("the terminal's buffers do not get empty"));
        }
    }
}

fn fill(tty: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<()> {
    while !bytes.is_empty() {
        if !is_ready(tty, PollFlags::POLLOUT, PollTimeout::from(1000u16))? {
            log::warn!("the terminal takes no more: {} bytes are lost", bytes.len());
            return Ok(());
        }
        match write(tty, bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            Err(e) => return Err(Error::sys("write", e as i32)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{io::Read, os::fd::AsFd};

    use nix::pty::openpty;

    use super::*;

    #[test]
    fn what_is_queued_is_copied_and_stays() {
        let pty = openpty(None, None).unwrap();
        let (master, slave) = (pty.master.as_fd(), pty.slave.as_fd());
        let before = tty::termios(slave).unwrap();
        assert!(before.lflag & libc::ICANON != 0 && before.lflag & libc::ECHO != 0);
        write(slave, b"out\n").unwrap();
        write(master, b"line\nhalf").unwrap();
        // Opened raw: output is post-processed, input is echoed.
        let expected =
            Queued { for_master: b"out\r\nline\r\nhalf".to_vec(), for_slave: b"line\nhalf".to_vec() };
        assert_eq!(copy(master, slave).unwrap(), expected);
        assert_eq!(copy(master, slave).unwrap(), expected);
        assert_eq!(tty::termios(slave).unwrap(), before);
        // The first line can be read, the second is still being typed.
        let mut slave = std::fs::File::from(pty.slave);
        let mut bytes = [0; 100];
        assert_eq!(slave.read(&mut bytes).unwrap(), 5);
        let mut ready = [PollFd::new(slave.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut ready, PollTimeout::ZERO).unwrap(), 0);
        write(pty.master.as_fd(), b"!\n").unwrap();
        assert_eq!(slave.read(&mut bytes).unwrap(), 6);
        assert_eq!(&bytes[..6], b"half!\n");
    }
}
