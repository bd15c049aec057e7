//! Second descriptors of address spaces that lack memory, held by the restore while its child fills them.
//!
//! A userfaultfd that nobody holds any more makes what is lacking read as zeroes. So the server sends each one to the
//! restore too, before the tasks run and whenever a task forks: if the server is killed, threads that touch what is
//! lacking go on waiting until the restore has ended the tasks. Nobody ever sees the zeroes.
//!
//! ```text
//! server   key, descriptor  --->   restore holds it
//!          key              --->   restore lets go of it: the space is complete
//!          ARMED            --->   all spaces that there are have been sent
//! ```

use std::{
    collections::HashMap,
    io::{IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    cmsg_space,
    errno::Errno,
    sys::socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
        socketpair,
    },
};

use crate::{
    error::{Error, Result, SysContext},
    interrupt,
    process::take_descriptor,
};

/// Instead of a key.
const ARMED: u64 = 0;

/// The server's end.
#[derive(Debug)]
pub struct Sender(OwnedFd);

/// The restore's end, and what it holds.
#[derive(Debug)]
pub struct Spares {
    socket: OwnedFd,
    held: HashMap<u64, OwnedFd>,
}

/// Both ends.
pub fn pair() -> Result<(Sender, OwnedFd)> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .call("socketpair")?;
    Ok((Sender(theirs), ours))
}

impl Sender {
    /// A space: its key, which is not 0.
    pub fn hold(&self, key: u64, fd: BorrowedFd<'_>) {
        self.send(key, Some(fd));
    }

    /// It is complete.
    pub fn let_go(&self, key: u64) {
        self.send(key, None);
    }

    /// All have been sent.
    pub fn armed(&self) {
        self.send(ARMED, None);
    }

    /// A restore that is gone needs nothing any more.
    fn send(&self, key: u64, fd: Option<BorrowedFd<'_>>) {
        let fds = fd.map(|fd| [fd.as_raw_fd()]);
        let rights = fds.as_ref().map(|fds| ControlMessage::ScmRights(fds));
        let bytes = key.to_ne_bytes();
        let iov = [IoSlice::new(&bytes)];
        let send =
            || sendmsg::<()>(self.0.as_raw_fd(), &iov, rights.as_slice(), MsgFlags::MSG_NOSIGNAL, None);
        while send() == Err(Errno::EINTR) {}
    }
}

impl Spares {
    /// With our end of the pair.
    pub fn new(socket: OwnedFd) -> Spares {
        Spares { socket, held: HashMap::new() }
    }

    /// Takes messages until the server has sent all that there is.
    ///
    /// # Errors
    /// It is gone.
    pub fn wait_armed(&mut self) -> Result<()> {
        while let Some(key) = self.next()? {
            if key == ARMED {
                return Ok(());
            }
        }
        Err(Error::host("the process that fills memory ended early").remedy("the log says why"))
    }

    /// Takes messages until the server has ended.
    pub fn wait_end(&mut self) -> Result<()> {
        while self.next()?.is_some() {}
        Ok(())
    }

    /// The next message; none when the server has ended.
    fn next(&mut self) -> Result<Option<u64>> {
        interrupt::wait_readable(self.socket.as_fd())?;
        let mut bytes = [0; 8];
        let mut room = cmsg_space!([std::os::fd::RawFd; 1]);
        let (got, fd) = {
            let mut iov = [IoSliceMut::new(&mut bytes)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let message =
                recvmsg::<()>(self.socket.as_raw_fd(), &mut iov, Some(&mut room), flags).call("recvmsg")?;
            let fd = message.cmsgs().call("recvmsg")?.find_map(|c| match c {
                ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
                _ => None,
            });
            (message.bytes, fd)
        };
        let fd = fd.map(take_descriptor).transpose()?;
        if got < bytes.len() {
            return Ok(None);
        }
        let key = u64::from_ne_bytes(bytes);
        match fd {
            Some(fd) => _ = self.held.insert(key, fd),
            None => _ = self.held.remove(&key),
        }
        Ok(Some(key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_let_go_is_held_to_the_end() {
        let (sender, ours) = pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        let mut spares = Spares::new(ours);
        sender.hold(2, file.as_fd());
        sender.hold(3, file.as_fd());
        sender.armed();
        spares.wait_armed().unwrap();
        assert_eq!(spares.held.len(), 2);
        sender.let_go(2);
        drop(sender);
        spares.wait_end().unwrap();
        assert_eq!(spares.held.keys().collect::<Vec<_>>(), [&3]);
        assert!(spares.wait_armed().is_err());
    }
}
