//! Routes (`route-ID.img`, `route6-ID.img`): messages RTM_NEWROUTE, as `ip route save` writes them.
//!
//! That program saves table main; its restore takes routes of any table. So table main comes first, as it does, and
//! those of other tables follow, without what the kernel makes itself in table local.
//!
//! Devices that come up and addresses bring routes of the kernel's own making, which a task may have removed; a
//! restore ends with exactly those of the images.

use rcriu_images::ImageDir;

use super::{
    netlink::{APPEND, Attributes, Body, CREATE, Message, Netlink},
    saved::{ROUTES, ROUTES6},
};
use crate::error::{Context, Error, Result};

const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
const RTM_GETNEXTHOP: u16 = 106;
/// Bytes of `struct rtmsg`, and in it: family, table, protocol, flags.
const HEAD: usize = 12;
const FLAGS: std::ops::Range<usize> = 8..12;
/// Bytes of `struct rtnexthop`, and where its flags are.
const NEXTHOP: usize = 8;
const RTA_DST: u16 = 1;
const RTA_GATEWAY: u16 = 5;
const RTA_PREFSRC: u16 = 7;
const RTA_MULTIPATH: u16 = 9;
const RTA_CACHEINFO: u16 = 12;
const RTA_TABLE: u16 = 15;
const RTA_VIA: u16 = 18;
const RTA_EXPIRES: u16 = 23;
const RTA_NH_ID: u16 = 30;
/// Found by somebody's packet.
const RTM_F_CLONED: u32 = 0x200;
/// `RTNH_F_PERVASIVE`, `RTNH_F_ONLINK`: flags that are asked for; all others tell how things are.
const ASKED: u32 = 2 | 4;
const MAIN: u32 = 254;
const LOCAL: u32 = 255;
const RTPROT_KERNEL: u8 = 2;
/// Clock ticks of a second, in which the kernel tells times.
const HERTZ: u32 = 100;

fn table(route: &Message) -> u32 {
    let short = route.head::<HEAD>().map_or(0, |head| head[4].into());
    route.attributes(HEAD).word(RTA_TABLE).unwrap_or(short)
}

fn flags(route: &Message) -> u32 {
    route.head::<HEAD>().and_then(|h| super::netlink::word(&h[FLAGS])).unwrap_or(0)
}

fn family(route: &Message) -> u8 {
    route.body().first().copied().unwrap_or(0)
}

/// What messages call it.
fn name(route: &Message) -> String {
    let length = route.body().get(1).copied().unwrap_or(0);
    let to = match route.attributes(HEAD).get(RTA_DST) {
        Some(b) if b.len() == 4 => <[u8; 4]>::try_from(b).map(|b| std::net::Ipv4Addr::from(b).to_string()),
        Some(b) => <[u8; 16]>::try_from(b).map(|b| std::net::Ipv6Addr::from(b).to_string()),
        None => Ok("default".to_owned()),
    };
    format!("route {}/{length} of table {}", to.unwrap_or_default(), table(route))
}

/// All of a family that are not the kernel's own, in the order of the images.
fn all(netlink: &mut Netlink, family: i32) -> Result<Vec<Message>> {
    let mut head = [0; HEAD];
    head[0] = family as u8;
    let mut found = netlink.dump("RTM_GETROUTE", RTM_GETROUTE, &Body::new(&head))?;
    // A kernel without the family lists all of them.
    found.retain(|m| m.body().first() == Some(&(family as u8)) && flags(m) & RTM_F_CLONED == 0);
    // Table 0 is none: older kernels list what answers when IPv6 finds no route.
    let own = |m: &Message| match table(m) {
        LOCAL => m.body().get(5) == Some(&RTPROT_KERNEL),
        other => other == 0,
    };
    found.retain(|m| !own(m));
    found.sort_by_key(|m| table(m) != MAIN);
    Ok(found)
}

/// Writes those of the namespace this thread is in.
///
/// # Errors
/// Nexthops that are objects of their own (`ip nexthop`), which routes refer to by number.
pub(super) fn dump(netlink: &mut Netlink, images: &ImageDir, id: u32) -> Result<()> {
    // struct nhmsg; before Linux 5.3 the kernel has none.
    let objects = netlink.dump("RTM_GETNEXTHOP", RTM_GETNEXTHOP, &Body::new(&[0; 8]));
    if objects.is_ok_and(|list| !list.is_empty()) {
        return Err(Error::unsupported("nexthop objects of the routing tables are not supported")
            .remedy("give routes their gateways themselves, without nexthop objects (ip nexthop)"));
    }
    let four: Vec<_> = all(netlink, libc::AF_INET)?.into_iter().map(without_state).collect();
    ROUTES.write(images, id, &four)?;
    if std::path::Path::new("/proc/sys/net/ipv6").exists() {
        let six: Vec<_> = all(netlink, libc::AF_INET6)?.into_iter().map(without_state).collect();
        ROUTES6.write(images, id, &six)?;
    }
    Ok(())
}

