//! Writing properties of groups: each at its time and in the form the kernel takes.

use std::{
    fs::File,
    io::Read,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag},
    sys::stat::{FchmodatFlags, Mode, fchmod, fchmodat},
    unistd::{Gid, Uid, fchown, fchownat},
};
use rcriu_images::pb;

use super::properties;
use crate::error::{Context, Error, Result, SysContext};

/// When a property can be set.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum When {
    /// As soon as the group is made, before it has members or children.
    Empty,
    /// Once everybody is in.
    Settled,
    /// Once everybody has been let go.
    Resumed,
}

/// When to set the property `name`.
pub fn when(name: &str) -> When {
    match name {
        "cpuset.cpus"
        | "cpuset.mems"
        | "devices.list"
        | "memory.kmem.limit_in_bytes"
        | "memory.swappiness"
        | "memory.oom_control"
        | "memory.use_hierarchy"
        | "cgroup.type" => When::Empty,
        "freezer.state" | "cgroup.freeze" => When::Resumed,
        _ => When::Settled,
    }
}

/// The value as it is now; `None` where there is none to give back.
pub fn get(root: &OwnedFd, group: &[u8], name: &str) -> Result<Option<pb::CgroupPropEntry>> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let path = std::ffi::OsStr::from_bytes(group);
    let folder = nix::fcntl::openat(root.as_fd(), path, flags, Mode::empty()).call("openat")?;
    properties::read(&folder, name)
}

/// Sets a property of the group at `group` below the hierarchy's `root`, with its permissions.
///
/// # Errors
/// A property that this kernel or the parent group does not offer, or a value it does not take.
pub fn set(root: &OwnedFd, group: &[u8], property: &pb::CgroupPropEntry) -> Result<()> {
    let value = &property.value;
    log::info!("Restoring cgroup property {} [{}]", property.name, String::from_utf8_lossy(value));
    let result = match (property.name.as_str(), value.as_slice()) {
        // Older kernels refuse even their default where a group has members.
        ("memory.swappiness", b"60") | ("memory.oom_control", b"0") => Ok(()),
        ("devices.list", _) => devices(root, group, property),
        (name, _) if properties::has_only_perms(name) => perms(root, group, property),
        ("cgroup.type", other) if other != b"threaded" => open(root, group, property).map(drop),
        ("cgroup.subtree_control", _) => subtree_control(root, group, property),
        ("net_prio.ifpriomap", _) => priorities(root, group, property),
        ("io.max", _) => each_line(&open(root, group, property)?, value),
        ("memory.kmem.limit_in_bytes", _) => {
            match write(&open(root, group, property)?, value) {
                // Nothing limits it any more since 5.16.
                Err(e) if e.errno() == Some(libc::EOPNOTSUPP) => Ok(()),
                other => other,
            }
        }
        _ => write(&open(root, group, property)?, value),
    };
    result
        .during(|| format!("property {} ({})", property.name, String::from_utf8_lossy(value).escape_debug()))
}

/// Gives the file its permissions. Opening some of them takes rights of its own.
fn perms(root: &OwnedFd, group: &[u8], property: &pb::CgroupPropEntry) -> Result<()> {
    let Some(perms) = &property.perms else { return Ok(()) };
    let path = below(group, &property.name);
    let path = std::ffi::OsStr::from_bytes(&path);
    let (uid, gid) = (Uid::from_raw(perms.uid), Gid::from_raw(perms.gid));
    match fchownat(root, path, Some(uid), Some(gid), AtFlags::empty()) {
        Err(Errno::ENOENT) => {
            log::warn!("{} is not there: whose it is was not set", String::from_utf8_lossy(path.as_bytes()));
            return Ok(());
        }
        other => other.call("fchownat")?,
    }
    fchmodat(root, path, Mode::from_bits_truncate(perms.mode), FchmodatFlags::FollowSymlink).call("fchmodat")
}

