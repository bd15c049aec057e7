//! Netlink, netlink(7): messages put together, sent, dumped and taken apart.
//!
//! Images hold messages of the kernel as they came, so a message is kept as its bytes; whatever is read from one is
//! checked at the reading. Nothing that a kernel or an image could hold makes it read beyond its end.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{MsgFlags, NetlinkAddr, recv, sendto};

use crate::{
    error::{Error, Result, SysContext},
    sys::sockopt::{self, Opt},
};

/// Bytes of `struct nlmsghdr`.
pub const HEADER: usize = 16;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_MULTI: u16 = 2;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_DUMP: u16 = 0x300;
/// `NLM_F_EXCL`.
pub const EXCL: u16 = 0x200;
/// `NLM_F_CREATE`.
pub const CREATE: u16 = 0x400;
/// `NLM_F_APPEND`.
pub const APPEND: u16 = 0x800;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// The kernel's own words, of an error.
const NLMSGERR_ATTR_MSG: u16 = 1;
const NLM_F_CAPPED: u16 = 0x100;
const EXT_ACK: Opt = Opt { level: 270, number: 11, name: "NETLINK_EXT_ACK" };
/// An attribute with others inside.
pub const NESTED: u16 = 0x8000;
/// What the kernel sends at once is shorter.
const BUFFER: usize = 256 << 10;
/// How often a dump is begun again because something changed meanwhile.
const AGAIN: usize = 20;

/// A message of the kernel, with its header, whose length is that of the bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Message(Vec<u8>);

impl Message {
    /// Takes the first message off `rest`; `None` if it is none.
    pub fn next(rest: &mut &[u8]) -> Option<Message> {
        let len = word(rest)? as usize;
        let bytes = rest.get(..len).filter(|b| b.len() >= HEADER)?.to_vec();
        *rest = rest.get(len.next_multiple_of(4)..).unwrap_or(&[]);
        Some(Message(bytes))
    }

    /// All messages of `bytes`, one behind the other as they are stored.
    ///
    /// # Errors
    /// One that is cut off or longer than what is left; `name` is what messages call the whole.
    pub fn all(mut bytes: &[u8], name: &str) -> Result<Vec<Message>> {
        let whole = bytes.len();
        let mut all = Vec::new();
        while !bytes.is_empty() {
            let at = whole - bytes.len();
            all.push(Message::next(&mut bytes).ok_or_else(|| {
                Error::image(format!("{name}: the message at byte {at} is damaged or cut off"))
            })?);
        }
        Ok(all)
    }

    /// All of it.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// `nlmsg_type`.
    pub fn kind(&self) -> u16 {
        self.0.get(4..).and_then(half).unwrap_or(0)
    }

    fn flags(&self) -> u16 {
        self.0.get(6..).and_then(half).unwrap_or(0)
    }

    fn seq(&self) -> u32 {
        self.0.get(8..).and_then(word).unwrap_or(0)
    }

    /// What follows the header.
    pub fn body(&self) -> &[u8] {
        self.0.get(HEADER..).unwrap_or(&[])
    }

    /// The body with other bytes.
    pub fn body_mut(&mut self) -> &mut [u8] {
        self.0.get_mut(HEADER..).unwrap_or(&mut [])
    }

    /// The first `N` bytes of the body: the structure that comes before the attributes.
    pub fn head<const N: usize>(&self) -> Option<[u8; N]> {
        self.body().get(..N)?.try_into().ok()
    }

    /// Attributes behind a structure of `head` bytes.
    pub fn attributes(&self, head: usize) -> Attributes<'_> {
        Attributes(self.body().get(head.next_multiple_of(4)..).unwrap_or(&[]))
    }
}

/// Attributes one behind the other; ends at the first that is damaged.
#[derive(Clone, Copy, Debug)]
pub struct Attributes<'a>(pub &'a [u8]);

