//! What a restore does about each device of `netdev-ID.img`: decided from images and options alone.

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
    /// One end of a pair both of which are inside; the other is number `peer` in the list.
    Pair {
        peer: usize,
    },
    Bridge,
    /// On top of another device inside.
    Macvlan,
    Tun,
    Sit,
    /// What the kernel's message says.
    ByMessage,
    /// Made or moved in from outside.
    Outside(Outside),
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
    pub(super) fn told(&self) -> Option<Told<'_>> {
        self.told.as_ref().and_then(Told::of)
    }
}

fn outside(entry: &pb::NetDeviceEntry, options: &[External]) -> Option<Outside> {
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
pub(super) fn links(
    id: u32,
    entries: Vec<pb::NetDeviceEntry>,
    messages: &[Message],
    options: &[External],
) -> Result<Vec<Link>> {
    let (mut names, mut numbers) = (HashSet::new(), HashSet::new());
    for entry in &entries {
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
        let how = how(id, entry, &entries, told.as_ref(), options)
            .map_err(|e| e.during(format!("network device {}", entry.name)))?;
        Ok(Link { entry: entry.clone(), how, told })
    };
    entries.iter().map(one).collect()
}

fn how(
    id: u32,
    entry: &pb::NetDeviceEntry,
    all: &[pb::NetDeviceEntry],
    told: Option<&Message>,
    options: &[External],
) -> Result<How> {
    use pb::NdType as Nd;
    if let Some(outside) = outside(entry, options) {
        return Ok(How::Outside(outside));
    }
    let name = &entry.name;
    let inside = |index: Option<u32>| {
        let here = entry.peer_nsid == Some(id);
        all.iter().position(|other| here && other.ifindex != entry.ifindex && Some(other.ifindex) == index)
    };
    let missing = |what: &str| Error::image(format!("its {what} is missing"));
    match Nd::try_from(entry.r#type) {
        Ok(Nd::Loopback) => Ok(How::Loopback),
        Ok(Nd::Bridge) => Ok(How::Bridge),
        Ok(Nd::Tun) => entry.tun.as_ref().map(|_| How::Tun).ok_or_else(|| missing("tun entry")),
        Ok(Nd::Sit) => sit(entry.sit.as_ref().ok_or_else(|| missing("sit entry"))?).map(|()| How::Sit),
        Ok(Nd::Veth) => {
            let back = |peer: &usize| {
                all.get(*peer).is_some_and(|p| {
                    p.r#type == entry.r#type
                        && p.peer_ifindex == Some(entry.ifindex)
                        && outside(p, options).is_none()
                })
            };
            inside(entry.peer_ifindex).filter(back).map(|peer| How::Pair { peer }).ok_or_else(|| {
                Error::host("the other end of this veth is outside of the namespace").remedy(format!(
                    "say what it is with --external veth[{name}]:OUTSIDE or veth[{name}]:OUTSIDE@BRIDGE, or move a \
                     device in with --external netdev[{name}]:ORIGINAL"
                ))
            })
        }
        Ok(Nd::Macvlan) => {
            entry.macvlan.as_ref().ok_or_else(|| missing("macvlan entry"))?;
            inside(entry.peer_ifindex).map(|_| How::Macvlan).ok_or_else(|| {
                Error::host("the device below this macvlan is outside of the namespace")
                    .remedy(format!("name it with --external macvlan[{name}]:LINK"))
            })
        }
        // The message says all, and what it stands upon is here.
        Ok(Nd::Extlink)
            if told.and_then(Told::of).is_some_and(|t| {
                super::link::is_by_message(t.kind())
                    && (t.info().get(INFO_DATA).is_none() || inside(entry.peer_ifindex).is_some())
            }) =>
        {
            Ok(How::ByMessage)
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
        let plan = links(9, both.clone(), &[], &[]).unwrap();
        assert_eq!(plan[0].how, How::Pair { peer: 1 });
        assert_eq!(plan[1].how, How::Pair { peer: 0 });
        let said = links(9, vec![veth("a", 2, 3, None)], &[], &[]).unwrap_err().to_string();
        assert!(said.contains("--external veth[a]:OUTSIDE"), "{said}");
        let options = [External::veth("a", "x@br")];
        let plan = links(9, vec![veth("a", 2, 3, None)], &[], &options).unwrap();
        assert_eq!(plan[0].how, How::Outside(Outside::Veth { name: "x".into(), bridge: Some("br".into()) }));
        // An end that is given away takes the other with it.
        assert!(links(9, both, &[], &options).is_err());
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
            assert!(links(9, bad.clone(), &[], &options).is_err(), "{bad:?}");
        }
    }
}
