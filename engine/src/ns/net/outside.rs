//! Devices that come from outside: pairs whose other end stays there, macvlans on devices there, devices moved in.

use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    thread,
};

use nix::sched::{CloneFlags, setns};

use super::{
    Nets, address,
    link::{self, RTM_DELLINK, RTM_NEWLINK, RTM_SETLINK, Told},
    make,
    netlink::{Body, CREATE, EXCL, Message, NESTED, Netlink},
    nets::{made_in, space},
    plan::{How, Link, Outside},
};
use crate::error::{Context, Error, Result, SysContext};

const VETH_INFO_PEER: u16 = 1;
const UP: u32 = libc::IFF_UP as u32;

/// Devices made or moved for namespaces; dropped without [`Undo::keep`], they go or come back.
#[derive(Debug)]
pub struct Undo {
    /// The namespaces, which live until then.
    spaces: Vec<OwnedFd>,
    host: OwnedFd,
    /// With the place of the namespace each is in.
    made: Vec<(usize, Made)>,
}

#[derive(Debug)]
enum Made {
    /// A pair whose end outside has this number.
    Pair(u32),
    /// A device inside.
    Inside(u32),
    /// A device moved in, as the kernel told it before, its addresses, and its name inside.
    Moved { before: Message, addresses: Vec<Message>, name: String },
}

impl Undo {
    /// The restore is done: all stays.
    pub fn keep(mut self) {
        self.made.clear();
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        while let Some((at, made)) = self.made.pop() {
            if let Err(e) = self.undo(at, &made) {
                log::error!("A network device cannot be put back: {e}");
            }
        }
    }
}

/// Acts in network namespace `netns`, in a thread of its own.
fn within<T: Send>(netns: BorrowedFd<'_>, act: impl FnOnce(&mut Netlink) -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        let acting = scope.spawn(|| {
            setns(netns, CloneFlags::CLONE_NEWNET).call("setns(CLONE_NEWNET)")?;
            act(&mut Netlink::route()?)
        });
        acting.join().unwrap_or_else(|_| Err(Error::bug("a thread in another namespace panicked")))
    })
}

/// The kernel's message about device `name`.
fn find(netlink: &mut Netlink, name: &str) -> Result<Message> {
    let all = link::all(netlink)?;
    let found = all.into_iter().find(|m| Told::of(m).is_some_and(|t| t.name == name));
    found.ok_or_else(|| Error::host(format!("there is no network device {name}")))
}

fn index(netlink: &mut Netlink, name: &str) -> Result<u32> {
    let message = find(netlink, name)?;
    Ok(Told::of(&message).map_or(0, |t| t.index))
}

/// A request that moves device `index`: its name and number there.
fn moving(index: u32, name: &str, number: u32, to: BorrowedFd<'_>) -> Body {
    Body::new(&make::head(index, 0, 0))
        .text(link::IFLA_IFNAME, name)
        .word(link::IFLA_NEW_IFINDEX, number)
        .word(link::IFLA_NET_NS_FD, to.as_raw_fd().cast_unsigned())
}

impl Undo {
    fn undo(&self, at: usize, made: &Made) -> Result<()> {
        let space = self.spaces.get(at).ok_or_else(|| Error::bug("a device without a namespace"))?.as_fd();
        let gone = |result: Result<()>| match result {
            Err(e) if e.errno() == Some(libc::ENODEV) => Ok(()),
            other => other,
        };
        let delete = |netlink: &mut Netlink, index| {
            gone(netlink.request("RTM_DELLINK", RTM_DELLINK, 0, &make::head(index, 0, 0)))
        };
        match made {
            Made::Pair(index) => delete(&mut Netlink::route()?, *index),
            Made::Inside(index) => within(space, |netlink| delete(netlink, *index)),
            Made::Moved { before, addresses, name } => {
                let told = Told::of(before).ok_or_else(|| Error::bug("a device without its message"))?;
                within(space, |netlink| {
                    let index = index(netlink, name)?;
                    let body = moving(index, told.name, told.index, self.host.as_fd());
                    netlink.request("RTM_NEWLINK", RTM_NEWLINK, 0, &body.0)
                })?;
                put_back(told, addresses).during(|| format!("network device {}", told.name))
            }
        }
    }
}

