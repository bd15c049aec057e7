//! A channel between two processes of a restore: short messages, each with a descriptor or none.

use std::{
    io::{IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    time::Duration,
};

use nix::{
    cmsg_space,
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
        socketpair,
    },
};

use super::stages::Area;
use crate::{
    error::{Error, Result, SysContext},
    interrupt,
    sys::fd::take,
};

/// Bytes of a message: its kind and a number.
const LEN: usize = 5;

/// How often one side looks whether the other still lives while it waits for it.
const LOOK: Duration = Duration::from_millis(100);

/// Kind, number, and what comes along.
pub type Message = (u8, u32, Option<OwnedFd>);

/// One end.
#[derive(Debug)]
pub struct Channel(OwnedFd);

impl Channel {
    /// Both ends.
    pub fn pair() -> Result<(Channel, Channel)> {
        let (one, two) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .call("socketpair")?;
        Ok((Channel(one), Channel(two)))
    }

    /// The same end, moved by `to` to another number.
    pub fn moved(self, to: impl FnOnce(OwnedFd) -> Result<OwnedFd>) -> Result<Channel> {
        Ok(Channel(to(self.0)?))
    }

    /// Sends a message.
    pub fn send(&self, kind: u8, number: u32, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        let mut bytes = [kind; LEN];
        bytes[1..].copy_from_slice(&number.to_ne_bytes());
        let fds: Vec<RawFd> = fd.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
        loop {
            let flags = MsgFlags::MSG_NOSIGNAL;
            match sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(&bytes)], rights, flags, None) {
                Err(Errno::EINTR) => {}
                other => return other.map(drop).call("sendmsg"),
            }
        }
    }

    /// Waits for a message; `None` when the other end is closed.
    pub fn receive(&self) -> Result<Option<Message>> {
        let mut bytes = [0; LEN];
        let mut room = cmsg_space!([RawFd; 1]);
        let (len, fd) = loop {
            let mut iov = [IoSliceMut::new(&mut bytes)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            match recvmsg::<()>(self.0.as_raw_fd(), &mut iov, Some(&mut room), flags) {
                Err(Errno::EINTR) => {}
                Err(e) => return Err(Error::sys("recvmsg", e as i32)),
                Ok(message) => {
                    let mut fd = None;
                    for part in message.cmsgs().call("recvmsg")? {
                        if let ControlMessageOwned::ScmRights(fds) = part {
                            fd = fds.first().copied();
                        }
                    }
                    break (message.bytes, fd);
                }
            }
        };
        let fd = fd.map(take).transpose()?;
        match len {
            0 => Ok(None),
            LEN => {
                let [kind, number @ ..] = bytes;
                Ok(Some((kind, u32::from_ne_bytes(number), fd)))
            }
            _ => Err(Error::bug("a message of another length")),
        }
    }

    /// The next message for the engine; `watch` looks whether the other side lives.
    ///
    /// # Errors
    /// What ended the other side, as far as that is known.
    pub(super) fn next(&self, area: &Area, watch: &dyn Fn() -> Result<()>) -> Result<Message> {
        loop {
            interrupt::check()?;
            if area.failed() {
                return Err(area.failure());
            }
            if !self.is_ready(LOOK)? {
                // It tells why it ends, if it can.
                watch().map_err(|e| if area.failed() { area.failure() } else { e })?;
                continue;
            }
            if let Some(message) = self.receive()? {
                return Ok(message);
            }
            let ended = watch();
            return Err(if area.failed() { area.failure() } else { ended.err().unwrap_or_else(gone) });
        }
    }

    /// In a task: waits for a word of the engine, which may come with a descriptor.
    pub(super) fn await_engine(&self, area: &Area) -> Result<Option<OwnedFd>> {
        while !self.is_ready(LOOK)? {
            area.goes_on()?;
        }
        self.receive()?.ok_or_else(gone).map(|(.., fd)| fd)
    }

    /// Whether a message, or the end, has come before `timeout` is over.
    pub fn is_ready(&self, timeout: Duration) -> Result<bool> {
        let mut wait = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        match poll(&mut wait, timeout) {
            Err(Errno::EINTR) => Ok(false),
            other => Ok(other.call("poll")? > 0),
        }
    }
}

fn gone() -> Error {
    Error::host("the root task and this process lost each other while its namespaces were being filled")
        .remedy("one of the two was killed: restore again")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_with_their_descriptors() {
        let (one, two) = Channel::pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        one.send(3, 77, Some(file.as_fd())).unwrap();
        one.send(4, 78, None).unwrap();
        assert!(two.is_ready(Duration::ZERO).unwrap());
        let (kind, number, fd) = two.receive().unwrap().unwrap();
        assert_eq!((kind, number), (3, 77));
        let stat = |fd: BorrowedFd<'_>| nix::sys::stat::fstat(fd).unwrap().st_rdev;
        assert_eq!(stat(fd.unwrap().as_fd()), stat(file.as_fd()));
        assert!(matches!(two.receive().unwrap(), Some((4, 78, None))));
        assert!(!two.is_ready(Duration::ZERO).unwrap());
        drop(one);
        assert!(two.receive().unwrap().is_none());
    }
}
