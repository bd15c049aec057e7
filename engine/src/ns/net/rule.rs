//! Routing rules (`rule-ID.img`): messages RTM_NEWRULE, as `ip rule save` writes them.
//!
//! That program saves rules of IPv4, and its restore puts them in the place of all there are. Rules of IPv6 follow
//! them here but for the two that every namespace is born with, since nobody would take those away.

use rcriu_images::ImageDir;

use super::{
    netlink::{Body, CREATE, Message, Netlink},
    saved::RULES,
};
use crate::error::{Error, Result};

const RTM_NEWRULE: u16 = 32;
const RTM_DELRULE: u16 = 33;
const RTM_GETRULE: u16 = 34;
/// Bytes of `struct fib_rule_hdr`.
const HEAD: usize = 12;
const FRA_PRIORITY: u16 = 6;
const FRA_SUPPRESS_PREFIXLEN: u16 = 14;
const FRA_TABLE: u16 = 15;
const FRA_PROTOCOL: u16 = 21;
/// Tables local and main.
const BORN: [(u32, u32); 2] = [(0, 255), (32766, 254)];
const RTPROT_KERNEL: u8 = 2;

fn all(netlink: &mut Netlink, family: i32) -> Result<Vec<Message>> {
    let mut head = [0; HEAD];
    head[0] = family as u8;
    let mut found = netlink.dump("RTM_GETRULE", RTM_GETRULE, &Body::new(&head))?;
    // A kernel without the family lists all of them.
    found.retain(|m| m.body().first() == Some(&(family as u8)));
    Ok(found)
}

/// Which of [`BORN`] a rule of IPv6 is.
fn born(message: &Message) -> Option<usize> {
    let attributes = message.attributes(HEAD);
    let place = (attributes.word(FRA_PRIORITY).unwrap_or(0), attributes.word(FRA_TABLE)?);
    let plain = attributes.into_iter().all(|(kind, value)| match kind {
        FRA_PRIORITY | FRA_TABLE => true,
        FRA_SUPPRESS_PREFIXLEN => value == [0xff; 4],
        FRA_PROTOCOL => value == [RTPROT_KERNEL],
        // Padding.
        _ => value.is_empty(),
    });
    // No addresses, no type of service, action FR_ACT_TO_TBL.
    let head = message.head::<HEAD>()?;
    let plain = plain && head[1..4] == [0; 3] && head[7] == 1;
    BORN.iter().position(|b| *b == place).filter(|_| plain)
}

/// Writes those of the namespace this thread is in.
///
/// # Errors
/// A rule of IPv6 that every namespace has is gone.
pub(super) fn dump(netlink: &mut Netlink, images: &ImageDir, id: u32) -> Result<()> {
    let mut rules = match all(netlink, libc::AF_INET) {
        // A kernel without CONFIG_IP_MULTIPLE_TABLES.
        Err(e) if e.errno() == Some(libc::EOPNOTSUPP) => return Ok(()),
        other => other?,
    };
    let mut six = all(netlink, libc::AF_INET6)?;
    let seen: Vec<usize> = six.iter().filter_map(born).collect();
    if let Some((priority, table)) = BORN.iter().enumerate().find(|(n, _)| !seen.contains(n)).map(|(_, b)| b)
        && std::path::Path::new("/proc/sys/net/ipv6").exists()
    {
        return Err(Error::unsupported(format!(
            "the IPv6 routing rule for table {table} at priority {priority} is gone, which images cannot say"
        ))
        .remedy("give the namespace its own rule back with ip -6 rule add"));
    }
    let mut met = [false; 2];
    six.retain(|rule| match born(rule).and_then(|n| met.get_mut(n)) {
        // A second one like it is somebody's own.
        Some(met) => std::mem::replace(met, true),
        None => true,
    });
    rules.append(&mut six);
    RULES.write(images, id, &rules)
}

/// Reads the image; `None` if the dump had none.
pub(super) fn read(images: &ImageDir, id: u32) -> Result<Option<Vec<Message>>> {
    RULES.read(images, id)
}

/// Makes `wanted` the rules of the namespace this thread is in, a new one.
pub(super) fn restore(netlink: &mut Netlink, wanted: &[Message]) -> Result<()> {
    for rule in all(netlink, libc::AF_INET)? {
        netlink.request("RTM_DELRULE", RTM_DELRULE, 0, rule.body())?;
    }
    for rule in wanted {
        match netlink.request("RTM_NEWRULE", RTM_NEWRULE, CREATE, rule.body()) {
            Err(e) if e.errno() == Some(libc::EEXIST) => {}
            other => other?,
        }
    }
    Ok(())
}
