//! A client of the RPC, over a socket pair as container runtimes start their worker. Whatever a worker does that no
//! client could live with panics.
//!
//! # Safety
//!
//! Descriptors that came with a message belong to nobody else yet.

use std::io::{IoSliceMut, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::process::{Child, Command, Stdio};

use nix::cmsg_space;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, send, socketpair,
};
use prost::Message;
use rcriu_images::pb::{CriuOpts, CriuReq, CriuReqType, CriuResp};

/// One end of a connection.
pub struct Client {
    pub socket: OwnedFd,
    /// The worker, if we started it.
    pub child: Option<Child>,
}

impl Client {
    /// A worker of the program in `command`, whose socket is its descriptor 0: any number will do.
    pub fn swrk(mut command: Command) -> Client {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        command.args(["swrk", "0"]).stdin(Stdio::from(theirs));
        Client { socket: ours, child: Some(command.spawn().unwrap()) }
    }

    pub fn send(&self, request: &CriuReq) {
        send(self.socket.as_raw_fd(), &request.encode_to_vec(), MsgFlags::empty()).unwrap();
    }

    /// The next message; `None` when the worker is gone.
    pub fn receive(&self) -> Option<CriuResp> {
        self.receive_with_fd().0
    }

    /// A message, and the descriptor that came with it.
    pub fn receive_with_fd(&self) -> (Option<CriuResp>, Option<OwnedFd>) {
        let mut buffer = vec![0; 1 << 16];
        let mut room = cmsg_space!([RawFd; 1]);
        let (got, fd) = {
            let mut iov = [IoSliceMut::new(&mut buffer)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let message = recvmsg::<()>(self.socket.as_raw_fd(), &mut iov, Some(&mut room), flags).unwrap();
            let fds = message.cmsgs().unwrap().filter_map(|part| match part {
                ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
                _ => None,
            });
            (message.bytes, fds.last())
        };
        // SAFETY: the kernel has just made it for us.
        let fd = fd.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
        ((got > 0).then(|| CriuResp::decode(&buffer[..got]).unwrap()), fd)
    }

    /// The answer to a request without notifications.
    pub fn ask(&self, request: &CriuReq) -> CriuResp {
        self.send(request);
        self.receive().unwrap()
    }

    /// Ends the connection; the worker's exit code, after checking that it wrote nothing where we listen.
    pub fn end(mut self) -> i32 {
        let mut child = self.child.take().unwrap();
        drop(self);
        let mut text = String::new();
        if let Some(mut out) = child.stdout.take() {
            out.read_to_string(&mut text).unwrap();
        }
        if let Some(mut err) = child.stderr.take() {
            err.read_to_string(&mut text).unwrap();
        }
        assert_eq!(text, "", "stdio belongs to the container");
        child.wait().unwrap().code().unwrap()
    }
}

/// A request without options.
pub fn request(kind: CriuReqType) -> CriuReq {
    CriuReq { r#type: kind.into(), ..CriuReq::default() }
}

/// One with options.
pub fn with(kind: CriuReqType, opts: CriuOpts) -> CriuReq {
    CriuReq { opts: Some(opts), ..request(kind) }
}

/// What was told on the way to an answer.
pub struct Told {
    /// Names of the notifications, with a star where there was a pid.
    pub names: Vec<String>,
    pub resp: CriuResp,
    /// The master of a terminal, if one was handed over.
    pub master: Option<OwnedFd>,
}

/// Answers notifications with a yes until the final answer.
pub fn answer_notifications(client: &Client) -> Told {
    answer_each(client, |_| true)
}

/// Answers each notification as `say` does.
pub fn answer_each(client: &Client, say: impl Fn(&str) -> bool) -> Told {
    let (mut names, mut master) = (Vec::new(), None);
    loop {
        let (resp, fd) = client.receive_with_fd();
        let resp = resp.unwrap();
        let Some(notify) = &resp.notify else { return Told { names, resp, master } };
        let star = if notify.pid.is_some() { "*" } else { "" };
        names.push(format!("{}{star}", notify.script()));
        assert_eq!(fd.is_some(), notify.script() == "orphan-pts-master");
        master = fd.or(master);
        let answer = Some(say(notify.script()));
        client.send(&CriuReq { notify_success: answer, ..request(CriuReqType::Notify) });
    }
}
