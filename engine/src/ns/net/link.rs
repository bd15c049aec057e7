//! Devices (`netdev-ID.img`): what the kernel tells of them, as entries of the image.
//!
//! The image has room for few kinds and few attributes. Messages of the kernel about all devices go into
//! `rcriu-netns-ID.img` besides, from which a restore here takes what entries cannot say; CRIU restores devices
//! without it, and refuses those whose kind it does not know.

use rcriu_images::{ImageKind, pb};

use super::{
    DumpNet,
    netlink::{Attributes, Body, Message, Netlink, word},
    sysctl, tun,
};
use crate::{
    error::{Context, Error, Result},
    options::External,
};

pub(super) const RTM_NEWLINK: u16 = 16;
pub(super) const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
pub(super) const RTM_SETLINK: u16 = 19;
const RTM_GETQDISC: u16 = 38;
const RTM_NEWNSID: u16 = 88;
const RTM_GETNSID: u16 = 90;
pub(super) const RTM_NEWLINKPROP: u16 = 108;
/// Bytes of `struct ifinfomsg`.
pub(super) const HEAD: usize = 16;

pub(super) const IFLA_ADDRESS: u16 = 1;
pub(super) const IFLA_IFNAME: u16 = 3;
pub(super) const IFLA_MTU: u16 = 4;
pub(super) const IFLA_LINK: u16 = 5;
pub(super) const IFLA_MASTER: u16 = 10;
pub(super) const IFLA_TXQLEN: u16 = 13;
pub(super) const IFLA_LINKINFO: u16 = 18;
pub(super) const IFLA_IFALIAS: u16 = 20;
pub(super) const IFLA_AF_SPEC: u16 = 26;
pub(super) const IFLA_GROUP: u16 = 27;
pub(super) const IFLA_NET_NS_FD: u16 = 28;
pub(super) const IFLA_NUM_TX_QUEUES: u16 = 31;
pub(super) const IFLA_NUM_RX_QUEUES: u16 = 32;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_XDP: u16 = 43;
pub(super) const IFLA_NEW_IFINDEX: u16 = 49;
pub(super) const IFLA_PROP_LIST: u16 = 52;
pub(super) const IFLA_ALT_IFNAME: u16 = 53;
pub(super) const INFO_KIND: u16 = 1;
pub(super) const INFO_DATA: u16 = 2;
pub(super) const INFO_SLAVE_KIND: u16 = 4;
pub(super) const INFO_SLAVE_DATA: u16 = 5;
const NETNSA_NSID: u16 = 1;
const NETNSA_FD: u16 = 3;
const BR_VLAN_FILTERING: u16 = 7;
/// `ARPHRD_LOOPBACK`.
const LOOPBACK: u16 = 772;
/// A macvlan that lists its sources (`MACVLAN_MODE_SOURCE`).
const MODE_SOURCE: u32 = 16;

/// Devices that some drivers make in every namespace: their names and kinds.
const BORN: [(&str, &str); 9] = [
    ("sit0", "sit"),
    ("gre0", "gre"),
    ("gretap0", "gretap"),
    ("erspan0", "erspan"),
    ("tunl0", "ipip"),
    ("ip6tnl0", "ip6tnl"),
    ("ip_vti0", "vti"),
    ("ip6_vti0", "vti6"),
    ("ip6gre0", "ip6gre"),
];

/// Kinds the format has no word for, of which the kernel's message says all that makes them.
const BY_MESSAGE: [&str; 3] = ["dummy", "vlan", "ipvlan"];

/// Whether the kernel's message about a device of this kind says all that makes it.
pub(super) fn is_by_message(kind: &str) -> bool {
    BY_MESSAGE.contains(&kind)
}

/// A device as the kernel tells it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Told<'a> {
    pub(super) index: u32,
    pub(super) flags: u32,
    hardware: u16,
    pub(super) name: &'a str,
    pub(super) attributes: Attributes<'a>,
}

impl<'a> Told<'a> {
    /// `None` if the message is none about a device.
    pub(super) fn of(message: &'a Message) -> Option<Told<'a>> {
        let head = message.head::<HEAD>().filter(|_| message.kind() == RTM_NEWLINK)?;
        let attributes = message.attributes(HEAD);
        Some(Told {
            index: word(&head[4..])?,
            flags: word(&head[8..])?,
            hardware: u16::from_ne_bytes([head[2], head[3]]),
            name: attributes.text(IFLA_IFNAME)?,
            attributes,
        })
    }

    pub(super) fn info(self) -> Attributes<'a> {
        self.attributes.inside(IFLA_LINKINFO)
    }