impl<'a> Attributes<'a> {
    /// The value of the first attribute of `kind`.
    pub fn get(mut self, kind: u16) -> Option<&'a [u8]> {
        self.find(|(k, _)| *k == kind).map(|(_, value)| value)
    }

    /// The first attribute of `kind` as a number of 32 bits.
    pub fn word(self, kind: u16) -> Option<u32> {
        word(self.get(kind)?)
    }

    /// The same of 16 bits.
    pub fn half(self, kind: u16) -> Option<u16> {
        half(self.get(kind)?)
    }

    /// The same of 8 bits.
    pub fn byte(self, kind: u16) -> Option<u8> {
        self.get(kind)?.first().copied()
    }

    /// The first attribute of `kind` as text.
    pub fn text(self, kind: u16) -> Option<&'a str> {
        let bytes = self.get(kind)?;
        let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
        std::str::from_utf8(bytes.get(..end)?).ok()
    }

    /// What is inside of the first attribute of `kind`; nothing if there is none.
    pub fn inside(self, kind: u16) -> Attributes<'a> {
        Attributes(self.get(kind).unwrap_or(&[]))
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let len = usize::from(half(self.0)?);
        let kind = self.0.get(2..).and_then(half)?;
        let value = self.0.get(4..len)?;
        self.0 = self.0.get(len.next_multiple_of(4)..).unwrap_or(&[]);
        // Whether it is nested, and whether in network order.
        Some((kind & 0x3fff, value))
    }
}

/// The body of a message being put together: a structure, then attributes.
#[derive(Clone, Debug, Default)]
pub struct Body(pub Vec<u8>);

impl Body {
    /// Begins with a structure.
    pub fn new(head: &[u8]) -> Body {
        let mut body = Body(head.to_vec());
        body.0.resize(head.len().next_multiple_of(4), 0);
        body
    }

