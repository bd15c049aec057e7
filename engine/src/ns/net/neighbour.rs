//! Neighbours that somebody has entered: what is at which address of the link. The format has no image for them;
//! what the kernel has learned itself it learns again.

use super::netlink::{Body, CREATE, Message, Netlink, word};
use crate::error::Result;

pub(super) const RTM_NEWNEIGH: u16 = 28;
const RTM_GETNEIGH: u16 = 30;
/// Bytes of `struct ndmsg`.
const HEAD: usize = 12;
const NUD_NOARP: u16 = 0x40;
const NUD_PERMANENT: u16 = 0x80;
const NTF_PROXY: u8 = 8;
const NDA_CACHEINFO: u16 = 3;
const NDA_PROBES: u16 = 4;

fn list(netlink: &mut Netlink, family: i32, flags: u8) -> Result<Vec<Message>> {
    let mut head = [0; HEAD];
    (head[0], head[10]) = (family as u8, flags);
    let mut found = netlink.dump("RTM_GETNEIGH", RTM_GETNEIGH, &Body::new(&head))?;
    found.retain(|m| m.body().first() == Some(&(family as u8)) && is_one(m));
    Ok(found)
}

/// Whether it is a message about a neighbour.
pub(super) fn is_one(message: &Message) -> bool {
    message.kind() == RTM_NEWNEIGH && message.body().len() >= HEAD
}

/// Those of the namespace this thread is in, of IPv4, IPv6 and bridges.
pub(super) fn dump(netlink: &mut Netlink) -> Result<Vec<Message>> {
    let mut all = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let entered = |m: &Message| state(m) & NUD_PERMANENT != 0;
        all.extend(list(netlink, family, 0)?.into_iter().filter(entered));
        all.extend(list(netlink, family, NTF_PROXY)?.into_iter().filter(|m| flags(m) & NTF_PROXY != 0));
    }
    // Permanent ones of bridges are their own ports' addresses.
    let bridges = list(netlink, libc::AF_BRIDGE, 0).unwrap_or_default();
    all.extend(bridges.into_iter().filter(|m| state(m) & NUD_NOARP != 0));
    Ok(all)
}

fn state(message: &Message) -> u16 {
    message.head::<HEAD>().map_or(0, |head| u16::from_ne_bytes([head[8], head[9]]))
}

fn flags(message: &Message) -> u8 {
    message.head::<HEAD>().map_or(0, |head| head[10])
}

/// The number of its device.
pub(super) fn device(message: &Message) -> Option<u32> {
    word(message.body().get(4..)?)
}

/// Enters them in the namespace this thread is in.
pub(super) fn restore(netlink: &mut Netlink, wanted: &[Message]) -> Result<()> {
    for message in wanted {
        let Some(head) = message.head::<HEAD>() else { continue };
        let kept = message.attributes(HEAD).filter(|(kind, _)| ![NDA_CACHEINFO, NDA_PROBES].contains(kind));
        let body = kept.fold(Body::new(&head), |body, (kind, value)| body.bytes(kind, value));
        match netlink.request("RTM_NEWNEIGH", RTM_NEWNEIGH, CREATE, &body.0) {
            Err(e) if e.errno() == Some(libc::EEXIST) => {}
            other => other?,
        }
    }
    Ok(())
}
