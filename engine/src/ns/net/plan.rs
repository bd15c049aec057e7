//! What a restore does about each device of `netdev-ID.img`: decided from images and options alone.
//!
//! A device that stands in two namespaces of the tree is made once, in one request: a pair by the namespace of the end
//! that comes first, a device upon another by the namespace of the lower one.

use std::collections::HashSet;

use rcriu_images::pb;

use super::{
    link::{INFO_DATA, Told},
    netlink::Message,
};
use crate::{
    error::{Error, Result},
    options::External,
};

/// Bytes of a device's name with its final zero.
const NAME: usize = 16;

/// A device to be.
#[derive(Clone, Debug)]
pub(super) struct Link {
    pub(super) entry: pb::NetDeviceEntry,
    pub(super) how: How,
    /// The kernel's message about it, of images that have one.
    pub(super) told: Option<Message>,
}

/// Where a device comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum How {
    /// The namespace is born with it.
    Loopback,
    /// One end of a pair both of which are inside; this is the other.
    Pair(At),
    Bridge,
    /// On top of another device inside.
    Macvlan(At),
    Tun,
    Sit,
    /// What the kernel's message says, which may stand upon another device inside.
    ByMessage(Option<At>),
    /// Made or moved in from outside.
    Outside(Outside),
}

/// A device of the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct At {
    /// Number of its namespace in images.
    pub(super) net: u32,
    pub(super) index: u32,
}

/// The devices of all namespaces of the tree, by the numbers of those.
pub(super) type Entries = Vec<(u32, Vec<pb::NetDeviceEntry>)>;

/// Those of namespace `id`.
pub(super) fn devices(all: &Entries, id: u32) -> &[pb::NetDeviceEntry] {
    all.iter().find(|(net, _)| *net == id).map_or(&[], |(_, devices)| devices)
}

fn device(all: &Entries, at: At) -> Option<&pb::NetDeviceEntry> {
    devices(all, at.net).iter().find(|entry| entry.ifindex == at.index)
}

/// The device inside that images say this one, of namespace `id`, is an end of a pair with, or stands upon.
fn other(id: u32, entry: &pb::NetDeviceEntry, all: &Entries) -> Option<At> {
    let at = At { net: entry.peer_nsid?, index: entry.peer_ifindex? };
    (at != At { net: id, index: entry.ifindex } && device(all, at).is_some()).then_some(at)
}

/// What is done outside for a device inside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outside {
    /// One end of a pair; the other is named `name` and becomes a port of `bridge`.
    Veth { name: String, bridge: Option<String> },
    /// On top of this device.
    Macvlan { link: String },
    /// This device is moved in.
    Netdev { original: String },
}

/// Whether it can be the name of a device.
pub(super) fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() < NAME
        && !matches!(name, "." | "..")
        && !name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c == '\0')
}

impl Link {
    /// What has to be there before it.
    pub(super) fn upon(&self) -> Option<At> {
        match self.how {
            How::Macvlan(lower) => Some(lower),
            How::ByMessage(lower) => lower,
            _ => None,
        }
    }

    pub(super) fn told(&self) -> Option<Told<'_>> {
        self.told.as_ref().and_then(Told::of)
    }
}

/// What options say that comes from outside. They know no namespaces, only names: a device tied to another namespace of the
/// tree is none that they mean.
fn outside(id: u32, entry: &pb::NetDeviceEntry, all: &Entries, options: &[External]) -> Option<Outside> {
    if other(id, entry, all).is_some_and(|at| at.net != id) {
        return None;
    }
    // What is given last counts, as in CRIU.
    options.iter().rev().find_map(|option| match option {
        External::Veth { inside, outside, bridge }
            if *inside == entry.name && entry.r#type() == pb::NdType::Veth =>
        {
            Some(Outside::Veth { name: outside.clone(), bridge: bridge.clone() })
        }
        External::Macvlan { inside, link }
            if *inside == entry.name && entry.r#type() == pb::NdType::Macvlan =>
        {
            Some(Outside::Macvlan { link: link.clone() })
        }
        External::Netdev { name, original } if *name == entry.name => {
            Some(Outside::Netdev { original: original.clone() })
        }
        _ => None,
    })
}

