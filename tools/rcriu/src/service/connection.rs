//! One client: whole messages in, whole messages out.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, recv, sendmsg};
use prost::{Message, Name};
use rcriu_engine::error::{Error, Result, SysContext};
use rcriu_engine::interrupt;
use rcriu_engine::process;
use rcriu_images::{
    pb::{CriuReq, CriuResp},
    required,
};

/// Longest request we read. The longest seen is a few kilobytes; the kernel itself stops at the size of the
/// sender's buffer, some hundred.
const LONGEST: usize = 16 << 20;

/// A connected client; clones are the same one.
#[derive(Debug, Clone)]
pub struct Connection {
    socket: Arc<OwnedFd>,
    peer: i32,
}

impl Connection {
    /// Takes over a connected SOCK_SEQPACKET socket.
    pub fn new(socket: OwnedFd) -> Result<Connection> {
        let (peer, _) = process::peer(&socket)?;
        Ok(Connection { socket: Arc::new(socket), peer })
    }

    /// Closes the descriptor in a forked child that does not speak to the client: else the client would not see
    /// that its worker has ended. The connection must not be used afterwards.
    pub fn leave(&self) {
        let _ = nix::unistd::close(self.socket.as_raw_fd());
    }

    /// The client's pid, in our pid namespace.
    pub fn peer(&self) -> i32 {
        self.peer
    }

    /// Waits for the next request; `None` when the client is gone.
    pub fn receive(&self) -> Result<Option<CriuReq>> {
        interrupt::wait_readable(self.as_fd())?;
        let size = self.read(&mut [], MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC)?;
        if size > LONGEST {
            return Err(Error::usage(format!("a request of {size} bytes is too long")));
        }
        let mut buffer = vec![0; size];
        let got = self.read(&mut buffer, MsgFlags::empty())?;
        if got == 0 {
            return Ok(None);
        }
        let request = CriuReq::decode(&buffer[..got])
            .map_err(|e| Error::usage(format!("the client sent something that is no request: {e}")))?;
        if let Some(table) = required::of(CriuReq::NAME) {
            let found = required::check(table, &buffer[..got]);
            if let Some(field) = found.missing {
                return Err(Error::usage(format!("the client sent a request without {field}")));
            }
            if let Some(unknown) = found.unknown {
                log::warn!("Request of the client: {unknown}: it has no effect");
            }
        }
        Ok(Some(request))
    }

    fn read(&self, buffer: &mut [u8], flags: MsgFlags) -> Result<usize> {
        loop {
            match recv(self.socket.as_raw_fd(), buffer, flags) {
                Err(Errno::EINTR) => interrupt::check()?,
                Err(Errno::ECONNRESET) => return Ok(0),
                got => return got.call("recv").map_err(|e| e.during("request of the client")),
            }
        }
    }

    /// Sends a message, with a descriptor if one is given.
    pub fn send(&self, message: &CriuResp, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        let bytes = message.encode_to_vec();
        let fds = fd.map(|fd| [fd.as_raw_fd()]);
        let control: Vec<_> = fds.iter().map(|fds| ControlMessage::ScmRights(fds)).collect();
        let parts = [std::io::IoSlice::new(&bytes)];
        loop {
            match sendmsg::<UnixAddr>(self.socket.as_raw_fd(), &parts, &control, MsgFlags::MSG_NOSIGNAL, None)
            {
                Err(Errno::EINTR) => continue,
                sent => break sent.call("sendmsg").map(drop).map_err(|e| e.during("answer to the client")),
            }
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use std::os::fd::IntoRawFd;

    fn pair() -> (Connection, OwnedFd) {
        let (a, b) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        (Connection::new(a).unwrap(), b)
    }

    #[test]
    fn requests_of_any_size_arrive_whole_and_an_end_is_an_end() {
        let (us, client) = pair();
        assert_eq!(us.peer(), std::process::id() as i32);
        let opts = rcriu_images::pb::CriuOpts { skip_mnt: vec!["x".repeat(50); 1000], ..Default::default() };
        let request = CriuReq { r#type: 1, opts: Some(opts), ..CriuReq::default() };
        let bytes = request.encode_to_vec();
        assert_eq!(nix::unistd::write(&client, &bytes).unwrap(), bytes.len());
        assert_eq!(us.receive().unwrap().unwrap(), request);
        drop(client);
        assert!(us.receive().unwrap().is_none());
    }

    #[test]
    fn garbage_is_an_error() {
        let (us, client) = pair();
        nix::unistd::write(&client, &[0xff; 40]).unwrap();
        assert!(us.receive().unwrap_err().to_string().contains("no request"));
    }

    #[test]
    fn descriptors_travel_with_messages() {
        let (us, client) = pair();
        let file = std::fs::File::open("/dev/null").unwrap();
        us.send(&CriuResp { r#type: 6, success: true, ..CriuResp::default() }, Some(file.as_fd())).unwrap();
        let mut bytes = [0u8; 100];
        let mut space = nix::cmsg_space!([i32; 1]);
        let mut parts = [std::io::IoSliceMut::new(&mut bytes)];
        let got = nix::sys::socket::recvmsg::<UnixAddr>(
            client.as_raw_fd(),
            &mut parts,
            Some(&mut space),
            MsgFlags::empty(),
        )
        .unwrap();
        let fds: Vec<i32> = got
            .cmsgs()
            .unwrap()
            .filter_map(|c| match c {
                nix::sys::socket::ControlMessageOwned::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            .collect();
        assert_eq!(fds.len(), 1);
        assert!(process::is_open(fds[0]));
        drop(process::take_descriptor(fds[0]).unwrap());
        let _ = file.into_raw_fd();
    }
}
