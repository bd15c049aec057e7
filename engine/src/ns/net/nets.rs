//! The network namespaces of a tree to be: read and decided about as one, as devices may stand in two of them, and made
//! together.

use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use nix::sched::CloneFlags;
use rcriu_images::{ImageDir, ImageKind, pb};

use super::{
    address,
    conntrack::Tracked,
    link::{self, Told},
    make, neighbour,
    netfilter::Filters,
    netlink::{Body, Message, Netlink},
    plan::{self, Entries, Link},
    route, rule, sysctl,
};
use crate::{
    error::{Context, Error, Result, SysContext},
    ns::enter::here,
    options::RestoreOptions,
};

/// One of them, checked.
#[derive(Clone, Debug)]
pub(super) struct Net {
    pub(super) id: u32,
    /// Nothing is made in it.
    empty: bool,
    /// Settings that this kernel has not are passed over.
    pub(super) weak: bool,
    conf: pb::NetnsEntry,
    sysctls: Vec<pb::RcriuNetSysctl>,
    pub(super) links: Vec<Link>,
    addresses: Vec<Message>,
    neighbours: Vec<Message>,
    routes: Vec<Message>,
    /// `None` leaves those a namespace is born with.
    rules: Option<Vec<Message>>,
    filters: Filters,
    tracked: Tracked,
}

/// All network namespaces of a tree: that of its root task is the first.
#[derive(Clone, Debug)]
pub struct Nets(Vec<Net>);

/// Reads the images of namespaces `ids`, and decides what is done about each device. Makes nothing.
///
/// # Errors
/// Damaged images; what cannot be restored here, or only with an option that is missing.
pub fn read(images: &ImageDir, ids: &[u32], opts: &RestoreOptions) -> Result<Nets> {
    let of = |id: &u32| devices(images, *id, opts).during(|| format!("network namespace {id}"));
    // Of all of them before anything is decided: what is missing is missed by others.
    let entries: Entries = ids.iter().map(of).collect::<Result<_>>()?;
    let one = |id: &u32| read_one(images, *id, &entries, opts).during(|| format!("network namespace {id}"));
    Ok(Nets(ids.iter().map(one).collect::<Result<_>>()?))
}

/// The devices of namespace `id`, with its number.
fn devices(images: &ImageDir, id: u32, opts: &RestoreOptions) -> Result<(u32, Vec<pb::NetDeviceEntry>)> {
    let conf: pb::NetnsEntry = images.read_opt(ImageKind::Netns, id.into())?.unwrap_or_default();
    if opts.common.empty_net_ns || conf.ext_key.is_some() {
        return Ok((id, Vec::new()));
    }
    let devices = images.read_all::<pb::NetDeviceEntry>(ImageKind::Netdev, id.into())?;
    // Every namespace has devices, and every dump tells of addresses.
    let missing = |kind: ImageKind| {
        let name = kind.file_name(id.into());
        Error::image(format!("{name}: there is no such image"))
            .remedy("restore with --empty-ns net what was dumped with it")
    };
    if devices.is_empty() {
        return Err(missing(ImageKind::Netdev));
    }
    if images.open_raw(ImageKind::Ifaddr, id.into())?.is_none() {
        return Err(missing(ImageKind::Ifaddr));
    }
    Ok((id, devices))
}

