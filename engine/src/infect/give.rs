//! Giving a descriptor to the process, for what it may not open itself.
//!
//! It comes through a datagram socket with an abstract name that the process makes for a moment.

use std::os::{
    fd::{AsFd, AsRawFd, BorrowedFd},
    unix::net::UnixDatagram,
};

use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};

use super::{Infected, fds::Name};
use crate::error::{Error, Result, SysContext};

/// Bytes of a `struct msghdr`, and where the parts of a message stand behind it.
const HEADER: u64 = 56;
const BYTE: u64 = HEADER + 16;
const CONTROL: u64 = BYTE + 8;
const CONTROL_LEN: u64 = 24;

impl Infected<'_> {
    /// Gives the process a duplicate of `fd`, close-on-exec; its number there, which the caller has to close.
    ///
    /// # Errors
    /// EMFILE if it has no two free descriptors; what a security module forbids.
    pub(super) fn give_fd(&self, fd: BorrowedFd<'_>) -> Result<u64> {
        let kind = (libc::SOCK_DGRAM | libc::SOCK_CLOEXEC) as u64;
        let args = [libc::AF_UNIX as u64, kind, 0, 0, 0];
        let socket = self.syscall("socket", libc::SYS_socket as u64, args, &[])?;
        let given = self.give_through(socket, fd);
        self.close(socket)?;
        given
    }

    /// Closes a descriptor of the process.
    pub(super) fn close(&self, fd: u64) -> Result<()> {
        self.syscall("close", libc::SYS_close as u64, [fd, 0, 0, 0, 0], &[]).map(drop)
    }

    fn give_through(&self, socket: u64, fd: BorrowedFd<'_>) -> Result<u64> {
        let (name, at) = (Name::new()?, self.data_address());
        let address = name.sockaddr();
        let args = [socket, at, address.len() as u64, 0, 0];
        self.syscall("bind", libc::SYS_bind as u64, args, &address)?;
        let to = UnixAddr::new_abstract(&name.0).call("bind")?;
        let raw = [fd.as_raw_fd()];
        self.in_its_network(|| {
            let sender = UnixDatagram::unbound().call("socket")?;
            let rights = [ControlMessage::ScmRights(&raw)];
            let byte = [std::io::IoSlice::new(&[0])];
            sendmsg(sender.as_fd().as_raw_fd(), &byte, &rights, MsgFlags::MSG_DONTWAIT, Some(&to))
                .call("sendmsg")
        })?;
        // A header that points to one byte and to room for a control message, all behind it.
        let words = [0, 0, at + HEADER, 1, at + CONTROL, CONTROL_LEN, 0, at + BYTE, 1, 0, 0, 0, 0];
        let message: Vec<u8> = words.iter().flat_map(|word: &u64| word.to_ne_bytes()).collect();
        let flags = (libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT) as u64;
        self.syscall("recvmsg", libc::SYS_recvmsg as u64, [socket, at, flags, 0, 0], &message)?;
        let bytes = self.data((CONTROL + CONTROL_LEN) as usize)?;
        let word = |at: u64| {
            let mut word = [0; 4];
            word.copy_from_slice(&bytes[at as usize..at as usize + 4]);
            i32::from_ne_bytes(word)
        };
        let head = (word(CONTROL), word(CONTROL + 8), word(CONTROL + 12));
        match (head, word(CONTROL + 16)) {
            ((20, libc::SOL_SOCKET, libc::SCM_RIGHTS), fd) if fd >= 0 => Ok(fd as u64),
            _ => Err(Error::host("a descriptor did not come through a socket")
                .remedy("raise RLIMIT_NOFILE of the process")),
        }
    }
}
