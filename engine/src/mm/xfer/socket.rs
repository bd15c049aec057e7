//! A connected socket whose calls notice that the operation must stop.

use std::{
    io::{self, IoSlice, IoSliceMut, Read, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        socket::{MsgFlags, Shutdown, sendmsg, shutdown},
        uio::readv,
    },
};

use crate::interrupt;

/// How long the other side has to close after us.
const FAREWELL: Duration = Duration::from_secs(2);

/// A socket whose blocking calls notice that the operation must stop.
#[derive(Debug)]
pub struct Socket(OwnedFd);

impl Socket {
    /// Takes a connected socket.
    pub fn new(socket: OwnedFd) -> Socket {
        Socket(socket)
    }

    /// Sends all of `head` and `tail`, in one call where the kernel takes them in one.
    pub fn send(&self, head: &[u8], tail: &[u8]) -> io::Result<()> {
        let mut parts = [IoSlice::new(head), IoSlice::new(tail)];
        let mut rest = &mut parts[..];
        // Leaves out what is empty.
        IoSlice::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            let sent = self.send_some(rest)?;
            IoSlice::advance_slices(&mut rest, sent);
        }
        Ok(())
    }

    fn send_some(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        loop {
            match sendmsg::<()>(self.0.as_raw_fd(), parts, &[], MsgFlags::MSG_NOSIGNAL, None) {
                Ok(n) => return Ok(n),
                Err(e) => Socket::again(e)?,
            }
        }
    }

    /// Receives at least a byte into `buf` and, once that is full, `more`; gives the number, 0 at the end.
    pub fn receive(&self, buf: &mut [u8], more: &mut [u8]) -> io::Result<usize> {
        let mut parts = [IoSliceMut::new(buf), IoSliceMut::new(more)];
        loop {
            match readv(&self.0, &mut parts) {
                Ok(n) => return Ok(n),
                Err(e) => Socket::again(e)?,
            }
        }
    }

    fn again(e: nix::errno::Errno) -> io::Result<()> {
        match e {
            nix::errno::Errno::EINTR | nix::errno::Errno::EAGAIN => {
                interrupt::check().map_err(|e| io::Error::other(e.to_string()))
            }
            other => Err(other.into()),
        }
    }

    /// Says that nothing more is sent. That it is gone already is found out by whoever waits for an answer.
    pub fn half_close(&self) {
        let _ = shutdown(self.0.as_raw_fd(), Shutdown::Write);
    }

    /// Says that nothing more is sent, and waits a while until the other side closes. What it sends to the last,
    /// under TLS its own farewell, would reset a connection that is closed here already, under all that it has
    /// not read yet.
    pub fn end(&mut self) {
        let deadline = Instant::now() + FAREWELL;
        if shutdown(self.0.as_raw_fd(), Shutdown::Write).is_err() {
            return;
        }
        let mut buf = [0; 256];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            if !matches!(poll(&mut fds, timeout), Ok(1..)) || !matches!(self.read(&mut buf), Ok(1..)) {
                return;
            }
        }
    }
}

impl Read for Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.receive(buf, &mut [])
    }
}

impl Write for Socket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.send_some(&[IoSlice::new(buf)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        self.send_some(parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