    /// Appends an attribute. Its value must be shorter than 64 KiB.
    #[must_use]
    pub fn bytes(mut self, kind: u16, value: &[u8]) -> Body {
        self.0.extend((4 + value.len() as u16).to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// Appends a number of 32 bits.
    #[must_use]
    pub fn word(self, kind: u16, value: u32) -> Body {
        self.bytes(kind, &value.to_ne_bytes())
    }

    /// Appends text, with its final zero.
    #[must_use]
    pub fn text(self, kind: u16, value: &str) -> Body {
        self.bytes(kind, &[value.as_bytes(), b"\0"].concat())
    }

    /// Appends an attribute with others inside.
    #[must_use]
    pub fn nest(self, kind: u16, inner: &Body) -> Body {
        self.bytes(kind, &inner.0)
    }

    /// Appends it if there is a value.
    #[must_use]
    pub fn maybe(self, kind: u16, value: Option<&[u8]>) -> Body {
        match value {
            Some(value) => self.bytes(kind, value),
            None => self,
        }
    }
}

/// A netlink socket; it speaks with the network namespace in which it was made.
#[derive(Debug)]
pub struct Netlink {
    socket: OwnedFd,
    seq: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    /// Links, addresses, routes (rtnetlink(7)) of the namespace this thread is in.
    pub fn route() -> Result<Netlink> {
        Self::open(libc::NETLINK_ROUTE)
    }

    /// Netfilter's of the namespace this thread is in.
    pub fn netfilter() -> Result<Netlink> {
        Self::open(libc::NETLINK_NETFILTER)
    }

    /// IPsec's of the namespace this thread is in.
    pub fn xfrm() -> Result<Netlink> {
        Self::open(libc::NETLINK_XFRM)
    }

    fn open(protocol: i32) -> Result<Netlink> {
        let socket = sockopt::socket(libc::AF_NETLINK, libc::SOCK_RAW, protocol)?;
        // Only the words of errors depend on it (Linux 4.12).
        let _ = sockopt::set_int(socket.as_fd(), EXT_ACK, 1);
        Ok(Netlink { socket, seq: 0, buffer: vec![0; BUFFER] })
    }

    /// The socket.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn send(&mut self, kind: u16, flags: u16, body: &[u8]) -> Result<()> {
        self.seq = self.seq.wrapping_add(1);
        let mut bytes = ((HEADER + body.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((NLM_F_REQUEST | flags).to_ne_bytes());
        bytes.extend(self.seq.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(body);
        sendto(self.socket.as_raw_fd(), &bytes, &NetlinkAddr::new(0, 0), MsgFlags::empty())
            .call("sendto(netlink)")
            .map(drop)
    }

    /// Receives messages, those to no request of ours included.
    fn receive(&mut self) -> Result<Vec<Message>> {
        let got = loop {
            match recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_TRUNC) {
                Ok(got) => break got,
                Err(nix::errno::Errno::EINTR) => crate::interrupt::check()?,
                Err(e) => return Err(Error::sys("recv(netlink)", e as i32)),
            }
        };
        let mut rest =
            self.buffer.get(..got).ok_or_else(|| Error::bug("a netlink message beyond 256 KiB"))?;
        let mut all = Vec::new();
        while let Some(message) = Message::next(&mut rest) {
            all.push(message);
        }
        if all.is_empty() {
            return Err(Error::host("the kernel ended its answer early"));
        }
        Ok(all)
    }

    /// Asks for all objects of a kind: `kind` and `body` are the request's, `name` is what errors call it.
    ///
    /// # Errors
    /// What the kernel answers: EOPNOTSUPP without the subsystem. Objects that change all the time.
    pub fn dump(&mut self, name: &'static str, kind: u16, body: &Body) -> Result<Vec<Message>> {
        for _ in 0..AGAIN {
            if let Some(all) = self.dump_once(name, kind, body)? {
                return Ok(all);
            }
        }
        Err(Error::host(format!("{name}: the listing changes all the time")))
    }

    fn dump_once(&mut self, name: &'static str, kind: u16, body: &Body) -> Result<Option<Vec<Message>>> {
        self.send(kind, NLM_F_DUMP, &body.0)?;
        let (mut all, mut whole) = (Vec::new(), true);
        loop {
            for message in self.receive()? {
                if message.seq() != self.seq {
                    continue;
                }
                whole &= message.flags() & NLM_F_DUMP_INTR == 0;
                match message.kind() {
                    NLMSG_DONE => {
                        let errno = word(message.body()).map_or(0, u32::cast_signed);
                        return if errno < 0 {
                            Err(failed(name, &message))
                        } else {
                            Ok(whole.then_some(all))
                        };
                    }
                    NLMSG_ERROR => return Err(failed(name, &message)),
                    _ => all.push(message),
                }
            }
        }
    }

    /// Sends a request and waits until it is done.
    ///
    /// # Errors
    /// What the kernel answers, with its words.
    pub fn request(&mut self, name: &'static str, kind: u16, flags: u16, body: &[u8]) -> Result<()> {
        self.ask(name, kind, flags, body).map(drop)
    }

    /// Sends a request and gives what is answered besides that it is done.
    pub fn ask(&mut self, name: &'static str, kind: u16, flags: u16, body: &[u8]) -> Result<Vec<Message>> {
        self.send(kind, flags | NLM_F_ACK, body)?;
        let mut all = Vec::new();
        loop {
            for message in self.receive()?.into_iter().filter(|m| m.seq() == self.seq) {
                match message.kind() {
                    NLMSG_ERROR if word(message.body()) == Some(0) => return Ok(all),
                    NLMSG_ERROR => return Err(failed(name, &message)),
                    NLMSG_DONE if message.flags() & NLM_F_MULTI != 0 => return Ok(all),
                    _ => all.push(message),
                }
            }
        }
    }
}

/// The error of an answer, `struct nlmsgerr` and what the kernel says about it.
fn failed(name: &'static str, answer: &Message) -> Error {
    let errno = word(answer.body()).map_or(libc::EIO, |e| e.cast_signed().wrapping_neg());
    // The request is repeated before the attributes, without its body if capped.
    let request = match answer.kind() {
        NLMSG_ERROR if answer.flags() & NLM_F_CAPPED != 0 => HEADER,
        NLMSG_ERROR => answer.body().get(4..).and_then(word).map_or(0, |len| len as usize),
        _ => 0,
    };
    match answer.attributes(4usize.saturating_add(request)).text(NLMSGERR_ATTR_MSG) {
        Some(words) => Error::sys(format!("{name} ({words})"), errno),
        None => Error::sys(name, errno),
    }
}

/// The first four bytes as a number.
pub fn word(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?))
}

/// The first two bytes as a number.
pub fn half(bytes: &[u8]) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?))
}

#[cfg(test)]
mod tests;
