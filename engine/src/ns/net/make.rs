//! Devices made inside of new namespaces.
//!
//! A device is made, gets what belongs to it, becomes a port of its master, and comes up when all devices are there:
//! nothing is sent before its settings say how.

use std::os::fd::BorrowedFd;

use rcriu_images::pb;

use super::{
    link::{self, HEAD, RTM_NEWLINK, RTM_SETLINK, Told},
    netlink::{Body, CREATE, EXCL, NESTED, Netlink},
    nets::{Net, Space, made_in},
    plan::{At, How, Link},
    sysctl::{self, When},
    tun,
};
use crate::error::{Context, Error, Result};

/// Flags that somebody sets: up, debug, notrailers, noarp, promisc, allmulti, multicast, dynamic.
const SETTABLE: u32 = 0x1 | 0x4 | 0x20 | 0x80 | 0x100 | 0x200 | 0x1000 | 0x8000;
const VETH_INFO_PEER: u16 = 1;
/// `IFLA_BR_*` that can be set, but for timers and what needs VLANs.
const BRIDGE: [u16; 30] = [
    1, 2, 3, 4, 5, 6, 9, 20, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 42, 43, 44,
    8, 46,
];
/// `IFLA_BRPORT_*` that can be set.
const PORT: [u16; 19] = [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 25, 27, 28, 29, 30, 31, 32, 33, 38];
/// In IFLA_AF_SPEC: AF_INET6, and how addresses are made from the device's own.
const INET6: u16 = libc::AF_INET6 as u16;
const ADDR_GEN_MODE: u16 = 8;

