//! Connections that netfilter follows, and those it expects (`netns-ct-ID.img`, `netns-exp-ID.img`): messages of
//! ctnetlink, one behind the other.
//!
//! A connection whose addresses are translated is entered as it was before that, with what becomes of it: only so
//! does the kernel translate its packets again.
//!
//! Sequence numbers go on where the images have them only roughly, so packets out of the window are not held
//! against a restored connection.

use rcriu_images::{ImageDir, ImageKind};

use super::{
    netlink::{Attributes, Body, CREATE, Message, NESTED, Netlink},
    raw,
};
use crate::error::{Error, Result};

/// `NFNL_SUBSYS_CTNETLINK` and `_EXP`, as part of message types.
const CT: u16 = 1;
const EXP: u16 = 2;
const GET: u16 = 1;
/// Bytes of `struct nfgenmsg`.
const HEAD: usize = 4;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_STATUS: u16 = 3;
const CTA_PROTOINFO: u16 = 4;
const CTA_NAT_SRC: u16 = 6;
const CTA_NAT_DST: u16 = 13;
/// Inside of tuples.
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const SRC_PORT: u16 = 2;
const DST_PORT: u16 = 3;
/// Numbers of ICMP and ICMPv6 requests.
const ICMP_IDS: [u16; 2] = [4, 7];
/// Source and destination of IPv4 and IPv6.
const ADDRESSES: [[u16; 2]; 2] = [[1, 2], [3, 4]];
/// Least and most of what an address may become, of IPv4 and IPv6; the same of ports, inside of the third.
const NAT_ADDRESSES: [[u16; 2]; 2] = [[1, 2], [4, 5]];
const CTA_NAT_PROTO: u16 = 3;
const IPS_SRC_NAT: u32 = 0x10;
const IPS_DST_NAT: u32 = 0x20;
const CTA_PROTOINFO_TCP: u16 = 1;
/// Flags of either direction: `struct nf_ct_tcp_flags { flags, mask }`.
const TCP_FLAGS: [u16; 2] = [4, 5];
/// `IP_CT_TCP_FLAG_BE_LIBERAL`.
const BE_LIBERAL: u8 = 8;
const COUNT: &str = "/proc/sys/net/netfilter/nf_conntrack_count";

/// What both images hold.
#[derive(Clone, Debug, Default)]
pub(super) struct Tracked(Vec<Message>);

/// Writes those of the namespace this thread is in; no image if there are none.
///
/// # Errors
/// Connections that the kernel follows and cannot list.
pub(super) fn dump(images: &ImageDir, id: u32) -> Result<()> {
    for (image, subsystem) in [(ImageKind::NetnfCt, CT), (ImageKind::NetnfExp, EXP)] {
        let listed = Netlink::netfilter()
            .and_then(|mut n| n.dump("IPCTNL_MSG_GET", subsystem << 8 | GET, &Body::new(&[0; HEAD])));
        let found = match listed {
            Ok(found) => found,
            Err(e) if matches!(e.errno(), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::EPROTONOSUPPORT)) => {
                let count = std::fs::read_to_string(COUNT).unwrap_or_default();
                if subsystem == CT && !matches!(count.trim(), "" | "0") {
                    return Err(Error::unsupported("the kernel follows connections and cannot list them")
                        .remedy("run a kernel with CONFIG_NF_CT_NETLINK"));
                }
                Vec::new()
            }
            Err(e) => return Err(e),
        };
        let bytes: Vec<u8> = found.iter().flat_map(|m| m.bytes().to_vec()).collect();
        raw::write(images, image, id, &bytes)?;
    }
    Ok(())
}

impl Tracked {
    /// Reads the images.
    ///
    /// # Errors
    /// Damaged messages, messages to another part of the kernel.
    pub(super) fn read(images: &ImageDir, id: u32) -> Result<Tracked> {
        let mut all = Vec::new();
        for (image, own) in [(ImageKind::NetnfCt, CT), (ImageKind::NetnfExp, EXP)] {
            let name = image.file_name(id.into());
            for message in Message::all(&raw::read(images, image, id)?.unwrap_or_default(), &name)? {
                let (subsystem, kind) = (message.kind() >> 8, message.kind() & 0xff);
                if kind != 0 || !matches!(subsystem, CT | EXP) || message.body().len() < HEAD {
                    return Err(Error::image(format!("{name} has a message of type {:#x}", message.kind())));
                }
                // CRIU lists connections once more in place of what is expected.
                if subsystem == own {
                    all.push(message);
                }
            }
        }
        all.iter_mut().for_each(be_liberal);
        Ok(Tracked(all))
    }

    /// Enters them in the namespace this thread is in.
    pub(super) fn restore(&self) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        let mut netlink = Netlink::netfilter()?;
        for message in &self.0 {
            let body = if message.kind() >> 8 == CT { translated(message) } else { None };
            let body = body.as_ref().map_or(message.body(), |body| &body.0);
            netlink.request("IPCTNL_MSG_NEW", message.kind(), CREATE, body)?;
        }
        Ok(())
    }
}

