//! Probes about namespaces and mounts, in a child with namespaces of its own.
//!
//! # Safety
//! As in the parent module.
#![allow(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::{answer, exists, in_child};
use crate::error::{Error, Result, SysContext};

pub(crate) fn cgroup_ns() -> Result<bool> {
    exists("/proc/self/ns/cgroup")
}

pub(crate) fn user_ns() -> Result<bool> {
    exists("/proc/self/ns/user")
}

pub(crate) fn time_ns() -> Result<bool> {
    exists("/proc/self/timens_offsets")
}

/// A folder in a mount namespace of our own, with a fresh tmpfs on it.
fn own_mounts() -> Result<&'static str> {
    unshare(CloneFlags::CLONE_NEWNS).call("unshare(CLONE_NEWNS)")?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).call("mount(MS_PRIVATE)")?;
    // Any folder that no probe needs; nobody else sees this.
    let place = ["/tmp", "/mnt", "/run", "/dev"].into_iter().find(|p| std::path::Path::new(p).is_dir());
    let place = place.ok_or_else(|| Error::host("there is no folder to mount a tmpfs on for the probe"))?;
    mount(Some("probe"), place, Some("tmpfs"), MsFlags::empty(), none).call("mount(tmpfs)")?;
    Ok(place)
}

/// A mount can be put into the peer group of another one.
pub(crate) fn move_mount_set_group() -> Result<bool> {
    const MOVE_MOUNT_SET_GROUP: u32 = 0x100;
    in_child(|| {
        let place = own_mounts()?;
        let inner = format!("{place}/inner");
        fs::create_dir(&inner).call("mkdir")?;
        let none = None::<&str>;
        mount(Some(inner.as_str()), inner.as_str(), none, MsFlags::MS_BIND, none).call("mount(MS_BIND)")?;
        mount(none, place, none, MsFlags::MS_SHARED, none).call("mount(MS_SHARED)")?;
        let from = std::ffi::CString::new(place).unwrap_or_default();
        let to = std::ffi::CString::new(inner).unwrap_or_default();
        // SAFETY: two terminated strings.
        let r = unsafe {
            libc::syscall(
                libc::SYS_move_mount,
                libc::AT_FDCWD,
                from.as_ptr(),
                libc::AT_FDCWD,
                to.as_ptr(),
                MOVE_MOUNT_SET_GROUP,
            )
        };
        answer("move_mount(MOVE_MOUNT_SET_GROUP)", r, &[libc::EINVAL, libc::ENOSYS])
    })
}

/// Device and inode of a file on overlayfs are the same in `/proc/PID/maps` as in stat(2).
pub(crate) fn overlayfs_maps() -> Result<bool> {
    in_child(|| {
        let place = own_mounts()?;
        for name in ["lower", "upper", "work", "all"] {
            fs::create_dir(format!("{place}/{name}")).call("mkdir")?;
        }
        let options = format!("lowerdir={place}/lower,upperdir={place}/upper,workdir={place}/work");
        let target = format!("{place}/all");
        mount(Some("probe"), target.as_str(), Some("overlay"), MsFlags::empty(), Some(options.as_str()))
            .call("mount(overlay)")?;
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(format!("{target}/file"));
        let file = file.call("open")?;
        file.set_len(4096).call("ftruncate")?;
        same_in_maps(&file)
    })
}

fn same_in_maps(file: &File) -> Result<bool> {
    // SAFETY: one page of a file of one page; nothing touches it.
    let at = unsafe {
        libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0)
    };
    if at == libc::MAP_FAILED {
        return Err(Error::sys("mmap", super::errno()));
    }
    let stat = file.metadata().call("fstat")?;
    let (major, minor) = (nix::sys::stat::major(stat.dev()), nix::sys::stat::minor(stat.dev()));
    let wanted = format!("{major:02x}:{minor:02x} {}", stat.ino());
    let maps = fs::read_to_string("/proc/self/maps").call("read(/proc/self/maps)")?;
    let start = format!("{:x}-", at as usize);
    let found = maps.lines().find(|line| line.trim_start_matches('0').starts_with(&start));
    Ok(found.is_some_and(|line| line.contains(&wanted)))
}

/// Mounts of autofs tell the inode of their pipe.
pub(crate) fn autofs() -> Result<bool> {
    in_child(|| {
        let place = own_mounts()?;
        let (_read, write) = nix::unistd::pipe().call("pipe")?;
        let group = nix::unistd::getpgrp();
        let options = format!("fd={},pgrp={group},minproto=5,maxproto=5,direct", write.as_raw_fd());
        let target = format!("{place}/auto");
        fs::create_dir(&target).call("mkdir")?;
        match mount(Some("probe"), target.as_str(), Some("autofs"), MsFlags::empty(), Some(options.as_str()))
        {
            Ok(()) => {}
            Err(nix::errno::Errno::ENODEV) => return Ok(false),
            Err(e) => return Err(Error::sys("mount(autofs)", e as i32)),
        }
        let text = fs::read_to_string("/proc/self/mountinfo").call("read(/proc/self/mountinfo)")?;
        Ok(text.lines().any(|line| line.contains(" autofs ") && line.contains("pipe_ino=")))
    })
}
