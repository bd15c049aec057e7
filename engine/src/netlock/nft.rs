//! Packet filters of nftables, spoken to the kernel directly (NETLINK_NETFILTER, `linux/netfilter/nf_tables.h`).
//!
//! One table holds the lock of all connections:
//!
//! ```text
//! table inet NAME {
//!   set conns4 { saddr . sport . daddr . dport }   set conns6 { the same }
//!   chain input, output (before connection tracking):
//!     meta mark != ours, tcp, saddr . sport . daddr . dport in conns4 -> drop; likewise conns6
//! }
//! ```
//! Messages are put together here, bytes out; of answers only error codes are read.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd, OwnedFd},
};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

use super::{Connection, MARK};
use crate::error::{Context, Error, Result, SysContext};

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_APPEND: u16 = 0x800;
const NLMSG_ERROR: u16 = 2;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
/// `NFNL_SUBSYS_NFTABLES`, as part of message types and in batches.
const NFTABLES: u16 = 10;

const NEWTABLE: u16 = 0;
const DELTABLE: u16 = 2;
const NEWCHAIN: u16 = 3;
const NEWRULE: u16 = 6;
const NEWSET: u16 = 9;
const NEWSETELEM: u16 = 12;

const NFPROTO_INET: u8 = 1;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
/// Packets for us, packets from us.
const HOOKS: [(&str, u32); 2] = [("input", 1), ("output", 3)];
/// Priority `raw`: a packet that is dropped here is none that connection tracking has seen.
const PRIORITY: i32 = -300;
/// The table goes when the socket that made it is closed (Linux 5.12).
const TABLE_OWNER: u32 = 2;

/// Attributes that are a list have elements of this type.
const LIST_ELEM: u16 = 1;
const NESTED: u16 = 0x8000;

/// Registers of four bytes; `NFT_REG32_00`.
const REG: u32 = 8;
const BASE_NETWORK: u32 = 1;
const BASE_TRANSPORT: u32 = 2;
const META_MARK: u32 = 3;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;
const CMP_EQ: u32 = 0;
const CMP_NEQ: u32 = 1;
const NF_ACCEPT: u32 = 1;
const NF_DROP: u32 = 0;

/// How many connections one transaction adds: it must fit the socket's buffer.
const PORTION: usize = 1000;

/// Attributes being put together.
#[derive(Clone, Debug, Default)]
struct Attrs(Vec<u8>);