    /// Its alternative names (Linux 5.5).
    pub(super) fn other_names(self) -> impl Iterator<Item = &'a [u8]> {
        self.attributes
            .inside(IFLA_PROP_LIST)
            .filter(|(kind, _)| *kind == IFLA_ALT_IFNAME)
            .map(|(_, name)| name)
    }

    /// The kind of device; empty for hardware.
    pub(super) fn kind(self) -> &'a str {
        self.info().text(INFO_KIND).unwrap_or("")
    }
}

/// All devices of the namespace this thread is in.
pub(super) fn all(netlink: &mut Netlink) -> Result<Vec<Message>> {
    // Of no family in particular: others tell less.
    let mut found = netlink.dump("RTM_GETLINK", RTM_GETLINK, &Body::new(&[0; HEAD]))?;
    found.retain(|m| Told::of(m).is_some());
    Ok(found)
}

/// Writes the devices of the namespace this thread is in; gives the kernel's messages about them, and what numbers
/// other namespaces have in this one.
pub(super) fn dump(cx: &DumpNet<'_>, netlink: &mut Netlink) -> Result<(Vec<Message>, Vec<pb::NetnsId>)> {
    // With the first listing, namespaces of peers get their numbers.
    all(netlink)?;
    let ids = namespaces(cx, netlink)?;
    let messages = all(netlink)?;
    traffic(netlink, &messages)?;
    let mut out = cx.images.writer(ImageKind::Netdev, cx.id.into());
    for told in messages.iter().filter_map(Told::of) {
        if let Some(entry) = entry(cx, told, &ids).during(|| format!("network device {}", told.name))? {
            out.write(&entry)?;
        }
    }
    out.finish()?;
    Ok((messages, ids))
}

/// The numbers by which this namespace knows others of the tree.
fn namespaces(cx: &DumpNet<'_>, netlink: &mut Netlink) -> Result<Vec<pb::NetnsId>> {
    use std::os::fd::AsRawFd;
    let mut ids = Vec::new();
    for (id, file) in cx.others {
        let body = Body::new(&[0; 4]).word(NETNSA_FD, file.as_raw_fd().cast_unsigned());
        let answer = netlink.ask("RTM_GETNSID", RTM_GETNSID, 0, &body.0)?;
        let number = answer.first().and_then(|m| m.attributes(1).word(NETNSA_NSID));
        if let Some(number) = number.map(u32::cast_signed).filter(|n| *n >= 0) {
            ids.push(pb::NetnsId { target_ns_id: *id, netnsid_value: number });
        }
    }
    Ok(ids)
}

/// Gives the namespace of descriptor `other` this number, in that of the netlink socket.
pub(super) fn set_number(netlink: &mut Netlink, other: u32, number: i32) -> Result<()> {
    let body = Body::new(&[0; 4]).word(NETNSA_NSID, number.cast_unsigned()).word(NETNSA_FD, other);
    netlink.request("RTM_NEWNSID", RTM_NEWNSID, 0, &body.0)
}

/// Refuses what somebody has set up with tc(8).
fn traffic(netlink: &mut Netlink, links: &[Message]) -> Result<()> {
    // struct tcmsg { family, pad[3], ifindex, handle, parent, info }: what the kernel sets up has no handle.
    let Ok(found) = netlink.dump("RTM_GETQDISC", RTM_GETQDISC, &Body::new(&[0; 20])) else { return Ok(()) };
    for message in found {
        let Some(head) = message.head::<20>() else { continue };
        if word(&head[8..]) == Some(0) {
            continue;
        }
        let index = word(&head[4..]).unwrap_or(0);
        let device = links.iter().filter_map(Told::of).find(|l| l.index == index).map_or("?", |l| l.name);
        let kind = message.attributes(20).text(1).unwrap_or("?");
        return Err(Error::unsupported(format!("traffic control ({kind}) is not supported"))
            .remedy(format!(
                "remove it with tc qdisc del dev {device}, and set it up again after the restore"
            ))
            .during(format!("network device {device}")));
    }
    Ok(())
}

/// Refuses a device.
fn unsupported(cx: &DumpNet<'_>, why: impl Into<String>) -> Error {
    let inode = cx.inode.map_or("INODE".to_owned(), |ino| ino.to_string());
    Error::unsupported(why).remedy(format!(
        "remove the device, or leave it out with --external netdev[NAME]:ORIGINAL to move it in again on restore, \
         or keep the whole namespace with --external net[{inode}]:NAME"
    ))
}

