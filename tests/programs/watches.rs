//! Watches on files: inotify and fanotify tell what happens after a restore as they did before.
//!
//! # Safety
//!
//! The calls get strings that end, structures of this thread and room for what they write.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, ensure};
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};

use crate::kit::{Check, rest, same, skip, sys, write};

/// What happened: on which watch, what, to which name.
type Event = (WatchDescriptor, AddWatchFlags, Option<String>);

fn events(of: &Inotify) -> anyhow::Result<Vec<Event>> {
    match of.read_events() {
        Ok(events) => Ok(events
            .into_iter()
            .map(|e| (e.wd, e.mask, e.name.map(|n| n.to_string_lossy().into_owned())))
            .collect()),
        Err(Errno::EAGAIN) => Ok(Vec::new()),
        Err(e) => Err(e).context("read of an inotify queue"),
    }
}

/// A folder, a file, a file that has been removed, a watch that ends with its first event, a number left out.
pub fn inotify(_: &[String]) -> Check {
    use AddWatchFlags as On;
    fs::create_dir("folder").context("mkdir")?;
    for name in ["file", "once", "gone", "unwatched"] {
        write(name, b"x")?;
    }
    let queue = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).context("inotify_init1")?;
    let add = |name: &str, mask: On| queue.add_watch(name, mask).with_context(|| format!("watch of {name}"));
    let folder = add("folder", On::IN_CREATE | On::IN_DELETE | On::IN_MOVED_TO)?;
    let unwatched = add("unwatched", On::IN_OPEN)?;
    let file = add("file", On::IN_MODIFY | On::IN_CLOSE_WRITE)?;
    let once = add("once", On::IN_ATTRIB | On::IN_ONESHOT)?;
    // Without IN_EXCL_UNLINK a removed file that is still open goes on being watched.
    let gone = File::options().read(true).write(true).open("gone").context("open")?;
    let last = add("gone", On::IN_MODIFY)?;
    fs::remove_file("gone").context("unlink")?;
    queue.rm_watch(unwatched).context("inotify_rm_watch")?;
    events(&queue)?;
    rest()?;
    same("events before anything happened", events(&queue)?, vec![])?;
    write("folder/new", b"")?;
    fs::rename("folder/new", "folder/other").context("rename")?;
    fs::remove_file("folder/other").context("unlink")?;
    let name = |n: &str| Some(n.to_string());
    same(
        "events of the folder",
        events(&queue)?,
        vec![
            (folder, On::IN_CREATE, name("new")),
            (folder, On::IN_MOVED_TO, name("other")),
            (folder, On::IN_DELETE, name("other")),
        ],
    )?;
    write("file", b"y")?;
    let of_file = events(&queue)?;
    ensure!(of_file.contains(&(file, On::IN_CLOSE_WRITE, None)), "the file was written: {of_file:?}");
    fs::set_permissions("once", std::os::unix::fs::PermissionsExt::from_mode(0o600)).context("chmod")?;
    same(
        "event of the watch for one event",
        events(&queue)?,
        vec![(once, On::IN_ATTRIB, None), (once, On::IN_IGNORED, None)],
    )?;
    nix::unistd::write(&gone, b"z").context("write")?;
    same("event of the removed file", events(&queue)?, vec![(last, On::IN_MODIFY, None)])?;
    // Its number was free, but numbers are not given twice.
    let next = queue.add_watch("unwatched", On::IN_OPEN).context("watch")?;
    ensure!(![folder, file, once, last].contains(&next), "a number was given twice");
    Ok(())
}

const FAN_CLASS_NOTIF: u32 = 0;
const FAN_CLOEXEC: u32 = 1;
const FAN_NONBLOCK: u32 = 2;
const FAN_MARK_ADD: u32 = 1;
const FAN_MARK_IGNORED_MASK: u32 = 0x20;
const FAN_OPEN: u64 = 0x20;
const FAN_CLOSE_WRITE: u64 = 8;
const FAN_EVENT_ON_CHILD: u64 = 0x0800_0000;

/// `struct fanotify_event_metadata`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Metadata {
    len: u32,
    version: u8,
    reserved: u8,
    metadata_len: u16,
    mask: u64,
    fd: i32,
    pid: i32,
}

/// Events that are there: what happened, to the file of which number.
fn notified(group: &OwnedFd) -> anyhow::Result<Vec<(u64, u64)>> {
    let mut buffer = [Metadata::default(); 64];
    let len = size_of_val(&buffer);
    // SAFETY: the buffer has this many bytes.
    let got = unsafe { libc::read(group.as_raw_fd(), buffer.as_mut_ptr().cast(), len) };
    if got < 0 && Errno::last() == Errno::EAGAIN {
        return Ok(Vec::new());
    }
    let count = sys("read", got)? as usize / size_of::<Metadata>();
    buffer[..count]
        .iter()
        .map(|event| {
            // SAFETY: every event brings a descriptor of its own.
            let file = unsafe { OwnedFd::from_raw_fd(event.fd) };
            Ok((event.mask, nix::sys::stat::fstat(&file).context("fstat")?.st_ino))
        })
        .collect()
}

/// Marks on a file and on what is in a folder; one kind of event on one file is ignored.
pub fn fanotify(_: &[String]) -> Check {
    fs::create_dir("folder").context("mkdir")?;
    for name in ["file", "folder/child", "folder/quiet"] {
        write(name, b"x")?;
    }
    // SAFETY: flags only.
    let group =
        unsafe { libc::fanotify_init(FAN_CLASS_NOTIF | FAN_CLOEXEC | FAN_NONBLOCK, libc::O_RDONLY as u32) };
    if group < 0 {
        return Err(skip(format!("fanotify_init: {}", Errno::last())));
    }
    // SAFETY: a descriptor that was made just now.
    let group = unsafe { OwnedFd::from_raw_fd(group) };
    let mark = |flags: u32, mask: u64, name: &str| -> Check {
        let path = std::ffi::CString::new(name)?;
        // SAFETY: a string that ends.
        let marked = unsafe {
            libc::fanotify_mark(
                group.as_fd().as_raw_fd(),
                FAN_MARK_ADD | flags,
                mask,
                libc::AT_FDCWD,
                path.as_ptr(),
            )
        };
        sys("fanotify_mark", marked).map(drop).with_context(|| name.to_string())
    };
    mark(0, FAN_CLOSE_WRITE, "file")?;
    mark(0, FAN_OPEN | FAN_EVENT_ON_CHILD, "folder")?;
    mark(FAN_MARK_IGNORED_MASK, FAN_OPEN, "folder/quiet")?;
    rest()?;
    same("events before anything happened", notified(&group)?, vec![])?;
    let number = |name: &str| -> anyhow::Result<u64> {
        Ok(std::os::unix::fs::MetadataExt::ino(&fs::symlink_metadata(name).context("stat")?))
    };
    write("file", b"y")?;
    same("event of the file", notified(&group)?, vec![(FAN_CLOSE_WRITE, number("file")?)])?;
    drop(File::open("folder/quiet").context("open")?);
    drop(File::open("folder/child").context("open")?);
    same("event of the folder", notified(&group)?, vec![(FAN_OPEN, number("folder/child")?)])
}