impl Attrs {
    fn bytes(mut self, kind: u16, value: &[u8]) -> Self {
        self.0.extend((4 + value.len() as u16).to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn text(self, kind: u16, value: &str) -> Self {
        self.bytes(kind, &[value.as_bytes(), b"\0"].concat())
    }

    /// Numbers of nf_tables are big-endian.
    fn number(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    fn nest(self, kind: u16, inner: &Attrs) -> Self {
        self.bytes(kind | NESTED, &inner.0)
    }
}

/// `struct nlmsghdr`, `struct nfgenmsg`, attributes.
fn message(kind: u16, flags: u16, seq: u32, (family, resource): (u8, u16), attrs: &Attrs) -> Vec<u8> {
    let mut bytes = (20 + attrs.0.len() as u32).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    bytes.extend(seq.to_ne_bytes());
    bytes.extend(0u32.to_ne_bytes());
    bytes.extend([family, 0]);
    bytes.extend(resource.to_be_bytes());
    bytes.extend(&attrs.0);
    bytes
}

/// A transaction: all of it happens or nothing.
#[derive(Debug, Default)]
struct Batch(Vec<(u16, u16, Attrs)>);

impl Batch {
    fn add(&mut self, kind: u16, flags: u16, attrs: Attrs) {
        self.0.push((kind, flags, attrs));
    }

    /// The bytes of it.
    fn bytes(&self) -> Vec<u8> {
        let none = Attrs::default();
        let mut bytes = message(BATCH_BEGIN, 0, 0, (0, NFTABLES), &none);
        for (n, (kind, flags, attrs)) in self.0.iter().enumerate() {
            let kind = NFTABLES << 8 | kind;
            bytes.extend(message(kind, flags | NLM_F_ACK, n as u32 + 1, (NFPROTO_INET, 0), attrs));
        }
        bytes.extend(message(BATCH_END, 0, self.0.len() as u32 + 1, (0, NFTABLES), &none));
        bytes
    }

    fn commit(&self, netlink: &OwnedFd) -> Result<()> {
        let sent = sendto(netlink.as_raw_fd(), &self.bytes(), &NetlinkAddr::new(0, 0), MsgFlags::empty());
        sent.call("sendto(netlink)")?;
        // The kernel has answered every message before it returned; the batch itself it answers only to refuse.
        let mut left = self.0.len();
        let mut buffer = vec![0u8; 64 << 10];
        while left > 0 {
            let got = recv(netlink.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT).call("recv(netlink)")?;
            let mut rest = &buffer[..got];
            while let Some((kind, body)) = crate::sys::sock_diag::next_message(&mut rest) {
                let errno =
                    body.get(..4).and_then(|b| b.try_into().ok()).map_or(-libc::EIO, i32::from_ne_bytes);
                if kind == NLMSG_ERROR && errno != 0 {
                    return Err(Error::sys("nf_tables", errno.wrapping_neg()));
                }
                left = left.saturating_sub(1);
            }
        }
        Ok(())
    }
}

/// A table of ours and the socket it was made by.
#[derive(Debug)]
pub(super) struct Table {
    netlink: OwnedFd,
    name: String,
}

impl Table {
    /// Makes a table that drops the packets of `connections` in both directions. `owned` says that the kernel
    /// removes it when this value goes, however that happens; otherwise it stays.
    ///
    /// # Errors
    /// EPERM without CAP_NET_ADMIN; whatever a kernel without nf_tables says.
    pub(super) fn make(name: String, owned: bool, connections: &[Connection]) -> Result<Table> {
        let table = Table { netlink: open()?, name };
        table.skeleton(owned).commit(&table.netlink).during(|| format!("table {}", table.name))?;
        let filled =
            connections.chunks(PORTION).try_for_each(|some| table.elements(some).commit(&table.netlink));
        if let Err(e) = filled {
            if let Err(also) = remove(&table.name) {
                log::error!("{also}");
            }
            return Err(e.during(format!("table {}", table.name)));
        }
        Ok(table)
    }

    /// Makes a table that drops all packets without our mark, in both directions; `owned` as above.
    ///
    /// # Errors
    /// As above.
    pub(super) fn make_whole(name: String, owned: bool) -> Result<Table> {
        let table = Table { netlink: open()?, name };
        let mut batch = Batch::default();
        let flags = if owned { TABLE_OWNER } else { 0 };
        batch.add(NEWTABLE, NLM_F_CREATE | NLM_F_EXCL, table.of_table().number(2, flags));
        let steps = [meta(META_MARK), compare(CMP_EQ, &MARK.to_ne_bytes()), verdict(NF_ACCEPT)];
        let rule = steps.iter().fold(Attrs::default(), |all, step| all.nest(LIST_ELEM, step));
        for (chain, hook) in HOOKS {
            let place = Attrs::default().number(1, hook).number(2, PRIORITY.cast_unsigned());
            let attrs = table.of_table().text(3, chain).nest(4, &place).number(5, NF_DROP).text(7, "filter");
            batch.add(NEWCHAIN, NLM_F_CREATE | NLM_F_EXCL, attrs);
            let attrs = table.of_table().text(2, chain).nest(4, &rule);
            batch.add(NEWRULE, NLM_F_CREATE | NLM_F_APPEND, attrs);
        }
        batch.commit(&table.netlink).during(|| format!("table {}", table.name))?;
        Ok(table)
    }

    /// Removes it.
    pub(super) fn remove(&self) -> Result<()> {
        remove_by(&self.netlink, &self.name)
    }

    /// How it is called.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    fn of_table(&self) -> Attrs {
        Attrs::default().text(1, &self.name)
    }

    fn skeleton(&self, owned: bool) -> Batch {
        let mut batch = Batch::default();
        let flags = if owned { TABLE_OWNER } else { 0 };
        batch.add(NEWTABLE, NLM_F_CREATE | NLM_F_EXCL, self.of_table().number(2, flags));
        for (at, family) in [Family::V4, Family::V6].into_iter().enumerate() {
            let (key, length) = family.key();
            let set = self.of_table().text(2, family.set()).number(3, 0).number(4, key).number(5, length);
            batch.add(NEWSET, NLM_F_CREATE | NLM_F_EXCL, set.number(10, at as u32 + 1));
        }
        for (chain, hook) in HOOKS {
            let place = Attrs::default().number(1, hook).number(2, PRIORITY.cast_unsigned());
            let attrs = self.of_table().text(3, chain).nest(4, &place).number(5, NF_ACCEPT).text(7, "filter");
            batch.add(NEWCHAIN, NLM_F_CREATE | NLM_F_EXCL, attrs);
            for family in [Family::V4, Family::V6] {
                let attrs = self.of_table().text(2, chain).nest(4, &family.rule());
                batch.add(NEWRULE, NLM_F_CREATE | NLM_F_APPEND, attrs);
            }
        }
        batch
    }

    fn elements(&self, connections: &[Connection]) -> Batch {
        let mut batch = Batch::default();
        for family in [Family::V4, Family::V6] {
            let mut list = Attrs::default();
            for c in connections.iter().filter(|c| family == Family::of(c)) {
                for (from, to) in [(c.local, c.remote), (c.remote, c.local)] {
                    let key = Attrs::default().bytes(1, &[end(from), end(to)].concat());
                    list = list.nest(LIST_ELEM, &Attrs::default().nest(1, &key));
                    // An attribute holds less than 64 KiB.
                    if list.0.len() > 32 << 10 {
                        let part = std::mem::take(&mut list);
                        batch.add(
                            NEWSETELEM,
                            NLM_F_CREATE,
                            self.of_table().text(2, family.set()).nest(3, &part),
                        );
                    }
                }
            }
            if !list.0.is_empty() {
                batch.add(NEWSETELEM, NLM_F_CREATE, self.of_table().text(2, family.set()).nest(3, &list));
            }
        }
        batch
    }
}

/// Removes a table; that there is none is fine.
pub(super) fn remove(name: &str) -> Result<()> {
    remove_by(&open()?, name)
}

fn remove_by(netlink: &OwnedFd, name: &str) -> Result<()> {
    let mut batch = Batch::default();
    batch.add(DELTABLE, 0, Attrs::default().text(1, name));
    match batch.commit(netlink) {
        Err(e) if e.errno() == Some(libc::ENOENT) => Ok(()),
        other => other.during(|| format!("removing table {name}")),
    }
}

fn open() -> Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkNetFilter)
        .call("socket(NETLINK_NETFILTER)")
}