/// A route without flags that tell how things are: CRIU hands them to the kernel, which makes none that is down.
fn without_state(mut route: Message) -> Message {
    let asked = (flags(&route) & ASKED).to_ne_bytes();
    let begin = route.body().as_ptr() as usize;
    let several = route.attributes(HEAD).get(RTA_MULTIPATH);
    let several = several.map(|value| ((value.as_ptr() as usize).wrapping_sub(begin), nexthops(value)));
    for (at, bytes) in [(FLAGS.start, asked.to_vec())].into_iter().chain(several) {
        if let Some(place) = route.body_mut().get_mut(at..at.saturating_add(bytes.len())) {
            place.copy_from_slice(&bytes);
        }
    }
    route
}

/// Reads the images.
///
/// # Errors
/// Damaged images; routes by nexthop objects.
pub(super) fn read(images: &ImageDir, id: u32) -> Result<Vec<Message>> {
    let mut all = ROUTES.read(images, id)?.unwrap_or_default();
    all.append(&mut ROUTES6.read(images, id)?.unwrap_or_default());
    match all.iter().find(|r| r.attributes(HEAD).get(RTA_NH_ID).is_some()) {
        Some(route) => {
            Err(Error::unsupported("nexthop objects of the routing tables are not supported")
                .during(name(route)))
        }
        None => Ok(all),
    }
}

/// The body of the request that makes a route, which is also what two routes are compared by: without times and
/// what tells how things are.
fn request(route: &Message) -> Vec<u8> {
    let Some(mut head) = route.head::<HEAD>() else { return Vec::new() };
    head[FLAGS].copy_from_slice(&(flags(route) & ASKED).to_ne_bytes());
    let mut body = Body::new(&head);
    for (kind, value) in route.attributes(HEAD) {
        body = match kind {
            RTA_CACHEINFO => body,
            RTA_MULTIPATH => body.bytes(kind, &nexthops(value)),
            _ => body.bytes(kind, value),
        };
    }
    body.0
}

/// The same for the nexthops of a route with several.
fn nexthops(value: &[u8]) -> Vec<u8> {
    let mut bytes = value.to_vec();
    let mut at = 0;
    while let Some(len) = bytes.get(at..).and_then(super::netlink::half).map(usize::from)
        && len >= NEXTHOP
    {
        if let Some(flags) = bytes.get_mut(at + 2) {
            *flags &= ASKED as u8;
        }
        at += len.next_multiple_of(4);
    }
    bytes
}

/// Seconds until it ends; 0 if it does not.
fn expires(route: &Message) -> u32 {
    // struct rta_cacheinfo { clntref, lastuse, expires, ... }
    let ticks = route.attributes(HEAD).get(RTA_CACHEINFO).and_then(|b| super::netlink::word(b.get(8..)?));
    let ticks = ticks.map_or(0, u32::cast_signed).max(0).cast_unsigned();
    ticks.div_ceil(HERTZ)
}

/// When a route can be made: addresses, networks at devices, what is reached through those.
fn rank(route: &Message) -> u8 {
    let attributes = route.attributes(HEAD);
    let through = |a: Attributes<'_>| a.get(RTA_GATEWAY).is_some() || a.get(RTA_VIA).is_some();
    if through(attributes) || attributes.get(RTA_MULTIPATH).is_some() {
        return 2;
    }
    match (attributes.get(RTA_PREFSRC), attributes.get(RTA_DST)) {
        (Some(source), to) if to != Some(source) => 1,
        _ => 0,
    }
}

/// Makes `wanted` the routes of the namespace this thread is in.
///
/// Precondition: devices are up and have their addresses.
pub(super) fn restore(netlink: &mut Netlink, wanted: &[Message]) -> Result<()> {
    let requests: Vec<_> = wanted.iter().map(request).collect();
    for family in [libc::AF_INET, libc::AF_INET6] {
        for route in all(netlink, family)? {
            let body = request(&route);
            if !requests.contains(&body) {
                match netlink.request("RTM_DELROUTE", RTM_DELROUTE, 0, &body) {
                    Err(e) if e.errno() == Some(libc::ESRCH) => {}
                    other => other.during(|| name(&route))?,
                }
            }
        }
    }
    for now in 0..=2 {
        for (route, body) in wanted.iter().zip(&requests).filter(|(route, _)| rank(route) == now) {
            let mut body = Body(body.clone());
            let (six, end) = (i32::from(family(route)) == libc::AF_INET6, expires(route));
            if six && end > 0 {
                body = body.word(RTA_EXPIRES, end);
            }
            // Of IPv4, the order of equal routes is kept; of IPv6 it would join them.
            let flags = if six { CREATE } else { CREATE | APPEND };
            match netlink.request("RTM_NEWROUTE", RTM_NEWROUTE, flags, &body.0) {
                Err(e) if e.errno() == Some(libc::EEXIST) => {}
                other => other.during(|| name(route))?,
            }
        }
    }
    Ok(())
}