/// `struct ifinfomsg`.
pub(super) fn head(index: u32, flags: u32, change: u32) -> [u8; HEAD] {
    let mut head = [0; HEAD];
    for (at, value) in [(4, index), (8, flags), (12, change)] {
        head[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    }
    head
}

/// What is said of any device at its making.
pub(super) fn common(link: &Link, index: u32) -> Body {
    let entry = &link.entry;
    let body = Body::new(&head(index, 0, 0)).text(link::IFLA_IFNAME, &entry.name);
    let body = if entry.mtu == 0 { body } else { body.word(link::IFLA_MTU, entry.mtu) };
    let body = body.maybe(link::IFLA_ADDRESS, entry.address.as_deref().filter(|a| !a.is_empty()));
    let told = link.told().map(|t| t.attributes);
    [link::IFLA_NUM_TX_QUEUES, link::IFLA_NUM_RX_QUEUES, link::IFLA_TXQLEN]
        .into_iter()
        .fold(body, |body, kind| body.maybe(kind, told.and_then(|t| t.get(kind)).filter(|v| v.len() == 4)))
}

fn info(kind: &str, data: &Body) -> Body {
    Body::default().text(link::INFO_KIND, kind).nest(link::INFO_DATA | NESTED, data)
}

fn create(netlink: &mut Netlink, body: &Body) -> Result<()> {
    netlink.request("RTM_NEWLINK", RTM_NEWLINK, CREATE | EXCL, &body.0)
}

/// Parameters of a macvlan.
pub(super) fn macvlan(entry: &pb::MacvlanLinkEntry) -> Body {
    let flags = entry.flags.map(|f| (f as u16).to_ne_bytes());
    let data = Body::default().word(1, entry.mode).maybe(2, flags.as_ref().map(|f| &f[..]));
    info("macvlan", &data)
}

fn sit(entry: &pb::SitEntry) -> Body {
    let words = |list: &[u32]| list.iter().flat_map(|w| w.to_ne_bytes()).collect::<Vec<u8>>();
    let address = |list: &[u32]| Some(words(list)).filter(|b| !b.is_empty());
    let byte = |value: Option<u32>| value.map(|v| vec![v as u8]);
    let half = |value: Option<u32>| value.map(|v| (v as u16).to_ne_bytes().to_vec());
    let prefix = entry.rd_prefixlen.is_some();
    let relay = prefix && entry.relay_prefixlen.is_some();
    let all = [
        (1, entry.link.map(|l| l.to_ne_bytes().to_vec())),
        (2, address(&entry.local)),
        (3, address(&entry.remote)),
        (4, byte(entry.ttl)),
        (5, byte(entry.tos)),
        (8, half(entry.flags)),
        (9, byte(entry.proto)),
        (10, entry.pmtudisc.filter(|on| *on).map(|_| vec![1])),
        (15, half(entry.encap_type)),
        (16, half(entry.encap_flags)),
        (17, half(entry.encap_sport)),
        (18, half(entry.encap_dport)),
        (13, half(entry.rd_prefixlen)),
        (11, Some(words(&entry.rd_prefix)).filter(|_| prefix)),
        (14, half(entry.relay_prefixlen).filter(|_| relay)),
        (12, Some(words(&entry.relay_prefix)).filter(|_| relay)),
    ];
    let data = all.iter().fold(Body::default(), |body, (kind, value)| body.maybe(*kind, value.as_deref()));
    info("sit", &data)
}

/// Makes all devices; they stay down.
pub(super) fn all(spaces: &mut [Space<'_>]) -> Result<()> {
    let mut made = Made(Vec::new());
    loop {
        let before = made.0.len();
        for at in 0..spaces.len() {
            let net = spaces[at].net;
            for link in &net.links {
                let me = At { net: net.id, index: link.entry.ifindex };
                if made.has(me) || !link.upon().is_none_or(|lower| made.has(lower)) {
                    continue;
                }
                one(spaces, at, link)?;
                made.0.push(me);
                if let How::Pair(peer) = link.how {
                    made.0.push(peer);
                    let there = place(spaces, peer.net)?;
                    let net = spaces[there].net;
                    let other = net.links.iter().find(|other| other.entry.ifindex == peer.index);
                    let other = other.ok_or_else(|| Error::bug("a pair without its peer"))?;
                    spaces[there].within(|net, netlink| settle(net, netlink, other))?;
                }
            }
        }
        if made.0.len() == before {
            break;
        }
    }
    for space in spaces {
        let net = space.net;
        if net.links.iter().any(|link| !made.has(At { net: net.id, index: link.entry.ifindex })) {
            return Err(Error::image(format!(
                "netdev-{}.img: devices are above each other in a ring",
                net.id
            )));
        }
        // All masters are there now.
        for link in &net.links {
            if let Some(master) = link.entry.master {
                join(&mut space.netlink, link, master)
                    .during(|| format!("network device {}", link.entry.name))?;
            }
        }
    }
    Ok(())
}

/// What is there already.
struct Made(Vec<At>);

impl Made {
    fn has(&self, at: At) -> bool {
        self.0.contains(&at)
    }
}

/// Where namespace `id` is in the list.
fn place(spaces: &[Space<'_>], id: u32) -> Result<usize> {
    let found = spaces.iter().position(|space| space.net.id == id);
    found.ok_or_else(|| {
        Error::unsupported(format!("a device ends in network namespace {id}, which is not made"))
            .remedy("restore without --external net[]")
    })
}

/// Makes a device of the namespace at `at`, and the other end of a pair.
fn one(spaces: &mut [Space<'_>], at: usize, link: &Link) -> Result<()> {
    let (id, there) = (spaces[at].net.id, spaces[at].file);
    match link.how {
        How::Pair(peer) => {
            let far = &spaces[place(spaces, peer.net)?];
            let file = (peer.net != id).then_some(far.file);
            let other = far.net.links.iter().find(|other| other.entry.ifindex == peer.index);
            let other = other.ok_or_else(|| Error::bug("a pair without its peer"))?;
            spaces[at].within(|_, netlink| pair(netlink, link, other, file))?;
        }
        _ => {
            // It is asked for where the kernel looks for what is below it.
            let lower = link.upon().filter(|lower| lower.net != id);
            let from = lower.map_or(Ok(at), |lower| place(spaces, lower.net))?;
            let there = (from != at).then_some(there);
            spaces[from].within(|_, netlink| alone(netlink, link, there))?;
        }
    }
    spaces[at].within(|net, netlink| settle(net, netlink, link))
}

/// Makes a pair, whose other end is to be in namespace `far`, if that is another.
fn pair(netlink: &mut Netlink, link: &Link, other: &Link, far: Option<BorrowedFd<'_>>) -> Result<()> {
    let peer = common(other, other.entry.ifindex);
    let peer = match far {
        Some(far) => made_in(peer, far),
        None => peer,
    };
    let info = info("veth", &Body::default().nest(VETH_INFO_PEER, &peer));
    create(netlink, &common(link, link.entry.ifindex).nest(link::IFLA_LINKINFO, &info))
        .during(|| format!("network device {}", link.entry.name))
}

/// Makes a device that is no end of a pair, in namespace `there`, if that is another.
fn alone(netlink: &mut Netlink, link: &Link, there: Option<BorrowedFd<'_>>) -> Result<()> {
    let entry = &link.entry;
    let body = common(link, entry.ifindex);
    let body = match there {
        Some(there) => made_in(body, there),
        None => body,
    };
    let made = match &link.how {
        How::Loopback | How::Outside(_) | How::Pair(_) => Ok(()),
        How::Tun => {
            let tun = entry.tun.as_ref().ok_or_else(|| Error::bug("a tun device without its entry"))?;
            tun::make(&entry.name, entry.ifindex, tun)
        }
        How::Bridge => {
            create(netlink, &body.nest(link::IFLA_LINKINFO, &Body::default().text(link::INFO_KIND, "bridge")))
        }
        How::Macvlan(lower) => {
            let entry = entry.macvlan.as_ref().ok_or_else(|| Error::bug("a macvlan without its entry"))?;
            let body = body.word(link::IFLA_LINK, lower.index);
            create(netlink, &body.nest(link::IFLA_LINKINFO, &macvlan(entry)))
        }
        How::Sit => {
            let entry = entry.sit.as_ref().ok_or_else(|| Error::bug("a sit device without its entry"))?;
            create(netlink, &body.nest(link::IFLA_LINKINFO, &sit(entry)))
        }
        How::ByMessage(_) => {
            let told = link.told().ok_or_else(|| Error::bug("a device without its message"))?;
            let body = body.maybe(link::IFLA_LINK, told.attributes.get(link::IFLA_LINK));
            let info = Body::default()
                .text(link::INFO_KIND, told.kind())
                .maybe(link::INFO_DATA | NESTED, told.info().get(link::INFO_DATA));
            create(netlink, &body.nest(link::IFLA_LINKINFO, &info))
        }
    };
    made.during(|| format!("network device {}", entry.name))
}

/// Gives a device that is there what belongs to it.
fn settle(net: &Net, netlink: &mut Netlink, link: &Link) -> Result<()> {
    settle_one(net, netlink, link).during(|| format!("network device {}", link.entry.name))
}

fn settle_one(net: &Net, netlink: &mut Netlink, link: &Link) -> Result<()> {
    let entry = &link.entry;
    if matches!(link.how, How::Loopback | How::Outside(_) | How::Tun) {
        // By its name: only that is sure of what comes from outside.
        let body = common(link, 0);
        netlink.request("RTM_SETLINK", RTM_SETLINK, 0, &strip_queues(&body).0)?;
    }
    let messages = link::all(netlink)?;
    let now = messages.iter().filter_map(Told::of).find(|now| now.name == entry.name);
    let now = now.ok_or_else(|| Error::host("it is not there"))?;
    if now.index != entry.ifindex {
        return Err(Error::host(format!("it has number {} instead of {}", now.index, entry.ifindex)));
    }
    if let Some(then) = link.told() {
        again(netlink, link, now, then)?;
    }
    let conf4 = match entry.conf4.is_empty() {
        true => sysctl::of_numbers(&entry.conf),
        false => entry.conf4.clone(),
    };
    sysctl::IPV4.write(&entry.name, &conf4, When::Before, net.weak)?;
    sysctl::IPV6.write(&entry.name, &entry.conf6, When::Before, net.weak)
}

/// Without the number of queues, which is of the making.
fn strip_queues(body: &Body) -> Body {
    let attributes = super::netlink::Attributes(body.0.get(HEAD..).unwrap_or(&[]));
    let keep = attributes.filter(|(k, _)| ![link::IFLA_NUM_TX_QUEUES, link::IFLA_NUM_RX_QUEUES].contains(k));
    keep.fold(Body::new(body.0.get(..HEAD).unwrap_or(&[])), |all, (kind, value)| all.bytes(kind, value))
}

/// Sets what entries have no room for, where it differs.
fn again(netlink: &mut Netlink, link: &Link, now: Told<'_>, then: Told<'_>) -> Result<()> {
    let mut body = Body::new(&head(now.index, 0, 0));
    let empty = body.0.len();
    for kind in [link::IFLA_IFALIAS, link::IFLA_GROUP] {
        let value = then.attributes.get(kind);
        body = body.maybe(kind, value.filter(|v| now.attributes.get(kind) != Some(v)));
    }
    let mode = |t: Told<'_>| t.attributes.inside(link::IFLA_AF_SPEC).inside(INET6).byte(ADDR_GEN_MODE);
    // The kernel sets 2 and 3 (stable-privacy, random) together with the secret only.
    if let Some(value) = mode(then).filter(|v| mode(now).is_some_and(|n| n != *v)) {
        let inet6 = Body::default().bytes(ADDR_GEN_MODE, &[value]);
        body = body.nest(link::IFLA_AF_SPEC, &Body::default().nest(INET6, &inet6));
    }
    if body.0.len() > empty {
        netlink.request("RTM_SETLINK", RTM_SETLINK, 0, &body.0)?;
    }
    for name in then.other_names().filter(|name| now.other_names().all(|has| has != *name)) {
        let names = Body::default().bytes(link::IFLA_ALT_IFNAME, name);
        let body = Body::new(&head(now.index, 0, 0)).nest(link::IFLA_PROP_LIST | NESTED, &names);
        netlink.request("RTM_NEWLINKPROP", link::RTM_NEWLINKPROP, CREATE | EXCL, &body.0)?;
    }
    if link.how == How::Bridge {
        let (now_data, then_data) = (now.info().inside(link::INFO_DATA), then.info().inside(link::INFO_DATA));
        let data = differing(&BRIDGE, now_data, then_data);
        if !data.0.is_empty() {
            let info = Body::default().text(link::INFO_KIND, "bridge").nest(link::INFO_DATA | NESTED, &data);
            let body = Body::new(&head(now.index, 0, 0)).nest(link::IFLA_LINKINFO, &info);
            netlink.request("RTM_NEWLINK", RTM_NEWLINK, 0, &body.0)?;
        }
    }
    Ok(())
}

/// Those of `kinds` that differ between now and then.
fn differing(
    kinds: &[u16],
    now: super::netlink::Attributes<'_>,
    then: super::netlink::Attributes<'_>,
) -> Body {
    kinds.iter().fold(Body::default(), |body, kind| {
        let value = then.get(*kind);
        body.maybe(*kind, value.filter(|v| now.get(*kind).is_some_and(|n| n != *v)))
    })
}

/// Makes a device a port of its master, as it was.
fn join(netlink: &mut Netlink, link: &Link, master: u32) -> Result<()> {
    let index = link.entry.ifindex;
    let body = Body::new(&head(index, 0, 0)).word(link::IFLA_MASTER, master);
    netlink.request("RTM_SETLINK", RTM_SETLINK, 0, &body.0)?;
    let Some(then) = link.told().filter(|t| t.info().text(link::INFO_SLAVE_KIND) == Some("bridge")) else {
        return Ok(());
    };
    let messages = link::all(netlink)?;
    let Some(now) = messages.iter().filter_map(Told::of).find(|now| now.index == index) else {
        return Ok(());
    };
    let (now, then) = (now.info().inside(link::INFO_SLAVE_DATA), then.info().inside(link::INFO_SLAVE_DATA));
    let data = differing(&PORT, now, then);
    if data.0.is_empty() {
        return Ok(());
    }
    let info =
        Body::default().text(link::INFO_SLAVE_KIND, "bridge").nest(link::INFO_SLAVE_DATA | NESTED, &data);
    let body = Body::new(&head(index, 0, 0)).nest(link::IFLA_LINKINFO, &info);
    netlink.request("RTM_NEWLINK", RTM_NEWLINK, 0, &body.0)
}

/// Sets the flags of all devices: those that were up come up.
pub(super) fn up(net: &Net, netlink: &mut Netlink) -> Result<()> {
    for link in &net.links {
        let body = Body::new(&head(link.entry.ifindex, link.entry.flags & SETTABLE, SETTABLE));
        let set = netlink.request("RTM_SETLINK", RTM_SETLINK, 0, &body.0);
        set.during(|| format!("network device {}", link.entry.name))?;
    }
    Ok(())
}

/// Sets what had to wait until devices have all of their addresses.
pub(super) fn finish(net: &Net) -> Result<()> {
    for link in &net.links {
        sysctl::IPV6
            .write(&link.entry.name, &link.entry.conf6, When::After, net.weak)
            .during(|| format!("network device {}", link.entry.name))?;
    }
    Ok(())
}