fn entry(cx: &DumpNet<'_>, told: Told<'_>, ids: &[pb::NetnsId]) -> Result<Option<pb::NetDeviceEntry>> {
    use pb::NdType as Nd;
    let kind = told.kind();
    if BORN.contains(&(told.name, kind)) {
        return match told.flags & libc::IFF_UP as u32 {
            0 => Ok(None),
            _ => Err(unsupported(cx, format!("the {kind} device that the driver makes itself is in use"))),
        };
    }
    let moved = |e: &External| matches!(e, External::Netdev { name, .. } if name == told.name);
    let external = cx.opts.common.external.iter().any(moved);
    let kind = match kind {
        _ if told.hardware == LOOPBACK => Nd::Loopback,
        "veth" => Nd::Veth,
        _ if external => Nd::Extlink,
        "tun" => Nd::Tun,
        "bridge" => Nd::Bridge,
        "macvlan" => Nd::Macvlan,
        "sit" => Nd::Sit,
        kind if is_by_message(kind) => Nd::Extlink,
        "" => return Err(unsupported(cx, "hardware in a namespace of the tree's own is not supported")),
        kind => return Err(unsupported(cx, format!("devices of kind {kind} are not supported"))),
    };
    // IFLA_XDP_ATTACHED
    if told.attributes.inside(IFLA_XDP).byte(2).is_some_and(|a| a != 0) {
        return Err(unsupported(cx, "an XDP program is attached to it, which is not supported"));
    }
    let lower = told.attributes.word(IFLA_LINK);
    let number = told.attributes.word(IFLA_LINK_NETNSID).map(u32::cast_signed);
    let peer_nsid = match number {
        None => Some(cx.id),
        Some(number) => ids.iter().find(|id| id.netnsid_value == number).map(|id| id.target_ns_id),
    };
    if kind == Nd::Extlink && !external && peer_nsid.is_none() {
        return Err(unsupported(cx, format!("the device below this {} is outside", told.kind())));
    }
    let address = told.attributes.get(IFLA_ADDRESS).filter(|_| kind != Nd::Loopback);
    let data = told.info().inside(INFO_DATA);
    if kind == Nd::Bridge && data.byte(BR_VLAN_FILTERING).is_some_and(|on| on != 0) {
        return Err(unsupported(cx, "a bridge that filters by VLAN is not supported"));
    }
    Ok(Some(pb::NetDeviceEntry {
        r#type: kind.into(),
        ifindex: told.index,
        mtu: told.attributes.word(IFLA_MTU).unwrap_or(0),
        flags: told.flags,
        name: told.name.to_owned(),
        tun: if kind == Nd::Tun { Some(tun::dump(cx, told)?) } else { None },
        address: address.map(<[u8]>::to_vec),
        conf4: sysctl::IPV4.read(told.name)?,
        conf6: sysctl::IPV6.read(told.name)?,
        macvlan: if kind == Nd::Macvlan { Some(macvlan(cx, data)?) } else { None },
        peer_ifindex: Some(lower.unwrap_or(told.index)),
        peer_nsid,
        master: told.attributes.word(IFLA_MASTER),
        sit: (kind == Nd::Sit).then(|| sit(data)),
        ..Default::default()
    }))
}

fn macvlan(cx: &DumpNet<'_>, data: Attributes<'_>) -> Result<pb::MacvlanLinkEntry> {
    let mode = data.word(1).ok_or_else(|| Error::host("the kernel does not tell its mode"))?;
    if mode == MODE_SOURCE {
        return Err(unsupported(cx, "a macvlan of mode source is not supported"));
    }
    Ok(pb::MacvlanLinkEntry { mode, flags: data.half(2).map(u32::from) })
}

/// Attributes `IFLA_IPTUN_*` of a tunnel; addresses stay in network order.
fn sit(data: Attributes<'_>) -> pb::SitEntry {
    let address = |kind| data.word(kind).filter(|a| *a != 0).into_iter().collect();
    let (byte, half) = (|kind| data.byte(kind).map(u32::from), |kind| data.half(kind).map(u32::from));
    let mut entry = pb::SitEntry {
        link: data.word(1),
        local: address(2),
        remote: address(3),
        ttl: byte(4),
        tos: byte(5),
        flags: half(8),
        proto: byte(9),
        pmtudisc: byte(10).filter(|on| *on != 0).map(|_| true),
        encap_type: half(15),
        encap_flags: half(16),
        encap_sport: half(17),
        encap_dport: half(18),
        ..Default::default()
    };
    let words = |kind| data.get(kind).map(|b| b.chunks_exact(4).filter_map(word).collect::<Vec<_>>());
    if let (Some(length), Some(prefix)) = (half(13).filter(|l| *l != 0), words(11)) {
        (entry.rd_prefixlen, entry.rd_prefix) = (Some(length), prefix);
        if let (Some(length), Some(prefix)) = (half(14).filter(|l| *l != 0), words(12)) {
            (entry.relay_prefixlen, entry.relay_prefix) = (Some(length), prefix);
        }
    }
    entry
}
