//! What a socket has received before somebody asked for it.
//!
//! Commands are short and come one after the other: each call takes as many as there are. Pages go straight to
//! where they are wanted, and only what follows them comes here.

use std::io;

use super::socket::Socket;

/// Bytes received ahead at most. What comes here is copied once more.
const ROOM: usize = 32 << 10;

/// The bytes from `from` up to `upto` were received.
#[derive(Debug, Default)]
pub struct Ahead {
    /// Empty until it is needed.
    room: Vec<u8>,
    from: usize,
    upto: usize,
}

impl Ahead {
    /// Whether something is here.
    pub fn holds_data(&self) -> bool {
        self.from < self.upto
    }

    /// Moves as much as there is and `buf` has room for to its beginning; gives the number of bytes.
    pub fn take(&mut self, buf: &mut [u8]) -> usize {
        let n = buf.len().min(self.upto - self.from);
        buf[..n].copy_from_slice(&self.room[self.from..self.from + n]);
        self.from += n;
        n
    }

    /// Receives at least a byte into `buf`, which is not empty, and what follows it in here; gives the number of
    /// bytes in `buf`, 0 at the end.
    ///
    /// Precondition: nothing is here.
    pub fn read(&mut self, socket: &Socket, buf: &mut [u8]) -> io::Result<usize> {
        // Once and for all: filling it with zeroes for each command would take longer than the command.
        self.room.resize(ROOM, 0);
        let n = socket.receive(buf, &mut self.room)?;
        (self.from, self.upto) = (0, n.saturating_sub(buf.len()));
        Ok(n.min(buf.len()))
    }
}