/// What a device has lost by being moved.
fn put_back(told: Told<'_>, addresses: &[Message]) -> Result<()> {
    let netlink = &mut Netlink::route()?;
    let same = [link::IFLA_MTU, link::IFLA_ADDRESS, link::IFLA_MASTER];
    let body = Body::new(&make::head(told.index, told.flags & UP, UP));
    let body = same.into_iter().fold(body, |body, kind| {
        body.maybe(kind, told.attributes.get(kind).filter(|value| !value.is_empty()))
    });
    netlink.request("RTM_SETLINK", RTM_SETLINK, 0, &body.0)?;
    addresses.iter().try_for_each(|message| address::set(netlink, message))
}

/// Makes and moves what namespaces `spaces`, of all numbers in `nets`, get from outside; this process is in the namespace
/// of the host's side.
///
/// Precondition: they are new and empty, but for numbers of each other, and [`super::restore`] was not called in them yet.
///
/// # Errors
/// A name in use, a bridge or device that is not there. What was made is gone again.
pub fn restore_outside(nets: &Nets, spaces: &[(u32, BorrowedFd<'_>)]) -> Result<Undo> {
    let path = "/proc/thread-self/ns/net";
    let host = File::open(path).call(format!("open({path})"))?.into();
    let mut undo = Undo { spaces: Vec::new(), host, made: Vec::new() };
    for (at, net) in nets.each().iter().enumerate() {
        let there = space(spaces, net.id)?;
        undo.spaces.push(there.try_clone_to_owned().call("fcntl(F_DUPFD_CLOEXEC)")?);
        for link in &net.links {
            if let How::Outside(outside) = &link.how {
                make_one(&mut undo, at, link, outside)
                    .during(|| format!("network device {} from outside", link.entry.name))?;
            }
        }
    }
    Ok(undo)
}

fn make_one(undo: &mut Undo, at: usize, link: &Link, outside: &Outside) -> Result<()> {
    let netlink = &mut Netlink::route()?;
    let (name, number) = (&link.entry.name, link.entry.ifindex);
    let there = undo.spaces.get(at).ok_or_else(|| Error::bug("a device without a namespace"))?.as_fd();
    let inside = made_in(make::common(link, number), there);
    match outside {
        Outside::Veth { name, bridge } => {
            // The kernel takes the number of the first end only.
            let host = undo.host.as_raw_fd().cast_unsigned();
            let peer = Body::new(&make::head(0, 0, 0)).text(link::IFLA_IFNAME, name);
            let data = Body::default().nest(VETH_INFO_PEER, &peer.word(link::IFLA_NET_NS_FD, host));
            let info = Body::default().text(link::INFO_KIND, "veth").nest(link::INFO_DATA | NESTED, &data);
            let body = inside.nest(link::IFLA_LINKINFO, &info);
            netlink.request("RTM_NEWLINK", RTM_NEWLINK, CREATE | EXCL, &body.0).map_err(|e| {
                if e.errno() == Some(libc::EEXIST) {
                    e.remedy(format!("remove the device {name} that is there, or choose another name"))
                } else {
                    e
                }
            })?;
            let index = index(netlink, name)?;
            undo.made.push((at, Made::Pair(index)));
            if let Some(bridge) = bridge {
                let bridge = self::index(netlink, bridge)?;
                let body = Body::new(&make::head(index, UP, UP)).word(link::IFLA_MASTER, bridge);
                netlink.request("RTM_SETLINK", RTM_SETLINK, 0, &body.0)?;
            }
        }
        Outside::Macvlan { link: lower } => {
            let entry = link.entry.macvlan.as_ref();
            let entry = entry.ok_or_else(|| Error::image("its macvlan entry is missing"))?;
            let lower = index(netlink, lower)?;
            let body = inside.word(link::IFLA_LINK, lower).nest(link::IFLA_LINKINFO, &make::macvlan(entry));
            netlink.request("RTM_NEWLINK", RTM_NEWLINK, CREATE | EXCL, &body.0)?;
            undo.made.push((at, Made::Inside(number)));
        }
        Outside::Netdev { original } => {
            let before = find(netlink, original)?;
            let index = Told::of(&before).map_or(0, |t| t.index);
            let addresses = address::of_device(netlink, index)?;
            let body = moving(index, name, number, there);
            netlink.request("RTM_NEWLINK", RTM_NEWLINK, 0, &body.0)?;
            undo.made.push((at, Made::Moved { before, addresses, name: name.clone() }));
        }
    }
    Ok(())
}