/// Decides about all devices of namespace `id`.
///
/// # Errors
/// Images that contradict themselves; a device for which an option is missing.
pub(super) fn links(id: u32, all: &Entries, messages: &[Message], options: &[External]) -> Result<Vec<Link>> {
    let entries = devices(all, id);
    let (mut names, mut numbers) = (HashSet::new(), HashSet::new());
    for entry in entries {
        if !is_name(&entry.name) || !(1..=i32::MAX as u32).contains(&entry.ifindex) {
            return Err(Error::image(format!(
                "netdev-{id}.img: no device is called {:?} and has number {}",
                entry.name, entry.ifindex
            )));
        }
        if !names.insert(&entry.name) || !numbers.insert(entry.ifindex) {
            return Err(Error::image(format!(
                "netdev-{id}.img: two devices are called {} or have number {}",
                entry.name, entry.ifindex
            )));
        }
    }
    if let Some(entry) = entries.iter().find(|e| e.master.is_some_and(|m| !numbers.contains(&m))) {
        return Err(Error::image(format!(
            "netdev-{id}.img: the master {:?} of {} is missing",
            entry.master, entry.name
        )));
    }
    let one = |entry: &pb::NetDeviceEntry| {
        let mut told = messages.iter().filter(|m| Told::of(m).is_some_and(|t| t.index == entry.ifindex));
        let told = told.find(|m| Told::of(m).is_some_and(|t| t.name == entry.name)).cloned();
        let how = how(id, entry, all, told.as_ref(), options)
            .map_err(|e| e.during(format!("network device {}", entry.name)))?;
        Ok(Link { entry: entry.clone(), how, told })
    };
    entries.iter().map(one).collect()
}

