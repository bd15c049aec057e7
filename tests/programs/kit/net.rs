//! Network namespaces of a program's own, and requests to rtnetlink(7) about devices and addresses in them.
//!
//! # Safety
//!
//! Calls made raw take numbers, or bytes that outlive them with their length.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns, unshare};

use super::{Check, sys};

/// A network namespace.
#[derive(Debug)]
pub struct Space(pub File);

impl Space {
    /// The one this task is in.
    pub fn own() -> Result<Space> {
        Ok(Space(File::open("/proc/self/ns/net").context("open(ns/net)")?))
    }

    /// Leaves for a new one.
    pub fn new() -> Result<Space> {
        unshare(CloneFlags::CLONE_NEWNET).context("unshare(CLONE_NEWNET)")?;
        Space::own()
    }

    /// Enters it.
    pub fn enter(&self) -> Check {
        setns(&self.0, CloneFlags::CLONE_NEWNET).context("setns(CLONE_NEWNET)")
    }
}

/// A socket of rtnetlink, of the namespace in which it was made.
#[derive(Debug)]
pub struct Netlink(pub OwnedFd);

impl Netlink {
    /// Of the namespace that this task is in.
    pub fn open() -> Result<Netlink> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: numbers only.
        let fd = sys("socket", unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE) })?;
        // SAFETY: a new descriptor.
        Ok(Netlink(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Sends a request and gives the body of what is answered first.
    fn exchange(&self, kind: u16, flags: i32, body: &[u8]) -> Result<Vec<u8>> {
        let flags = (libc::NLM_F_REQUEST | flags) as u16;
        let mut message = (16 + body.len() as u32).to_ne_bytes().to_vec();
        message.extend([kind.to_ne_bytes(), flags.to_ne_bytes()].concat());
        message.extend([0; 8]);
        message.extend(body);
        let fd = self.0.as_raw_fd();
        // SAFETY: the message outlives the call.
        sys("send", unsafe { libc::send(fd, message.as_ptr().cast(), message.len(), 0) })?;
        let mut answer = vec![0u8; 8192];
        // SAFETY: there is room for as many bytes.
        let got = sys("recv", unsafe { libc::recv(fd, answer.as_mut_ptr().cast(), answer.len(), 0) })?;
        answer.truncate(got as usize);
        ensure!(answer.len() >= 20, "netlink {kind}: an answer of {} bytes", answer.len());
        let error = i32::from_ne_bytes(answer[16..20].try_into()?);
        let failed = answer[4..6] == (libc::NLMSG_ERROR as u16).to_ne_bytes() && error != 0;
        ensure!(!failed, "netlink {kind}: {}", nix::errno::Errno::from_raw(-error));
        Ok(answer.split_off(16))
    }

    /// Sends a request and waits until it is done.
    pub fn ask(&self, kind: u16, body: &[u8]) -> Check {
        self.exchange(kind, libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL, body).map(drop)
    }

    /// Sets a device up.
    pub fn up(&self, index: u32) -> Check {
        self.ask(libc::RTM_SETLINK, &link(index, libc::IFF_UP as u32)).context("up")
    }

    /// Gives a device an address of IPv4.
    pub fn address(&self, index: u32, address: [u8; 4]) -> Check {
        let mut body = vec![libc::AF_INET as u8, 24, 0, 0];
        body.extend(index.to_ne_bytes());
        body.extend([attribute(libc::IFA_LOCAL, &address), attribute(libc::IFA_ADDRESS, &address)].concat());
        self.ask(libc::RTM_NEWADDR, &body).context("address")
    }

    /// Whether there is a device of this name.
    pub fn has(&self, name: &str) -> bool {
        let body = [link(0, 0), attribute(libc::IFLA_IFNAME, &text(name))].concat();
        self.exchange(libc::RTM_GETLINK, 0, &body).is_ok()
    }

    /// Makes a pair of devices, each with its name and number, the second in another namespace.
    pub fn pair(&self, (name, index): (&str, u32), (other, number): (&str, u32), there: &Space) -> Check {
        let peer = [
            link(number, 0),
            attribute(libc::IFLA_IFNAME, &text(other)),
            attribute(libc::IFLA_NET_NS_FD, &there.0.as_raw_fd().to_ne_bytes()),
        ];
        // VETH_INFO_PEER within IFLA_INFO_DATA
        let data = attribute(2, &attribute(1, &peer.concat()));
        let info = [attribute(1, b"veth\0"), data].concat();
        let body = [
            link(index, 0),
            attribute(libc::IFLA_IFNAME, &text(name)),
            attribute(libc::IFLA_LINKINFO, &info),
        ];
        self.ask(libc::RTM_NEWLINK, &body.concat()).context("a pair of devices")
    }

    /// Makes a macvlan upon device `lower` of this namespace in another.
    pub fn macvlan(&self, (name, index): (&str, u32), lower: u32, there: &Space) -> Check {
        // IFLA_MACVLAN_MODE: bridge
        let info = [attribute(1, b"macvlan\0"), attribute(2, &attribute(1, &4u32.to_ne_bytes()))].concat();
        let body = [
            link(index, 0),
            attribute(libc::IFLA_IFNAME, &text(name)),
            attribute(libc::IFLA_LINK, &lower.to_ne_bytes()),
            attribute(libc::IFLA_NET_NS_FD, &there.0.as_raw_fd().to_ne_bytes()),
            attribute(libc::IFLA_LINKINFO, &info),
        ];
        self.ask(libc::RTM_NEWLINK, &body.concat()).context("a macvlan")
    }

    /// Gives another namespace a number in this one.
    pub fn set_number(&self, other: &Space, number: u32) -> Check {
        let body = [
            vec![0; 4],
            attribute(1, &number.to_ne_bytes()),
            attribute(3, &other.0.as_raw_fd().to_ne_bytes()),
        ];
        // RTM_NEWNSID
        self.ask(88, &body.concat()).context("a number of a namespace")
    }

    /// The number that another namespace has in this one; -1 for none.
    pub fn number(&self, other: &Space) -> Result<i32> {
        let body = [vec![0; 4], attribute(3, &other.0.as_raw_fd().to_ne_bytes())].concat();
        // RTM_GETNSID; the first attribute is the number.
        let answer = self.exchange(90, 0, &body)?;
        ensure!(answer.len() >= 12, "RTM_GETNSID: an answer of {} bytes", answer.len());
        Ok(i32::from_ne_bytes(answer[8..12].try_into()?))
    }
}

fn text(name: &str) -> Vec<u8> {
    [name.as_bytes(), b"\0"].concat()
}

/// An attribute of a request.
pub fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = [(4 + value.len() as u16).to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// `struct ifinfomsg`.
pub fn link(index: u32, flags: u32) -> Vec<u8> {
    let mut body = vec![0; 4];
    body.extend([index, flags, flags].map(u32::to_ne_bytes).concat());
    body
}