fn read_one(images: &ImageDir, id: u32, entries: &Entries, opts: &RestoreOptions) -> Result<Net> {
    let conf: pb::NetnsEntry = images.read_opt(ImageKind::Netns, id.into())?.unwrap_or_default();
    let empty = opts.common.empty_net_ns || conf.ext_key.is_some();
    let mut net = Net {
        id,
        empty,
        weak: opts.common.weak_sysctls,
        conf,
        sysctls: Vec::new(),
        links: Vec::new(),
        addresses: Vec::new(),
        neighbours: Vec::new(),
        routes: Vec::new(),
        rules: None,
        filters: Filters::default(),
        tracked: Tracked::default(),
    };
    if net.conf.ext_key.is_some() {
        return Ok(net);
    }
    net.tracked = Tracked::read(images, id)?;
    if empty {
        return Ok(net);
    }
    if let Some(other) = net.conf.nsids.iter().find(|n| entries.iter().all(|(id, _)| *id != n.target_ns_id)) {
        return Err(Error::image(format!(
            "it knows network namespace {} by a number, and no task is in that one",
            other.target_ns_id
        )));
    }
    let more: pb::RcriuNetnsEntry = images.read_opt(ImageKind::RcriuNetns, id.into())?.unwrap_or_default();
    let name = ImageKind::RcriuNetns.file_name(id.into());
    let messages = |all: &[Vec<u8>]| -> Result<Vec<Message>> {
        Ok(all.iter().map(|bytes| Message::all(bytes, &name)).collect::<Result<Vec<_>>>()?.concat())
    };
    net.links = plan::links(id, entries, &messages(&more.link)?, &opts.common.external)?;
    net.neighbours = messages(&more.neighbour)?;
    if net.neighbours.iter().any(|m| !neighbour::is_one(m))
        || more.link.iter().flat_map(|b| Message::all(b, &name)).flatten().any(|m| Told::of(&m).is_none())
    {
        return Err(Error::image(format!("{name}: a message of another kind")));
    }
    if let Some(odd) = more.sysctl.iter().find(|s| !sysctl::is_one(s)) {
        return Err(Error::image(format!("{name}: {} is no setting of a network namespace", odd.path)));
    }
    net.neighbours.retain(|m| net.links.iter().any(|l| Some(l.entry.ifindex) == neighbour::device(m)));
    net.sysctls = more.sysctl;
    net.addresses = address::read(images, id)?;
    net.routes = route::read(images, id)?;
    net.rules = rule::read(images, id)?;
    net.filters = Filters::read(images, id)?;
    Ok(net)
}

impl Nets {
    /// Their numbers in images.
    pub fn ids(&self) -> impl Iterator<Item = u32> {
        self.0.iter().map(|net| net.id)
    }

    /// The name of namespace `id`, if it is an external one: `--inherit-fd fd[N]:NAME` says which one it is. Neither
    /// [`restore_outside`](super::restore_outside) nor [`restore`] do anything to it.
    pub fn external(&self, id: u32) -> Option<&str> {
        self.0.iter().find(|net| net.id == id)?.external()
    }

    /// Whether there is more than one.
    pub fn is_several(&self) -> bool {
        self.0.len() > 1
    }

    /// Whether [`restore_outside`](super::restore_outside) has anything to do.
    pub fn needs_outside(&self) -> bool {
        self.0.iter().flat_map(|net| &net.links).any(|l| matches!(l.how, plan::How::Outside(_)))
    }

    pub(super) fn each(&self) -> &[Net] {
        &self.0
    }
}

impl Net {
    fn external(&self) -> Option<&str> {
        self.conf.ext_key.as_deref()
    }
}

/// The file of namespace `id` among `spaces`.
pub(super) fn space<'a>(spaces: &[(u32, BorrowedFd<'a>)], id: u32) -> Result<BorrowedFd<'a>> {
    let found = spaces.iter().find(|(known, _)| *known == id);
    Ok(found.ok_or_else(|| Error::bug(format!("network namespace {id} is not made")))?.1)
}

