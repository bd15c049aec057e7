//! Addresses of devices (`ifaddr-ID.img`): messages RTM_NEWADDR, as `ip addr save` writes them.
//!
//! Devices that come up get addresses of the kernel's own making, which a task may have removed; a restore ends with
//! exactly those of the image. IPv6 looks for duplicates before an address is used (DAD): those that were in use at
//! the dump are not looked for again, since sockets are to be bound to them at once; the others are.

use std::{
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rcriu_images::ImageDir;

use super::{
    netlink::{Body, CREATE, Message, Netlink, word},
    saved::ADDRESSES,
};
use crate::{
    error::{Context, Error, Result, SysContext},
    sys::sockopt::{self, Opt},
};

const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;
/// Bytes of `struct ifaddrmsg`.
const HEAD: usize = 8;
const TENTATIVE: u32 = 0x40;
const DADFAILED: u32 = 0x08;
/// Whoever is asked never answers later than this.
const READY: Duration = Duration::from_secs(3);
const ADD_MEMBERSHIP: Opt = Opt { level: 270, number: 1, name: "NETLINK_ADD_MEMBERSHIP" };
const RTNLGRP_IPV6_IFADDR: i32 = 9;

/// What makes an address one of a namespace: family, length of its prefix, device, the address itself.
type Key = (u8, u8, u32, Vec<u8>);

fn key(message: &Message) -> Option<Key> {
    let [family, length, _, _, index @ ..] = message.head::<HEAD>()?;
    let attributes = message.attributes(HEAD);
    let own = attributes.get(IFA_LOCAL).or(attributes.get(IFA_ADDRESS))?;
    Some((family, length, word(&index)?, own.to_vec()))
}

fn flags(message: &Message) -> u32 {
    let short = message.head::<HEAD>().map_or(0, |head| head[2].into());
    message.attributes(HEAD).word(IFA_FLAGS).unwrap_or(short)
}

/// What messages call it.
fn name(message: &Message) -> String {
    let Some((family, length, index, bytes)) = key(message) else { return "an address".into() };
    let text = match family.into() {
        libc::AF_INET => <[u8; 4]>::try_from(bytes).map(|b| std::net::Ipv4Addr::from(b).to_string()),
        _ => <[u8; 16]>::try_from(bytes).map(|b| std::net::Ipv6Addr::from(b).to_string()),
    };
    format!("address {}/{length} of device {index}", text.unwrap_or_default())
}

fn all(netlink: &mut Netlink) -> Result<Vec<Message>> {
    netlink.dump("RTM_GETADDR", RTM_GETADDR, &Body::new(&[0; HEAD]))
}

/// Those of device `index`.
pub(super) fn of_device(netlink: &mut Netlink, index: u32) -> Result<Vec<Message>> {
    let mut found = all(netlink)?;
    found.retain(|m| key(m).is_some_and(|k| k.2 == index));
    Ok(found)
}

/// Writes those of the namespace this thread is in.
pub(super) fn dump(netlink: &mut Netlink, images: &ImageDir, id: u32) -> Result<()> {
    let found = all(netlink)?;
    ADDRESSES.write(images, id, &found)
}

/// Reads the image.
pub(super) fn read(images: &ImageDir, id: u32) -> Result<Vec<Message>> {
    let found = ADDRESSES.read(images, id)?.unwrap_or_default();
    match found.iter().find(|m| key(m).is_none()) {
        Some(_) => Err(Error::image(format!("ifaddr-{id}.img: a message without an address"))),
        None => Ok(found),
    }
}

/// Sets one address; that it is there already is fine.
pub(super) fn set(netlink: &mut Netlink, message: &Message) -> Result<()> {
    match netlink.request("RTM_NEWADDR", RTM_NEWADDR, CREATE, message.body()) {
        Err(e) if e.errno() == Some(libc::EEXIST) => Ok(()),
        other => other.during(|| name(message)),
    }
}

/// Makes `wanted` the addresses of the namespace this thread is in.
///
/// Precondition: devices are up, and do not look for duplicates.
pub(super) fn restore(netlink: &mut Netlink, wanted: &[Message]) -> Result<()> {
    let keys: Vec<Key> = wanted.iter().filter_map(key).collect();
    // Of IPv4, the order says which address is the first of its network, so all of them are set anew.
    for found in all(netlink)? {
        let Some(key) = key(&found) else { continue };
        if i32::from(key.0) == libc::AF_INET || !keys.contains(&key) {
            match netlink.request("RTM_DELADDR", RTM_DELADDR, 0, found.body()) {
                // It went with the first of its network.
                Err(e) if e.errno() == Some(libc::EADDRNOTAVAIL) => {}
                other => other.during(|| name(&found))?,
            }
        }
    }
    // The kernel puts a new one behind others of IPv4, and before others of IPv6.
    let (four, six): (Vec<_>, Vec<_>) =
        wanted.iter().partition(|m| m.body().first() == Some(&(libc::AF_INET as u8)));
    four.into_iter().chain(six.into_iter().rev()).try_for_each(|message| set(netlink, message))?;
    ready(netlink, wanted)
}

/// Addresses for which duplicates were still being looked for are looked for again: set anew, now that devices do so.
///
/// Precondition: devices have their settings, and no route goes by those addresses yet.
pub(super) fn look_for_duplicates(netlink: &mut Netlink, wanted: &[Message]) -> Result<()> {
    let unsure = |m: &&Message| flags(m) & (TENTATIVE | DADFAILED) == TENTATIVE;
    for message in wanted.iter().filter(unsure) {
        match netlink.request("RTM_DELADDR", RTM_DELADDR, 0, message.body()) {
            Err(e) if e.errno() == Some(libc::EADDRNOTAVAIL) => {}
            other => other.during(|| name(message))?,
        }
        set(netlink, message)?;
    }
    Ok(())
}

/// Waits until those that could be used at the dump can be used.
fn ready(netlink: &mut Netlink, wanted: &[Message]) -> Result<()> {
    let usable = |m: &Message| flags(m) & (TENTATIVE | DADFAILED) == 0;
    let mut left: Vec<Key> = wanted
        .iter()
        .filter(|m| usable(m))
        .filter_map(key)
        .filter(|k| i32::from(k.0) == libc::AF_INET6)
        .collect();
    if left.is_empty() {
        return Ok(());
    }
    // Told of changes from before the first look.
    let told = Netlink::route()?;
    sockopt::set_int(told.as_fd(), ADD_MEMBERSHIP, RTNLGRP_IPV6_IFADDR)?;
    let until = Instant::now() + READY;
    loop {
        let now: Vec<Key> = all(netlink)?.iter().filter(|m| usable(m)).filter_map(key).collect();
        left.retain(|k| !now.contains(k));
        let wait = until.saturating_duration_since(Instant::now());
        if left.is_empty() || wait.is_zero() {
            break;
        }
        crate::interrupt::check()?;
        let mut fds = [PollFd::new(told.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::from(wait.as_millis().min(200) as u16);
        match poll(&mut fds, timeout) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(Error::sys("poll", e as i32)),
            Ok(_) => drain(&told)?,
        }
    }
    if !left.is_empty() {
        log::warn!("{} IPv6 addresses cannot be used yet: their devices are not ready", left.len());
    }
    Ok(())
}

fn drain(told: &Netlink) -> Result<()> {
    use nix::sys::socket::{MsgFlags, recv};
    let mut buffer = [0; 4096];
    loop {
        match recv(told.as_fd().as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            // Too much was told: the next look shows it all.
            Ok(_) | Err(nix::errno::Errno::ENOBUFS) => {}
            Err(nix::errno::Errno::EAGAIN) => return Ok(()),
            other => return other.call("recv(netlink)").map(drop),
        }
    }
}