/// The request that enters a connection whose addresses are translated; `None` for any other.
fn translated(message: &Message) -> Option<Body> {
    let all = message.attributes(HEAD);
    let status = u32::from_be(all.word(CTA_STATUS)?);
    if status & (IPS_SRC_NAT | IPS_DST_NAT) == 0 {
        return None;
    }
    let (orig, reply) = (all.inside(CTA_TUPLE_ORIG), all.inside(CTA_TUPLE_REPLY));
    let (from, to) = (orig.inside(CTA_TUPLE_IP), reply.inside(CTA_TUPLE_IP));
    let family = ADDRESSES.iter().position(|[source, _]| from.get(*source).is_some())?;
    let ([source, destination], [least, most]) = (ADDRESSES[family], NAT_ADDRESSES[family]);
    let (ports, after) = (orig.inside(CTA_TUPLE_PROTO), reply.inside(CTA_TUPLE_PROTO));
    // What would come back if nothing were translated.
    let addresses =
        Body::default().bytes(source, from.get(destination)?).bytes(destination, from.get(source)?);
    let protocol = after.fold(Body::default(), |body, (kind, value)| {
        let value = match kind {
            SRC_PORT => ports.get(DST_PORT),
            DST_PORT => ports.get(SRC_PORT),
            kind if ICMP_IDS.contains(&kind) => ports.get(kind),
            _ => None,
        }
        .unwrap_or(value);
        body.bytes(kind, value)
    });
    let back = reply.fold(Body::default(), |body, (kind, value)| match kind {
        CTA_TUPLE_IP => body.nest(kind | NESTED, &addresses),
        CTA_TUPLE_PROTO => body.nest(kind | NESTED, &protocol),
        _ => body.bytes(kind, value),
    });
    let becomes = |address: u16, port: u16| {
        let range = |[least, most]: [u16; 2], v: &[u8]| Body::default().bytes(least, v).bytes(most, v);
        let number = after.get(port).or_else(|| ICMP_IDS.iter().find_map(|kind| after.get(*kind)));
        let body = range([least, most], to.get(address)?);
        Some(match number {
            Some(number) => body.nest(CTA_NAT_PROTO | NESTED, &range([1, 2], number)),
            None => body,
        })
    };
    let mut body = all.fold(Body::new(&message.head::<HEAD>()?), |body, (kind, value)| match kind {
        CTA_TUPLE_REPLY => body.nest(kind | NESTED, &back),
        CTA_TUPLE_ORIG | CTA_PROTOINFO => body.bytes(kind | NESTED, value),
        _ => body.bytes(kind, value),
    });
    if status & IPS_SRC_NAT != 0 {
        body = body.nest(CTA_NAT_SRC | NESTED, &becomes(destination, DST_PORT)?);
    }
    if status & IPS_DST_NAT != 0 {
        body = body.nest(CTA_NAT_DST | NESTED, &becomes(source, SRC_PORT)?);
    }
    Some(body)
}

/// Where `part`, a piece of `whole`, begins in it.
fn offset(whole: &[u8], part: &[u8]) -> usize {
    (part.as_ptr() as usize).wrapping_sub(whole.as_ptr() as usize)
}

/// Lets packets of a TCP connection pass that are out of its window.
fn be_liberal(message: &mut Message) {
    let places: Vec<usize> = {
        let tcp: Attributes<'_> = message.attributes(HEAD).inside(CTA_PROTOINFO).inside(CTA_PROTOINFO_TCP);
        let values = TCP_FLAGS.into_iter().filter_map(|kind| tcp.get(kind).filter(|v| v.len() >= 2));
        values.map(|value| offset(message.body(), value)).collect()
    };
    let body = message.body_mut();
    for at in places {
        body.iter_mut().skip(at).take(2).for_each(|byte| *byte |= BE_LIBERAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tcp_connections_become_liberal() {
        let tcp = Body::default().bytes(1, &[3]).bytes(4, &[1, 2]).bytes(5, &[0, 0xff]);
        let body = Body::new(&[2, 0, 0, 0])
            .nest(CTA_PROTOINFO, &Body::default().nest(CTA_PROTOINFO_TCP, &tcp))
            .word(7, 1);
        let mut bytes = ((16 + body.0.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend([0; 12]);
        bytes.extend(&body.0);
        let mut message = Message::all(&bytes, "x").unwrap().remove(0);
        be_liberal(&mut message);
        let after = message.attributes(HEAD).inside(CTA_PROTOINFO).inside(CTA_PROTOINFO_TCP);
        assert_eq!(after.get(4), Some(&[9, 10][..]));
        assert_eq!(after.get(5), Some(&[8, 0xff][..]));
        assert_eq!(message.attributes(HEAD).word(7), Some(1));
    }
}
