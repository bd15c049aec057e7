//! Network namespaces: devices, addresses, routes, rules, settings, packet filters, followed connections.
//!
//! A dump looks at the namespace from inside of it, in a thread that has entered it. A restore is in two parts: what
//! comes from the outside is made there, by the engine ([`restore_outside`]); then all else is made inside of the
//! new namespace, by a task of the tree ([`restore`]), in this order:
//!
//! ```text
//! settings of the namespace   devices that are made take theirs from its defaults
//! devices                     routes and addresses are of devices
//! up                          all settings of devices say by now how
//! addresses                   sources of routes; what the kernel made up goes
//! neighbours, routes, rules
//! filters                     last: they speak of devices
//! followed connections        nobody is there who could have begun one
//! ```

mod address;
mod conntrack;
#[cfg(test)]
mod interop;
mod link;
mod make;
mod neighbour;
mod netfilter;
pub(crate) mod netlink;
mod outside;
mod plan;
mod program;
mod raw;
mod route;
mod rule;
mod saved;
mod sysctl;
#[cfg(test)]
mod tests;
mod tun;
mod unkept;

use std::os::fd::BorrowedFd;

use rcriu_images::{ImageDir, ImageKind, pb};

use self::{
    conntrack::Tracked,
    link::Told,
    netfilter::Filters,
    netlink::{Message, Netlink},
    plan::Link,
};
pub use self::{
    outside::{Undo, restore_outside},
    tun::{ASKED as TUN_ASKED, PERSISTS as TUN_PERSISTS, Tun},
};
use crate::{
    error::{Context, Error, Result},
    netlock::Whole,
    options::{DumpOptions, RestoreOptions},
};

/// Numbers of users or groups of a user namespace; an empty map is that of who has none of its own.
#[derive(Clone, Copy, Debug, Default)]
pub struct IdMap<'a>(pub &'a [pb::UidGidExtent]);

impl IdMap<'_> {
    /// The number inside of what is `outside`; `None` if it has none.
    pub fn inside(self, outside: u32) -> Option<u32> {
        if self.0.is_empty() {
            return Some(outside);
        }
        self.0.iter().find_map(|extent| {
            let at = outside.checked_sub(extent.lower_first)?;
            if at < extent.count { extent.first.checked_add(at) } else { None }
        })
    }
}

/// What a dump of a network namespace needs to know.
#[derive(Clone, Copy, Debug)]
pub struct DumpNet<'a> {
    /// Number of the namespace in images.
    pub id: u32,
    /// Options of the dump.
    pub opts: &'a DumpOptions,
    /// Where images go.
    pub images: &'a ImageDir,
    /// The name under which `--external net[INODE]:NAME` leaves the namespace out.
    pub external: Option<&'a str>,
    /// Inode of the namespace, for messages.
    pub inode: Option<u64>,
    /// Other network namespaces of the tree: their numbers in images, and files of them.
    pub others: &'a [(u32, BorrowedFd<'a>)],
    /// Users and groups of the tree's own user namespace.
    pub uids: IdMap<'a>,
    /// See `uids`.
    pub gids: IdMap<'a>,
    /// Devices tun and tap that tasks of the tree have open.
    pub tuns: &'a [Tun],
    /// The lock of this namespace, which images are to hold in the form of CRIU, so that a restore begins locked.
    pub(crate) lock: Option<&'a Whole>,
}

impl<'a> DumpNet<'a> {
    /// A namespace like any other.
    pub fn new(id: u32, opts: &'a DumpOptions, images: &'a ImageDir) -> DumpNet<'a> {
        DumpNet {
            id,
            opts,
            images,
            external: None,
            inode: None,
            others: &[],
            uids: IdMap(&[]),
            gids: IdMap(&[]),
            tuns: &[],
            lock: None,
        }
    }
}

/// Writes the images of the network namespace this thread is in.
///
/// Precondition: the tasks in it are frozen.
///
/// # Errors
/// Whatever cannot be kept, by name.
pub fn dump(cx: &DumpNet<'_>) -> Result<()> {
    dump_all(cx).during(|| format!("network namespace {}", cx.id))
}

fn dump_all(cx: &DumpNet<'_>) -> Result<()> {
    let write = |entry: &pb::NetnsEntry| -> Result<()> {
        let mut out = cx.images.writer(ImageKind::Netns, cx.id.into());
        out.write(entry)?;
        Ok(out.finish()?)
    };
    if let Some(name) = cx.external {
        return write(&pb::NetnsEntry { ext_key: Some(name.to_owned()), ..Default::default() });
    }
    if !cx.opts.common.empty_net_ns {
        unkept::check()?;
        let netlink = &mut Netlink::route()?;
        // Asking a device of programs makes its link come and go, upon which the kernel acts.
        address::dump(netlink, cx.images, cx.id)?;
        route::dump(netlink, cx.images, cx.id)?;
        let (links, nsids) = link::dump(cx, netlink)?;
        rule::dump(netlink, cx.images, cx.id)?;
        netfilter::dump(cx)?;
        write(&pb::NetnsEntry { nsids, ..sysctl::dump(cx.gids)? })?;
        let bytes = |all: Vec<Message>| all.iter().map(|m| m.bytes().to_vec()).collect();
        let more = pb::RcriuNetnsEntry {
            link: bytes(links),
            sysctl: sysctl::dump_more()?,
            neighbour: bytes(neighbour::dump(netlink)?),
        };
        let mut out = cx.images.writer(ImageKind::RcriuNetns, cx.id.into());
        out.write(&more)?;
        out.finish()?;
    }
    conntrack::dump(cx.images, cx.id)
}

