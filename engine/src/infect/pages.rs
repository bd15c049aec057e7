//! Having the process write its own memory into a file of ours.
//!
//! The process fetches the file's descriptor from a socket of ours and closes it again, all in one visit: if
//! we die in the middle, it goes on to the end and no descriptor stays behind.

use std::{
    io::IoSlice,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
    thread,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{ControlMessage, MsgFlags, getsockopt, sendmsg, sockopt::PeerCredentials},
};
use parasite::{
    Command, DATA_LEN,
    pages::{ADDRESS, BITS, MAX_PAGES, MAX_PIECES, PAGE, Piece, SKIP_ZERO},
};

use super::{Infected, fds::Name, plain::bytes_of};
use crate::{
    error::{Error, Result, SysContext},
    pstree::RealPid,
    sys::vm,
};

/// Most bytes and pieces of one [`Outlet::write`].
pub const MOST: (u64, usize) = (MAX_PAGES * PAGE, MAX_PIECES);

/// Where the process gets a file of ours from.
#[derive(Debug)]
pub struct Outlet<'i, 't> {
    infected: &'i Infected<'t>,
    listener: UnixListener,
    name: Name,
}

/// What a call wrote.
#[derive(Debug)]
pub struct WrittenPages {
    bits: Vec<u8>,
}

impl WrittenPages {
    /// Whether page number `page` of the pieces was written.
    pub fn has(&self, page: usize) -> bool {
        self.bits.get(page / 8).is_some_and(|byte| byte >> (page % 8) & 1 == 1)
    }

    /// Bytes of all.
    pub fn bytes(&self) -> u64 {
        self.bits.iter().map(|b| u64::from(b.count_ones())).sum::<u64>() * PAGE
    }
}

impl<'t> Infected<'t> {
    /// A place in the network namespace of the process where it can fetch files.
    pub fn outlet<'i>(&'i self) -> Result<Outlet<'i, 't>> {
        let name = Name::new()?;
        let bind = |address: &SocketAddr| UnixListener::bind_addr(address).call("bind");
        let listener = self.in_its_network(|| bind(&name.address()?))?;
        Ok(Outlet { infected: self, listener, name })
    }
}

impl Outlet<'_, '_> {
    /// Appends consecutive pages to `file`, whose position is `at` and moves on: start and length in bytes, and
    /// whether pages full of zeros are left out. At most [`MOST`].
    ///
    /// # Errors
    /// EMFILE where the process has no room for two more descriptors: nothing is written. EFAULT for memory
    /// that it cannot read itself: part may have been written.
    pub fn write(
        &self,
        file: BorrowedFd<'_>,
        at: u64,
        pieces: impl Iterator<Item = (u64, u64, bool)>,
    ) -> Result<WrittenPages> {
        let mut input = Vec::with_capacity(BITS);
        let (mut count, mut pages) = (0, 0);
        for (start, len, skip_zero) in pieces {
            let piece = Piece { start, what: len | if skip_zero { SKIP_ZERO } else { 0 } };
            input.extend_from_slice(bytes_of(&piece));
            count += 1;
            pages += len / PAGE;
        }
        if count > MAX_PIECES || pages > MAX_PAGES {
            return Err(Error::bug(format!("{count} pieces with {pages} pages at once")));
        }
        input.resize(ADDRESS, 0);
        let address = self.name.sockaddr();
        input.extend_from_slice(&address);
        let args = [count as u64, address.len() as u64, at, 0, 0, 0];
        let control = thread::scope(|scope| {
            // Closed when the visit is over: it may have ended before it came to the socket.
            let (visiting, over) = UnixStream::pair().call("socketpair")?;
            let (listener, pid) = (&self.listener, self.infected.task().pid());
            let server = scope.spawn(move || serve(listener, pid, file, &over));
            let done = self.infected.call(Command::WritePages, args, &input);
            drop(visiting);
            let served = server.join().unwrap_or_else(|_| Err(Error::bug("the server of a file panicked")));
            // An error of ours is the reason for that of the process.
            served.and(done)
        })?;
        let mut bits = vec![0; (pages.div_ceil(8) as usize).min(DATA_LEN - BITS)];
        vm::read(self.infected.task().live(), self.infected.data_address() + BITS as u64, &mut bits)?;
        let written = WrittenPages { bits };
        if written.bytes() != control.ret[1] {
            return Err(Error::bug(format!("{} bytes written, not {}", control.ret[1], written.bytes())));
        }
        Ok(written)
    }
}

/// Hands `file` to process `pid`, and to nobody else who finds the address, until the visit is `over`.
fn serve(listener: &UnixListener, pid: RealPid, file: BorrowedFd<'_>, over: &UnixStream) -> Result<()> {
    loop {
        let mut waiting = [listener.as_fd(), over.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match poll(&mut waiting, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            other => other.call("poll")?,
        };
        if waiting[0].any() != Some(true) {
            return Ok(());
        }
        let (stream, _) = listener.accept().call("accept")?;
        let peer = getsockopt(&stream, PeerCredentials).call("getsockopt(SO_PEERCRED)")?;
        if peer.pid() == pid.0 {
            let rights = [file.as_raw_fd()];
            let control = [ControlMessage::ScmRights(&rights)];
            let socket = stream.as_raw_fd();
            return sendmsg::<()>(socket, &[IoSlice::new(b"f")], &control, MsgFlags::MSG_NOSIGNAL, None)
                .call("sendmsg")
                .map(drop);
        }
    }
}
