//! Network namespaces: devices, addresses, routes, rules, settings, packet filters, followed connections.
//!
//! A dump looks at each namespace from inside of it, in a thread that has entered it. A restore is in two parts, of all
//! namespaces of a tree together: they get the numbers by which they know each other ([`introduce`]), and what comes
//! from the outside is made there, by the engine ([`restore_outside`]); then all else is made inside of the new
//! namespaces, by a task of the tree ([`restore`]), in this order:
//!
//! ```text
//! settings of the namespaces  devices that are made take theirs from the defaults
//! devices                     routes and addresses are of devices; some stand in two namespaces
//! up                          all settings of devices say by now how; an end waits for the other
//! each namespace:
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
mod nets;
mod networks;
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

use self::netlink::{Message, Netlink};
pub use self::{
    nets::{Nets, introduce, read, restore},
    networks::Networks,
    outside::{Undo, restore_outside},
    tun::{ASKED as TUN_ASKED, PERSISTS as TUN_PERSISTS, Tun},
};
use crate::{
    error::{Context, Result},
    netlock::Whole,
    options::DumpOptions,
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
