//! Messages whose receiver asks who has sent them (`SO_PASSCRED`), as it does of its services: of a process that is
//! still there, as whom it says, and of one that has ended.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::cmsg_space;
use nix::libc::ucred;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, UnixCredentials, recvmsg, sendmsg, setsockopt, sockopt,
};

use crate::kit::crew::member;
use crate::kit::{Check, rest, same};

/// The next message, its sender, and how many files are in it.
fn next(socket: &UnixDatagram) -> Result<(Vec<u8>, [u32; 3], usize)> {
    let mut data = [0; 100];
    let mut room = cmsg_space!(UnixCredentials, [RawFd; 4]);
    let mut parts = [IoSliceMut::new(&mut data)];
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut room), MsgFlags::MSG_DONTWAIT);
    let message = message.context("recvmsg")?;
    let (mut sender, mut files) = (None, 0);
    for control in message.cmsgs().context("control data")? {
        match control {
            ControlMessageOwned::ScmCredentials(found) => {
                sender = Some([found.pid().cast_unsigned(), found.uid(), found.gid()]);
            }
            ControlMessageOwned::ScmRights(found) => files += found.len(),
            other => bail!("{other:?} in a message"),
        }
    }
    let len = message.bytes;
    let Some(sender) = sender else { bail!("a message without a sender") };
    Ok((data.get(..len).unwrap_or_default().to_vec(), sender, files))
}

/// Root sends in the name of another user.
fn send(socket: &UnixDatagram, text: &[u8], user: u32, group: u32) -> Check {
    let pid = std::process::id().cast_signed();
    let sender = UnixCredentials::from(ucred { pid, uid: user, gid: group });
    let number = [socket.as_raw_fd()];
    let control = [ControlMessage::ScmRights(&number), ControlMessage::ScmCredentials(&sender)];
    let sent = sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(text)], &control, MsgFlags::empty(), None);
    sent.context("sendmsg").map(drop)
}

/// A receiver of datagrams, and two senders with names; a third is gone.
struct Named {
    receiver: UnixDatagram,
    senders: [(UnixDatagram, SocketAddr); 2],
    gone: SocketAddr,
}

impl Named {
    fn new() -> Result<Named> {
        let name = |what: &str| {
            let name = format!("message-senders-{}-{what}", std::process::id());
            SocketAddr::from_abstract_name(name).context("name")
        };
        let to = name("receiver")?;
        let receiver = UnixDatagram::bind_addr(&to).context("bind")?;
        let path = SocketAddr::from_pathname(std::env::current_dir()?.join("sender.sock")).context("path")?;
        let send = |from: SocketAddr, text: &[u8]| {
            let sender = UnixDatagram::bind_addr(&from).context("bind")?;
            sender.send_to_addr(text, &to).context("send").map(|_| (sender, from))
        };
        let one = send(name("one")?, b"from one")?;
        let (_, gone) = send(name("gone")?, b"from who is gone")?;
        let two = send(path, b"from two")?;
        two.0.connect_addr(&to).context("connect")?;
        Ok(Named { receiver, senders: [one, two], gone })
    }

    /// Messages come in order from whom they came, and can be answered.
    fn verify(&self) -> Check {
        let next = || {
            let mut data = [0; 100];
            let (n, from) = self.receiver.recv_from(&mut data).context("recv")?;
            Ok::<_, anyhow::Error>((data.get(..n).unwrap_or_default().to_vec(), from))
        };
        let shown = |name: &SocketAddr| {
            (name.as_pathname().map(Path::to_owned), name.as_abstract_name().map(<[u8]>::to_vec))
        };
        let [(one, one_is), (two, two_is)] = &self.senders;
        let all = [(&b"from one"[..], one_is), (b"from who is gone", &self.gone), (b"from two", two_is)];
        for (text, sender) in all {
            let (got, from) = next()?;
            same("a named sender", (got, shown(&from)), (text.to_vec(), shown(sender)))?;
        }
        for (socket, name) in [(one, one_is), (two, two_is)] {
            self.receiver.send_to_addr(b"answer", name).context("answer")?;
            let mut data = [0; 100];
            let n = socket.recv(&mut data).context("recv")?;
            same("answer", data.get(..n), Some(&b"answer"[..]))?;
        }
        Ok(())
    }
}

pub fn run(_: &[String]) -> Check {
    let (receiver, sender) = UnixDatagram::pair().context("socketpair")?;
    setsockopt(&receiver, sockopt::PassCred, &true).context("SO_PASSCRED")?;
    let root = nix::unistd::geteuid().is_root();
    let (user, group) = match root {
        true => (1, 2),
        false => (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw()),
    };
    let child = {
        let sender = sender.try_clone().context("dup")?;
        member(move || {
            send(&sender, b"of a child", user, group)?;
            rest()
        })?
    };
    let gone = {
        let sender = sender.try_clone().context("dup")?;
        member(move || {
            send(&sender, b"of one who is gone", user, group)?;
            crate::kit::tell_ready()
        })?
    };
    gone.wait()?;
    sender.send(b"own").context("send")?;
    let named = Named::new()?;
    rest()?;
    named.verify()?;
    let me = [std::process::id(), nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw()];
    let (text, [pid, uid, gid], files) = next(&receiver)?;
    same("first", (text, uid, gid, files), (b"of a child".to_vec(), user, group, 1))?;
    if root {
        // Who is not root sends in nobody's name but its own.
        same("sender of the first", pid, child.pid.as_raw().cast_unsigned())?;
    }
    let (text, [_, uid, gid], files) = next(&receiver)?;
    same("second", (text, uid, gid, files), (b"of one who is gone".to_vec(), user, group, 1))?;
    same("third", next(&receiver)?, (b"own".to_vec(), me, 0))?;
    child.verify()
}