/// Gives the namespaces the numbers by which they know each other; `spaces` are files of all of them.
///
/// Precondition: they are new: no device of one has an end in another or outside, which would take a number.
///
/// # Errors
/// Numbers that are taken, in namespaces from outside.
pub fn introduce(nets: &Nets, spaces: &[(u32, BorrowedFd<'_>)]) -> Result<()> {
    for net in nets.0.iter().filter(|net| !net.empty && !net.conf.nsids.is_empty()) {
        let set = || -> Result<()> {
            let mut netlink = Netlink::route()?;
            for number in &net.conf.nsids {
                let other = space(spaces, number.target_ns_id)?.as_raw_fd().cast_unsigned();
                link::set_number(&mut netlink, other, number.netnsid_value)
                    .during(|| format!("number {} of {}", number.netnsid_value, number.target_ns_id))?;
            }
            Ok(())
        };
        here(space(spaces, net.id)?, CloneFlags::CLONE_NEWNET, set)
            .during(|| format!("network namespace {}", net.id))?;
    }
    Ok(())
}

/// A namespace that is being filled.
pub(super) struct Space<'a> {
    pub(super) net: &'a Net,
    pub(super) file: BorrowedFd<'a>,
    /// This thread is in another.
    away: bool,
    /// Of this namespace, from wherever it is asked.
    pub(super) netlink: Netlink,
}

impl<'a> Space<'a> {
    fn new(net: &'a Net, file: BorrowedFd<'a>, away: bool) -> Result<Space<'a>> {
        let netlink = match away {
            true => here(file, CloneFlags::CLONE_NEWNET, Netlink::route)?,
            false => Netlink::route()?,
        };
        Ok(Space { net, file, away, netlink })
    }

    /// Acts in the namespace.
    pub(super) fn within<T>(&mut self, act: impl FnOnce(&Net, &mut Netlink) -> Result<T>) -> Result<T> {
        let (net, netlink) = (self.net, &mut self.netlink);
        let done = match self.away {
            true => here(self.file, CloneFlags::CLONE_NEWNET, || act(net, netlink)),
            false => act(net, netlink),
        };
        done.during(|| format!("network namespace {}", net.id))
    }
}

/// Makes everything inside of the network namespace this thread is in, a new one, and in all `others`.
///
/// Precondition: `/proc` is a procfs that shows this thread; [`introduce`] and [`restore_outside`] are done;
/// CAP_NET_ADMIN in the user namespace that the network namespaces belong to, and CAP_SYS_ADMIN if there are others.
///
/// # Errors
/// What the kernel refuses. The namespaces are of no use then.
///
/// [`restore_outside`]: super::restore_outside
pub fn restore(nets: &Nets, others: &[(u32, BorrowedFd<'_>)]) -> Result<()> {
    let path = "/proc/thread-self/ns/net";
    let own = File::open(path).call(format!("open({path})"))?;
    let mut spaces = Vec::new();
    for (at, net) in nets.0.iter().enumerate().filter(|(_, net)| net.external().is_none()) {
        let file = if at == 0 { own.as_fd() } else { space(others, net.id)? };
        spaces.push(Space::new(net, file, at > 0)?);
    }
    for space in spaces.iter_mut().filter(|space| !space.net.empty) {
        space.within(|net, _| {
            sysctl::restore(&net.conf, net.weak)?;
            sysctl::restore_more(&net.sysctls, net.weak)
        })?;
    }
    make::all(&mut spaces)?;
    for space in &mut spaces {
        space.within(make::up)?;
    }
    spaces.iter_mut().try_for_each(|space| space.within(fill))
}

/// Makes all but devices.
fn fill(net: &Net, netlink: &mut Netlink) -> Result<()> {
    if !net.empty {
        address::restore(netlink, &net.addresses)?;
        sysctl::finish(&net.conf, net.weak)?;
        make::finish(net)?;
        address::look_for_duplicates(netlink, &net.addresses)?;
        neighbour::restore(netlink, &net.neighbours)?;
        route::restore(netlink, &net.routes)?;
        if let Some(rules) = &net.rules {
            rule::restore(netlink, rules)?;
        }
        net.filters.restore()?;
    }
    net.tracked.restore()
}

/// The body of a request about a device that is to be made in `there`, asked for elsewhere.
pub(super) fn made_in(body: Body, there: BorrowedFd<'_>) -> Body {
    body.word(link::IFLA_NET_NS_FD, there.as_raw_fd().cast_unsigned())
}