/// Address and port as a set's key has them: in network order, each filled up to words.
fn end(address: SocketAddr) -> Vec<u8> {
    let mut bytes = match address.ip() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    bytes.extend(address.port().to_be_bytes());
    bytes.extend([0; 2]);
    bytes
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Family {
    V4,
    V6,
}

impl Family {
    fn of(connection: &Connection) -> Self {
        if connection.local.is_ipv4() { Family::V4 } else { Family::V6 }
    }

    fn set(self) -> &'static str {
        if self == Family::V4 { "conns4" } else { "conns6" }
    }

    /// Type of the set's key, as the program nft reads it (`ipv4_addr . inet_service . ...`), and its length.
    fn key(self) -> (u32, u32) {
        let address = if self == Family::V4 { 7 } else { 8 };
        let service = 13;
        (address << 18 | service << 12 | address << 6 | service, 2 * (self.address() + 4))
    }

    /// Length of an address.
    fn address(self) -> u32 {
        if self == Family::V4 { 4 } else { 16 }
    }

    /// Expressions of the rule.
    fn rule(self) -> Attrs {
        let (proto, source, destination) = match self {
            Family::V4 => (NFPROTO_IPV4, 12, 16),
            Family::V6 => (NFPROTO_IPV6, 8, 24),
        };
        let words = self.address() / 4;
        let steps = [
            meta(META_MARK),
            compare(CMP_NEQ, &MARK.to_ne_bytes()),
            meta(META_NFPROTO),
            compare(CMP_EQ, &[proto]),
            meta(META_L4PROTO),
            compare(CMP_EQ, &[libc::IPPROTO_TCP as u8]),
            payload(REG, BASE_NETWORK, source, self.address()),
            payload(REG + words, BASE_TRANSPORT, 0, 2),
            payload(REG + words + 1, BASE_NETWORK, destination, self.address()),
            payload(REG + 2 * words + 1, BASE_TRANSPORT, 2, 2),
            expression("lookup", &Attrs::default().text(1, self.set()).number(2, REG)),
            verdict(NF_DROP),
        ];
        steps.iter().fold(Attrs::default(), |all, step| all.nest(LIST_ELEM, step))
    }
}

fn expression(name: &str, data: &Attrs) -> Attrs {
    Attrs::default().text(1, name).nest(2, data)
}

fn meta(key: u32) -> Attrs {
    expression("meta", &Attrs::default().number(1, REG).number(2, key))
}

fn compare(how: u32, with: &[u8]) -> Attrs {
    let value = Attrs::default().bytes(1, with);
    expression("cmp", &Attrs::default().number(1, REG).number(2, how).nest(3, &value))
}

fn payload(register: u32, base: u32, offset: u32, length: u32) -> Attrs {
    let data = Attrs::default().number(1, register).number(2, base).number(3, offset).number(4, length);
    expression("payload", &data)
}

fn verdict(code: u32) -> Attrs {
    let verdict = Attrs::default().nest(2, &Attrs::default().number(1, code));
    expression("immediate", &Attrs::default().number(1, 0).nest(2, &verdict))
}