fn how(
    id: u32,
    entry: &pb::NetDeviceEntry,
    all: &Entries,
    told: Option<&Message>,
    options: &[External],
) -> Result<How> {
    use pb::NdType as Nd;
    if let Some(outside) = outside(id, entry, all, options) {
        return Ok(How::Outside(outside));
    }
    let name = &entry.name;
    let inside = other(id, entry, all);
    let missing = |what: &str| Error::image(format!("its {what} is missing"));
    match Nd::try_from(entry.r#type) {
        Ok(Nd::Loopback) => Ok(How::Loopback),
        Ok(Nd::Bridge) => Ok(How::Bridge),
        Ok(Nd::Tun) => entry.tun.as_ref().map(|_| How::Tun).ok_or_else(|| missing("tun entry")),
        Ok(Nd::Sit) => sit(entry.sit.as_ref().ok_or_else(|| missing("sit entry"))?).map(|()| How::Sit),
        Ok(Nd::Veth) => {
            let me = Some(At { net: id, index: entry.ifindex });
            let back = |peer: &At| {
                device(all, *peer).is_some_and(|p| {
                    p.r#type == entry.r#type
                        && other(peer.net, p, all) == me
                        && outside(peer.net, p, all, options).is_none()
                })
            };
            inside.filter(back).map(How::Pair).ok_or_else(|| {
                Error::host("the other end of this veth is outside of the namespace").remedy(format!(
                    "say what it is with --external veth[{name}]:OUTSIDE or veth[{name}]:OUTSIDE@BRIDGE, or move a \
                     device in with --external netdev[{name}]:ORIGINAL"
                ))
            })
        }
        Ok(Nd::Macvlan) => {
            entry.macvlan.as_ref().ok_or_else(|| missing("macvlan entry"))?;
            inside.map(How::Macvlan).ok_or_else(|| {
                Error::host("the device below this macvlan is outside of the namespace")
                    .remedy(format!("name it with --external macvlan[{name}]:LINK"))
            })
        }
        // The message says all, and what it stands upon is here.
        Ok(Nd::Extlink)
            if told.and_then(Told::of).is_some_and(|t| {
                super::link::is_by_message(t.kind())
                    && (t.info().get(INFO_DATA).is_none() || inside.is_some())
            }) =>
        {
            Ok(How::ByMessage(inside))
        }
        Ok(Nd::Extlink) => Err(Error::host("this device comes from outside of the namespace")
            .remedy(format!("name it with --external netdev[{name}]:ORIGINAL"))),
        Ok(Nd::Venet) => Err(Error::unsupported("devices of kind venet are not supported")
            .remedy(format!("move a device in with --external netdev[{name}]:ORIGINAL"))),
        Err(_) => Err(Error::image(format!("devices of type {} are unknown", entry.r#type))),
    }
}

fn sit(entry: &pb::SitEntry) -> Result<()> {
    let lengths = [entry.local.len() <= 1, entry.remote.len() <= 1];
    let prefixes = [
        entry.rd_prefixlen.is_none() || entry.rd_prefix.len() == 4,
        entry.relay_prefixlen.is_none() || entry.relay_prefix.len() == 1,
    ];
    match lengths.into_iter().chain(prefixes).all(|fine| fine) {
        true => Ok(()),
        false => Err(Error::image("an address of its sit entry")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn veth(name: &str, ifindex: u32, peer: u32, nsid: Option<u32>) -> pb::NetDeviceEntry {
        pb::NetDeviceEntry {
            r#type: pb::NdType::Veth.into(),
            name: name.into(),
            ifindex,
            peer_ifindex: Some(peer),
            peer_nsid: nsid,
            ..Default::default()
        }
    }

    #[test]
    fn a_pair_inside_needs_no_option_and_one_end_does() {
        let both = vec![veth("a", 2, 3, Some(9)), veth("b", 3, 2, Some(9))];
        let plan = links(9, &vec![(9, both.clone())], &[], &[]).unwrap();
        assert_eq!(plan[0].how, How::Pair(At { net: 9, index: 3 }));
        assert_eq!(plan[1].how, How::Pair(At { net: 9, index: 2 }));
        let one = vec![(9, vec![veth("a", 2, 3, None)])];
        let said = links(9, &one, &[], &[]).unwrap_err().to_string();
        assert!(said.contains("--external veth[a]:OUTSIDE"), "{said}");
        let options = [External::veth("a", "x@br")];
        let plan = links(9, &one, &[], &options).unwrap();
        assert_eq!(plan[0].how, How::Outside(Outside::Veth { name: "x".into(), bridge: Some("br".into()) }));
        // An end that is given away takes the other with it.
        assert!(links(9, &vec![(9, both)], &[], &options).is_err());
    }

    #[test]
    fn a_pair_between_namespaces_is_not_what_options_mean() {
        let all = vec![
            (9, vec![veth("a", 2, 2, Some(7)), veth("b", 3, 9, None)]),
            (7, vec![veth("b", 2, 2, Some(9))]),
        ];
        let options = [External::veth("b", "x")];
        let plan = links(9, &all, &[], &options).unwrap();
        assert_eq!(plan[0].how, How::Pair(At { net: 7, index: 2 }));
        assert_eq!(plan[1].how, How::Outside(Outside::Veth { name: "x".into(), bridge: None }));
        assert_eq!(links(7, &all, &[], &options).unwrap()[0].how, How::Pair(At { net: 9, index: 2 }));
        // The other end says that it belongs to another.
        let bad = vec![(9, vec![veth("a", 2, 2, Some(7))]), (7, vec![veth("b", 2, 3, Some(9))])];
        assert!(links(9, &bad, &[], &[]).is_err());
    }

    #[test]
    fn devices_that_cannot_be_are_errors() {
        for bad in [
            vec![veth("", 2, 3, None)],
            vec![veth("a/b", 2, 3, None)],
            vec![veth("sixteen-letters-", 2, 3, None)],
            vec![veth("a", 0, 3, None)],
            vec![veth("a", u32::MAX, 3, None)],
            vec![veth("a", 2, 3, Some(9)), veth("a", 3, 2, Some(9))],
            vec![veth("a", 2, 3, Some(9)), veth("b", 2, 2, Some(9))],
            vec![pb::NetDeviceEntry { master: Some(7), ..veth("a", 2, 3, None) }],
            vec![pb::NetDeviceEntry { r#type: 77, ..veth("a", 2, 3, None) }],
            vec![pb::NetDeviceEntry { r#type: pb::NdType::Tun.into(), ..veth("a", 2, 3, None) }],
        ] {
            let options = [External::Veth { inside: "z".into(), outside: "z".into(), bridge: None }];
            assert!(links(9, &vec![(9, bad.clone())], &[], &options).is_err(), "{bad:?}");
        }
    }
}
