//! Probes that ask by netlink: socket diagnostics, links, namespace ids, nftables.
//!
//! # Safety
//! As in the parent module.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::sched::{CloneFlags, unshare};

use super::{in_child, must};
use crate::error::{Error, Result, SysContext};

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

/// A request being put together.
struct Request(Vec<u8>);

impl Request {
    fn new(kind: u16, flags: u16, body: &[u8]) -> Request {
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((NLM_F_REQUEST | flags).to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend(body);
        Request(bytes)
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    /// Appends an attribute.
    fn attr(mut self, kind: u16, body: &[u8]) -> Request {
        self.pad();
        self.0.extend((4 + body.len() as u16).to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(body);
        self.pad();
        self
    }

    /// Appends an attribute made of attributes.
    fn nest(self, kind: u16, inner: Request) -> Request {
        self.attr(kind, &inner.0)
    }

    fn empty() -> Request {
        Request(Vec::new())
    }
}

/// What came back: whole messages with their kind and body, and the error if there was one.
struct Reply {
    messages: Vec<(u16, Vec<u8>)>,
    errno: i32,
}

fn ask(protocol: i32, mut request: Request) -> Result<Reply> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
    let fd = must("socket(AF_NETLINK)", fd.into())? as i32;
    // SAFETY: the kernel just gave us this number.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let len = request.0.len() as u32;
    request.0[..4].copy_from_slice(&len.to_ne_bytes());
    nix::unistd::write(&socket, &request.0).call("write(netlink)")?;
    let mut reply = Reply { messages: Vec::new(), errno: 0 };
    let mut buffer = vec![0u8; 64 << 10];
    loop {
        let got = nix::unistd::read(&socket, &mut buffer).call("read(netlink)")?;
        let mut rest = &buffer[..got];
        while let Some((kind, flags, body)) = message(&mut rest) {
            match kind {
                NLMSG_ERROR => {
                    reply.errno = body.get(..4).map_or(0, |b| -i32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
                    return Ok(reply);
                }
                NLMSG_DONE => return Ok(reply),
                _ => {
                    reply.messages.push((kind, body.to_vec()));
                    // Without NLM_F_MULTI there is one answer, followed by an acknowledgement if asked for.
                    if flags & 2 == 0 && u16::from_ne_bytes([request.0[6], request.0[7]]) & NLM_F_ACK == 0 {
                        return Ok(reply);
                    }
                }
            }
        }
        if got == 0 {
            return Ok(reply);
        }
    }
}

/// Takes the next message off `rest`: kind, flags, body.
fn message<'a>(rest: &mut &'a [u8]) -> Option<(u16, u16, &'a [u8])> {
    let head = rest.get(..16)?;
    let len = u32::from_ne_bytes([head[0], head[1], head[2], head[3]]) as usize;
    let body = rest.get(16..len)?;
    let found = (u16::from_ne_bytes([head[4], head[5]]), u16::from_ne_bytes([head[6], head[7]]), body);
    *rest = rest.get(len.next_multiple_of(4)..).unwrap_or(&[]);
    Some(found)
}

/// The body of attribute `kind` among `attrs`.
fn attribute(mut attrs: &[u8], kind: u16) -> Option<&[u8]> {
    while let Some(head) = attrs.get(..4) {
        let len = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        let body = attrs.get(4..len)?;
        if u16::from_ne_bytes([head[2], head[3]]) & 0x3fff == kind {
            return Some(body);
        }
        attrs = attrs.get(len.next_multiple_of(4)..).unwrap_or(&[]);
    }
    None
}

fn outcome(call: &'static str, reply: &Reply, no: &[i32]) -> Result<bool> {
    match reply.errno {
        0 => Ok(true),
        e if no.contains(&e) => Ok(false),
        e => Err(Error::sys(call, e)),
    }
}

const SOCK_DIAG_BY_FAMILY: u16 = 20;

/// Unix sockets can be listed.
pub(crate) fn unix_diag() -> Result<bool> {
    // struct unix_diag_req { family, protocol, pad, states, ino, show, cookie[2] }
    let mut body = [0u8; 24];
    body[0] = libc::AF_UNIX as u8;
    body[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
    let request = Request::new(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, &body);
    outcome("sock_diag(AF_UNIX)", &ask(libc::NETLINK_SOCK_DIAG, request)?, &[libc::ENOENT, libc::EINVAL])
}

/// Raw IPv4 and IPv6 sockets can be listed.
pub(crate) fn raw_diag() -> Result<bool> {
    for family in [libc::AF_INET, libc::AF_INET6] {
        // struct inet_diag_req_v2 { family, protocol, ext, pad, states, id (48 bytes) }
        let mut body = [0u8; 56];
        body[0] = family as u8;
        body[1] = libc::IPPROTO_RAW as u8;
        body[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
        let request = Request::new(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, &body);
        if !outcome("sock_diag(raw)", &ask(libc::NETLINK_SOCK_DIAG, request)?, &[libc::ENOENT, libc::EINVAL])?
        {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Network namespaces have ids that can be asked for.
pub(crate) fn nsid() -> Result<bool> {
    const RTM_GETNSID: u16 = 90;
    const NETNSA_PID: u16 = 2;
    let request = Request::new(RTM_GETNSID, 0, &[0; 4]).attr(NETNSA_PID, &std::process::id().to_ne_bytes());
    outcome("RTM_GETNSID", &ask(libc::NETLINK_ROUTE, request)?, &[libc::EOPNOTSUPP, libc::EINVAL])
}

/// A link can get a new index: the bad one asked for here is refused as such only by a kernel that looks.
pub(crate) fn new_ifindex() -> Result<bool> {
    const RTM_SETLINK: u16 = 19;
    const IFLA_IFNAME: u16 = 3;
    const IFLA_NEW_IFINDEX: u16 = 49;
    let request = Request::new(RTM_SETLINK, NLM_F_ACK | NLM_F_CREATE, &[0; 16])
        .attr(IFLA_NEW_IFINDEX, &(-1i32).to_ne_bytes())
        .attr(IFLA_IFNAME, b"no-such-link\0");
    match ask(libc::NETLINK_ROUTE, request)?.errno {
        libc::ERANGE => Ok(true),
        libc::ENODEV => Ok(false),
        e => Err(Error::sys("RTM_SETLINK(IFLA_NEW_IFINDEX)", e)),
    }
}

/// A link tells in which namespace its other end is.
pub(crate) fn link_nsid() -> Result<bool> {
    const RTM_NEWLINK: u16 = 16;
    const RTM_GETLINK: u16 = 18;
    const IFLA_IFNAME: u16 = 3;
    const IFLA_LINKINFO: u16 = 18;
    const IFLA_INFO_KIND: u16 = 1;
    const IFLA_INFO_DATA: u16 = 2;
    const VETH_INFO_PEER: u16 = 1;
    const IFLA_NET_NS_FD: u16 = 28;
    const IFLA_LINK_NETNSID: u16 = 37;
    in_child(|| {
        unshare(CloneFlags::CLONE_NEWNET).call("unshare(CLONE_NEWNET)")?;
        let other = std::fs::File::open("/proc/self/ns/net").call("open(/proc/self/ns/net)")?;
        unshare(CloneFlags::CLONE_NEWNET).call("unshare(CLONE_NEWNET)")?;
        let peer = Request(vec![0; 16]).attr(IFLA_NET_NS_FD, &other.as_raw_fd().to_ne_bytes());
        let data = Request::empty().nest(VETH_INFO_PEER, peer);
        let info = Request::empty().attr(IFLA_INFO_KIND, b"veth").nest(IFLA_INFO_DATA, data);
        let request = Request::new(RTM_NEWLINK, NLM_F_ACK | NLM_F_CREATE, &[0; 16])
            .attr(IFLA_IFNAME, b"probe\0")
            .nest(IFLA_LINKINFO, info);
        outcome("RTM_NEWLINK(veth)", &ask(libc::NETLINK_ROUTE, request)?, &[])?;
        let reply = ask(libc::NETLINK_ROUTE, Request::new(RTM_GETLINK, NLM_F_DUMP, &[0; 16]))?;
        Ok(reply
            .messages
            .iter()
            .any(|(_, body)| body.get(16..).and_then(|attrs| attribute(attrs, IFLA_LINK_NETNSID)).is_some()))
    })
}

/// nftables takes sets of address and port together, which locking of single connections needs.
pub(crate) fn nft_concatenations() -> Result<bool> {
    const NFT: u16 = 10 << 8;
    const NEWTABLE: u16 = NFT;
    const NEWSET: u16 = NFT | 9;
    const BATCH_BEGIN: u16 = 0x10;
    const BATCH_END: u16 = 0x11;
    /// inet, version 0, resource id 0.
    const HEAD: [u8; 4] = [1, 0, 0, 0];
    /// Resource id of a batch: the nftables subsystem, big-endian.
    const BATCH: [u8; 4] = [0, 0, 0, 10];
    in_child(|| {
        unshare(CloneFlags::CLONE_NEWNET).call("unshare(CLONE_NEWNET)")?;
        let finished = |mut r: Request| {
            let len = r.0.len() as u32;
            r.0[..4].copy_from_slice(&len.to_ne_bytes());
            r.0
        };
        // Key of a set: ipv4_addr (7) and inet_service (13), six bits each; four bytes for either.
        let set = Request::new(NEWSET, NLM_F_ACK | NLM_F_CREATE, &HEAD)
            .attr(1, b"t\0")
            .attr(2, b"s\0")
            .attr(3, &0u32.to_be_bytes())
            .attr(4, &(7u32 << 6 | 13).to_be_bytes())
            .attr(5, &8u32.to_be_bytes())
            .attr(10, &1u32.to_be_bytes());
        let table = Request::new(NEWTABLE, NLM_F_CREATE, &HEAD).attr(1, b"t\0");
        let mut batch = Request::new(BATCH_BEGIN, 0, &BATCH);
        let begin = batch.0.len();
        batch.0.extend(finished(table));
        batch.0.extend(finished(set));
        batch.0.extend(finished(Request::new(BATCH_END, 0, &BATCH)));
        nft_batch(batch, begin)
    })
}

/// Sends a batch, whose first message is `begin` bytes long, and reads the first acknowledgement or error.
fn nft_batch(mut batch: Request, begin: usize) -> Result<bool> {
    // SAFETY: no pointers.
    let fd = unsafe {
        libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_NETFILTER)
    };
    if !super::answer("socket(NETLINK_NETFILTER)", fd.into(), &[libc::EPROTONOSUPPORT])? {
        return Ok(false);
    }
    let socket = crate::sys::fd::take(fd)?;
    batch.0[..4].copy_from_slice(&(begin as u32).to_ne_bytes());
    nix::unistd::write(&socket, &batch.0).call("write(netlink)")?;
    let mut buffer = [0u8; 8192];
    let got = nix::unistd::read(&socket, &mut buffer).call("read(netlink)")?;
    let mut rest = &buffer[..got];
    match message(&mut rest) {
        Some((NLMSG_ERROR, _, body)) => {
            let errno = body.get(..4).map_or(0, |b| -i32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
            Ok(errno == 0)
        }
        _ => Err(Error::host("nftables did not answer")),
    }
}
