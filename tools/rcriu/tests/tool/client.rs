//! A client of the RPC, over a socket pair as runtimes start it.

use std::io::{IoSliceMut, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::process::{Child, Stdio};

use nix::cmsg_space;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, send, socketpair,
};
use prost::Message;
use rcriu_images::pb::{CriuOpts, CriuReq, CriuReqType, CriuResp};

use super::Tool;

pub struct Client {
    pub socket: OwnedFd,
    pub child: Option<Child>,
}

impl Client {
    /// A worker whose socket is its descriptor 0: any number will do.
    pub fn swrk(tool: &Tool) -> Client {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let mut command = tool.command(&["swrk", "0"]);
        command.stdin(Stdio::from(theirs)).stdout(Stdio::piped()).stderr(Stdio::piped());
        Client { socket: ours, child: Some(command.spawn().unwrap()) }
    }

    pub fn send(&self, request: &CriuReq) {
        send(self.socket.as_raw_fd(), &request.encode_to_vec(), MsgFlags::empty()).unwrap();
    }

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
        let fd = fd.map(|fd| {
            let kept = rcriu_engine::process::duplicate_descriptor(fd).unwrap();
            nix::unistd::close(fd).unwrap();
            kept
        });
        ((got > 0).then(|| CriuResp::decode(&buffer[..got]).unwrap()), fd)
    }

    pub fn ask(&self, request: &CriuReq) -> CriuResp {
        self.send(request);
        self.receive().unwrap()
    }

    /// Ends the connection; the worker's exit code, after checking that it wrote nothing.
    pub fn end(mut self) -> i32 {
        let mut child = self.child.take().unwrap();
        drop(self);
        let mut text = String::new();
        child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "", "stdio belongs to the container");
        child.wait().unwrap().code().unwrap()
    }
}

pub fn request(kind: CriuReqType) -> CriuReq {
    CriuReq { r#type: kind.into(), ..CriuReq::default() }
}

/// Options of a request about images in the tool's folder.
pub fn opts(tool: &Tool) -> CriuOpts {
    CriuOpts { images_dir: Some(tool.dir().display().to_string()), ..CriuOpts::default() }
}

/// Answers notifications until the final answer; their names, with a star where there was a pid.
pub fn answer_notifications(client: &Client) -> (Vec<String>, CriuResp) {
    let (names, resp, _) = answer_with_terminal(client);
    (names, resp)
}

/// The same, with the master of a terminal that came on the way.
pub fn answer_with_terminal(client: &Client) -> (Vec<String>, CriuResp, Option<OwnedFd>) {
    let (mut names, mut master) = (Vec::new(), None);
    loop {
        let (resp, fd) = client.receive_with_fd();
        let resp = resp.unwrap();
        let Some(notify) = &resp.notify else { return (names, resp, master) };
        let star = if notify.pid.is_some() { "*" } else { "" };
        names.push(format!("{}{star}", notify.script()));
        assert_eq!(fd.is_some(), notify.script() == "orphan-pts-master");
        master = fd.or(master);
        client.send(&CriuReq { notify_success: Some(true), ..request(CriuReqType::Notify) });
    }
}