/// Opens the file and gives it its permissions.
fn open(root: &OwnedFd, group: &[u8], property: &pb::CgroupPropEntry) -> Result<OwnedFd> {
    let readable = property.name == "cgroup.subtree_control";
    let flags = if readable { OFlag::O_RDWR } else { OFlag::O_WRONLY } | OFlag::O_CLOEXEC;
    let path = below(group, &property.name);
    let fd = nix::fcntl::openat(root.as_fd(), std::ffi::OsStr::from_bytes(&path), flags, Mode::empty())
        .call("openat")
        .map_err(|e| match e.errno() {
            Some(libc::ENOENT) => e.remedy(
                "this kernel does not have it, or the parent group's cgroup.subtree_control lacks its controller",
            ),
            _ => e,
        })?;
    if let Some(perms) = &property.perms {
        fchown(&fd, Some(Uid::from_raw(perms.uid)), Some(Gid::from_raw(perms.gid))).call("fchown")?;
        fchmod(&fd, Mode::from_bits_truncate(perms.mode)).call("fchmod")?;
    }
    Ok(fd)
}

/// `group/name`.
pub fn below(group: &[u8], name: &str) -> Vec<u8> {
    [group, b"/", name.as_bytes()].concat()
}

fn write(fd: &OwnedFd, value: &[u8]) -> Result<()> {
    let written = nix::unistd::write(fd, value).call("write")?;
    if written == value.len() { Ok(()) } else { Err(Error::sys("write", Errno::EIO as i32)) }
}

/// Writes to the file at `path` below `root`.
pub fn write_to(root: BorrowedFd<'_>, path: &[u8], value: &[u8]) -> Result<()> {
    let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
    let path = std::ffi::OsStr::from_bytes(path);
    write(&nix::fcntl::openat(root, path, flags, Mode::empty()).call("openat")?, value)
}

/// The kernel reads one line for each write.
fn each_line(fd: &OwnedFd, value: &[u8]) -> Result<()> {
    value.split(|c| *c == b'\n').filter(|l| !l.is_empty()).try_for_each(|line| write(fd, line))
}

/// What may be used can be read as a list; it is set by forbidding all and then allowing each line.
fn devices(root: &OwnedFd, group: &[u8], property: &pb::CgroupPropEntry) -> Result<()> {
    let file = |name: &str| -> Result<OwnedFd> {
        // The list itself can only be read: its permissions are not those of these files.
        open(root, group, &pb::CgroupPropEntry { name: name.into(), value: Vec::new(), perms: None })
    };
    write(&file("devices.deny")?, b"a")?;
    each_line(&file("devices.allow")?, &property.value)
}

/// Removes what is handed down and adds what shall be.
fn subtree_control(root: &OwnedFd, group: &[u8], property: &pb::CgroupPropEntry) -> Result<()> {
    let fd = open(root, group, property)?;
    let mut now = String::new();
    let mut file = File::from(fd);
    file.read_to_string(&mut now).call("read")?;
    let wanted = String::from_utf8_lossy(&property.value);
    let change = change(&now, &wanted);
    if change.is_empty() { Ok(()) } else { write(&file.into(), change.as_bytes()) }
}

fn change(now: &str, wanted: &str) -> String {
    let (now, wanted): (Vec<_>, Vec<_>) =
        (now.split_whitespace().collect(), wanted.split_whitespace().collect());
    let less = now.iter().filter(|c| !wanted.contains(c)).map(|c| format!("-{c}"));
    let more = wanted.iter().filter(|c| !now.contains(c)).map(|c| format!("+{c}"));
    less.chain(more).collect::<Vec<_>>().join(" ")
}

/// Only priorities that are not the default; interfaces that are not here have none.
fn priorities(root: &OwnedFd, group: &[u8], property: &pb::CgroupPropEntry) -> Result<()> {
    let text = String::from_utf8_lossy(&property.value).into_owned();
    let set: Vec<&str> = text.lines().filter(|l| !l.trim_end().ends_with(" 0")).collect();
    if set.is_empty() {
        return Ok(());
    }
    let fd = open(root, group, property)?;
    for line in set {
        if let Err(e) = write(&fd, line.as_bytes()) {
            log::warn!("net_prio.ifpriomap: {line:?} was not set: {e}");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controllers_that_stay_are_not_touched() {
        assert_eq!(change("cpu io\n", "io memory"), "-cpu +memory");
        assert_eq!(change("cpu", "cpu"), "");
    }

    #[test]
    fn freezing_comes_last_and_cpus_first() {
        assert_eq!(when("cpuset.cpus"), When::Empty);
        assert_eq!(when("cgroup.freeze"), When::Resumed);
        assert_eq!(when("memory.max"), When::Settled);
    }
}
