//! Devices of programs, tun and tap: the device itself. Descriptors that stand at its other end are open files.

use std::{
    fs::File,
    io::Read,
    os::fd::{AsFd, BorrowedFd},
};

use nix::fcntl::{OFlag, openat};
use rcriu_images::pb;

use super::{
    DumpNet,
    link::{INFO_DATA, Told},
};
use crate::{
    error::{Context, Error, Result, SysContext},
    sys::{fsmount, tun},
};

/// What is asked for when a device is made or opened again: type, packet information, checksums, queues.
pub const ASKED: u32 = 0x1 | 0x2 | 0x10 | 0x20 | 0x100 | 0x1000 | 0x2000 | 0x4000;
const IFF_TAP: u32 = 2;
/// Stays when nobody has it open.
pub const PERSISTS: u32 = 0x800;
/// The queue of a file is not in use.
const IFF_DETACH_QUEUE: u32 = 0x400;

/// Settings of a device that only a descriptor of it tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tun {
    /// Name of the device.
    pub name: String,
    /// Bytes of the header before each packet.
    pub vnethdr: u32,
    /// Bytes that may wait to be sent.
    pub sndbuf: u32,
}

impl Tun {
    /// The device whose other end is open file `file`, and whether its queue is out of use; `None` if it has none.
    ///
    /// # Errors
    /// Settings that images have no place for.
    pub fn of_file(file: BorrowedFd<'_>) -> Result<Option<(Tun, bool)>> {
        let Some((name, flags)) = tun::device(file)? else { return Ok(None) };
        let device = Tun::ask(name.clone(), flags, file).during(|| format!("network device {name}"))?;
        Ok(Some((device, flags & IFF_DETACH_QUEUE != 0)))
    }

    fn ask(name: String, flags: u32, file: BorrowedFd<'_>) -> Result<Tun> {
        if flags & IFF_TAP != 0 && tun::has_filter(file)? {
            return Err(Error::unsupported("a filter of packets is attached to it, which is not supported")
                .remedy("take it off with TUNDETACHFILTER"));
        }
        if tun::has_byte_order(file)? {
            return Err(Error::unsupported(
                "the byte order of its headers is set (TUNSETVNETLE, TUNSETVNETBE), which is not supported",
            )
            .remedy("close it before the dump"));
        }
        Ok(Tun { name, vnethdr: tun::header(file)?, sndbuf: tun::send_buffer(file)? })
    }
}

/// Reads what is particular to device `told`.
///
/// # Errors
/// One that goes with its last descriptor, which is not among those of the tree; one that somebody outside has open.
pub(super) fn dump(cx: &DumpNet<'_>, told: Told<'_>) -> Result<pb::TunLinkEntry> {
    let (flags, owner, group) = match of_sysfs(told.name) {
        Ok(found) => found,
        Err(e) => of_message(told).ok_or(e)?,
    };
    let known = cx.tuns.iter().find(|t| t.name == told.name).cloned();
    let known = match known {
        Some(known) => known,
        None if flags & PERSISTS == 0 => {
            return Err(Error::unsupported("no task of the tree has it open, and it goes with who has")
                .remedy("dump the tree that uses it, or make it persistent"));
        }
        // Nobody has it open, or this says so.
        None => ask(told.name, flags).map_err(|e| match e.errno() {
            Some(libc::EBUSY) => {
                Error::unsupported("a process outside of the tree has it open").remedy("close it there")
            }
            _ => e,
        })?,
    };
    let inside = |id: u32, map: super::IdMap<'_>| match id {
        u32::MAX => Some(-1),
        id => map.inside(id).map(u32::cast_signed),
    };
    let nobody = || Error::unsupported("its owner is no user of the tree's user namespace");
    Ok(pb::TunLinkEntry {
        flags,
        owner: inside(owner, cx.uids).ok_or_else(nobody)?,
        group: inside(group, cx.gids).ok_or_else(nobody)?,
        vnethdr: known.vnethdr,
        sndbuf: known.sndbuf,
    })
}

/// Flags, owner, group as the kernel's files have them.
fn of_sysfs(name: &str) -> Result<(u32, u32, u32)> {
    // It shows the devices of the namespace in which it is mounted.
    let root = fsmount::detached("sysfs", &[])?;
    let number = |file: &str| {
        let path = format!("class/net/{name}/{file}");
        let fd =
            openat(&root, path.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, nix::sys::stat::Mode::empty());
        let mut text = String::new();
        File::from(fd.call("openat").during(|| path.clone())?).read_to_string(&mut text).call("read")?;
        let text = text.trim();
        let parsed = match text.strip_prefix("0x") {
            Some(digits) => u32::from_str_radix(digits, 16).ok(),
            None => text.parse::<i64>().ok().map(|n| n as u32),
        };
        parsed.ok_or_else(|| Error::host(format!("{path} says {text}")))
    };
    Ok((number("tun_flags")?, number("owner")?, number("group")?))
}

/// The same from the kernel's message (Linux 4.20).
fn of_message(told: Told<'_>) -> Option<(u32, u32, u32)> {
    let data = told.info().inside(INFO_DATA);
    let on = |kind, flag| if data.byte(kind).is_some_and(|on| on != 0) { flag } else { 0 };
    let information = if data.byte(4)? == 0 { 0x1000 } else { 0 };
    let flags = u32::from(data.byte(3)?) | information | on(5, 0x4000) | on(6, PERSISTS) | on(7, 0x100);
    Some((flags, data.word(1).unwrap_or(u32::MAX), data.word(2).unwrap_or(u32::MAX)))
}

/// Opens a device that nobody has open, to ask it.
fn ask(name: &str, flags: u32) -> Result<Tun> {
    let file = tun::open()?;
    // Opening it sets what is not said again. Without packet information the same bit keeps away a filter that the
    // last opener has left, whose program would be looked for in our memory.
    tun::attach(file.as_fd(), name, flags & ASKED)?;
    Tun::ask(name.to_owned(), flags, file.as_fd())
}

/// Makes a device, which stays without anybody who has it open.
///
/// Whoever opens it first and was to have it alone must make it go with its last descriptor again (TUNSETPERSIST).
pub(super) fn make(name: &str, index: u32, entry: &pb::TunLinkEntry) -> Result<()> {
    let file = tun::open()?;
    let fd = file.as_fd();
    tun::set_index(fd, index)?;
    tun::attach(fd, name, entry.flags & ASKED)?;
    if entry.owner != -1 {
        tun::set_owner(fd, entry.owner.cast_unsigned())?;
    }
    if entry.group != -1 {
        tun::set_group(fd, entry.group.cast_unsigned())?;
    }
    tun::set_send_buffer(fd, entry.sndbuf)?;
    tun::set_header(fd, entry.vnethdr)?;
    tun::set_persistent(fd, true)
}