/// A network namespace to be, checked.
#[derive(Clone, Debug)]
pub struct Net {
    id: u32,
    /// Nothing is made in it.
    empty: bool,
    /// Settings that this kernel has not are passed over.
    weak: bool,
    conf: pb::NetnsEntry,
    sysctls: Vec<pb::RcriuNetSysctl>,
    links: Vec<Link>,
    addresses: Vec<Message>,
    neighbours: Vec<Message>,
    routes: Vec<Message>,
    /// `None` leaves those a namespace is born with.
    rules: Option<Vec<Message>>,
    filters: Filters,
    tracked: Tracked,
}

/// Reads the images of namespace `id`, and decides what is done about each device. Makes nothing.
///
/// # Errors
/// Damaged images; what cannot be restored here, or only with an option that is missing.
pub fn read(images: &ImageDir, id: u32, opts: &RestoreOptions) -> Result<Net> {
    read_all(images, id, opts).during(|| format!("network namespace {id}"))
}

fn read_all(images: &ImageDir, id: u32, opts: &RestoreOptions) -> Result<Net> {
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
    if let Some(other) = net.conf.nsids.first() {
        return Err(Error::unsupported(format!(
            "it knows network namespace {} by a number, and trees with several are not supported",
            other.target_ns_id
        ))
        .remedy("restore these images with CRIU"));
    }
    // Every namespace has devices, and every dump tells of addresses.
    let missing = |kind: ImageKind| {
        let name = kind.file_name(id.into());
        Error::image(format!("{name}: there is no such image"))
            .remedy("restore with --empty-ns net what was dumped with it")
    };
    if images.read_all::<pb::NetDeviceEntry>(ImageKind::Netdev, id.into())?.is_empty() {
        return Err(missing(ImageKind::Netdev));
    }
    if images.open_raw(ImageKind::Ifaddr, id.into())?.is_none() {
        return Err(missing(ImageKind::Ifaddr));
    }
    let more: pb::RcriuNetnsEntry = images.read_opt(ImageKind::RcriuNetns, id.into())?.unwrap_or_default();
    let name = ImageKind::RcriuNetns.file_name(id.into());
    let messages = |all: &[Vec<u8>]| -> Result<Vec<Message>> {
        Ok(all.iter().map(|bytes| Message::all(bytes, &name)).collect::<Result<Vec<_>>>()?.concat())
    };
    let entries = images.read_all::<pb::NetDeviceEntry>(ImageKind::Netdev, id.into())?;
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

impl Net {
    /// The name of an external namespace: `--inherit-fd fd[N]:NAME` says which one it is. Neither
    /// [`restore_outside`] nor [`restore`] do anything to it.
    pub fn external(&self) -> Option<&str> {
        self.conf.ext_key.as_deref()
    }

    /// Whether [`restore_outside`] has anything to do.
    pub fn needs_outside(&self) -> bool {
        self.links.iter().any(|l| matches!(l.how, plan::How::Outside(_)))
    }
}

/// Makes everything inside of the network namespace this thread is in, a new one.
///
/// Precondition: `/proc` is a procfs that shows this thread; [`restore_outside`] is done; CAP_NET_ADMIN in the user
/// namespace that the network namespace belongs to.
///
/// # Errors
/// What the kernel refuses. The namespace is of no use then.
pub fn restore(net: &Net) -> Result<()> {
    restore_all(net).during(|| format!("network namespace {}", net.id))
}

fn restore_all(net: &Net) -> Result<()> {
    if net.external().is_some() {
        return Ok(());
    }
    if !net.empty {
        let netlink = &mut Netlink::route()?;
        sysctl::restore(&net.conf, net.weak)?;
        sysctl::restore_more(&net.sysctls, net.weak)?;
        make::all(net, netlink)?;
        make::up(net, netlink)?;
        address::restore(netlink, &net.addresses)?;
        sysctl::finish(&net.conf, net.weak)?;
        make::finish(net)?;
        neighbour::restore(netlink, &net.neighbours)?;
        route::restore(netlink, &net.routes)?;
        if let Some(rules) = &net.rules {
            rule::restore(netlink, rules)?;
        }
        net.filters.restore()?;
    }
    net.tracked.restore()
}
