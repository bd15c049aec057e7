//! Members in mount namespaces of their own: what they have mounted and what they share, follow or have lost of the
//! root's; files, folders, sockets, mappings and watches that are found only there; a removed file that is open through
//! two namespaces, another that is open on a read-only mount.
//!
//! The harness compares the mounts of all of them and who shares with whom.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount, umount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::unistd::{chdir, chroot, getppid};

use crate::kit::crew::member;
use crate::kit::{Check, mem, rest, same};

/// Mounted by the root, shared.
const SHARED: &str = "/tmp/shared";
/// Mounted by the root, private.
const BARE: &str = "/tmp/bare";
/// Mounted by a member.
const OWN: &str = "/tmp/own";
const NONE: Option<&str> = None;

fn tmpfs(at: &str) -> Check {
    fs::create_dir_all(at).context("mkdir")?;
    mount(Some("a-name"), at, Some("tmpfs"), MsFlags::MS_NOSUID, Some("size=1m")).context("tmpfs")
}

fn change(at: &str, flags: MsFlags) -> Check {
    mount(NONE, at, NONE, flags, NONE).with_context(|| format!("{flags:?} of {at}"))
}

fn read(path: impl AsRef<Path>) -> Result<Vec<u8>> {
    let path = path.as_ref();
    fs::read(path).with_context(|| path.display().to_string())
}

fn create(path: &str) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).open(path).with_context(|| path.to_string())
}

/// See the module.
pub fn run(_: &[String]) -> Check {
    tmpfs(SHARED)?;
    change(SHARED, MsFlags::MS_SHARED)?;
    for folder in ["by-root", "by-peer", "by-follower"] {
        fs::create_dir(format!("{SHARED}/{folder}")).context("mkdir")?;
    }
    fs::write(format!("{SHARED}/file"), b"shared")?;
    tmpfs(BARE)?;
    let gone = create(&format!("{BARE}/gone"))?;
    gone.write_all_at(b"removed", 0).context("write")?;
    let mut inherited = create(&format!("{BARE}/inherited"))?;
    inherited.write_all(b"0123456789").context("write")?;
    inherited.seek(SeekFrom::Start(3)).context("seek")?;
    let peer = member(|| peer(inherited.try_clone()?))?;
    let follower = member(follower)?;
    fs::remove_file(format!("{BARE}/gone")).context("unlink")?;
    rest()?;
    gone.write_all_at(b" later", 7).context("write")?;
    same("a file of the root", read(format!("{SHARED}/file"))?, b"shared".to_vec())?;
    tmpfs(&format!("{SHARED}/by-root"))?;
    fs::write(format!("{SHARED}/by-root/x"), b"root").context("write")?;
    peer.verify()?;
    same("what a peer has mounted", read(format!("{SHARED}/by-peer/y"))?, b"peer".to_vec())?;
    follower.verify()
}

/// Shares a mount with the root, and has one of its own.
fn peer(mut inherited: File) -> Check {
    unshare(CloneFlags::CLONE_NEWNS).context("unshare")?;
    tmpfs(OWN)?;
    change(OWN, MsFlags::MS_SHARED)?;
    umount(BARE).context("umount")?;
    let at = |name: &str| format!("{OWN}/{name}");
    fs::create_dir(at("folder")).context("mkdir")?;
    let mut file = create(&at("file"))?;
    file.write_all(b"content of its own").context("write")?;
    file.seek(SeekFrom::Start(8)).context("seek")?;
    let removed = create(&at("removed"))?;
    removed.write_all_at(b"without a name", 0).context("write")?;
    fs::remove_file(at("removed")).context("unlink")?;
    let mapped = create(&at("mapped"))?;
    mapped.set_len(4096).context("truncate")?;
    let memory = mem::map(4096, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, Some((&mapped, 0)))?;
    drop(mapped);
    memory.fill(7);
    let listener = UnixListener::bind(at("socket")).context("bind")?;
    chdir(at("folder").as_str()).context("chdir")?;
    let watch = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).context("inotify_init1")?;
    watch.add_watch(".", AddWatchFlags::IN_CREATE).context("inotify_add_watch")?;
    let below = member(|| {
        chroot(OWN).context("chroot")?;
        rest()?;
        same("a file below another root", read("/file")?, b"content of its own".to_vec())?;
        same("the working folder", Path::new("../mapped").exists(), true)
    })?;
    rest()?;
    below.verify()?;
    let mut rest_of_it = String::new();
    file.read_to_string(&mut rest_of_it).context("read")?;
    same("a file of its own", rest_of_it.as_str(), "of its own")?;
    let mut three = [0; 3];
    inherited.read_exact(&mut three).context("read")?;
    same("a file of the root's namespace", &three, b"345")?;
    let mut content = [0; 14];
    removed.read_exact_at(&mut content, 0).context("read")?;
    same("a removed file", &content, b"without a name")?;
    memory.check("a mapped file", 7)?;
    memory.fill(8);
    same("the mapped file", read(at("mapped"))?, memory.bytes().to_vec())?;
    let _there = UnixStream::connect(at("socket")).context("connect")?;
    listener.accept().context("accept")?;
    fs::write("new", b"x").context("write")?;
    let events = watch.read_events().context("read of an inotify queue")?;
    same("events of a folder", events.len(), 1)?;
    same("what the root has mounted", read(format!("{SHARED}/by-root/x"))?, b"root".to_vec())?;
    same("what it has lost", Path::new(&format!("{BARE}/inherited")).exists(), false)?;
    tmpfs(&format!("{SHARED}/by-peer"))?;
    fs::write(format!("{SHARED}/by-peer/y"), b"peer").context("write")
}

/// Only receives what is mounted, and sees a mount of the root elsewhere and read-only.
fn follower() -> Check {
    unshare(CloneFlags::CLONE_NEWNS).context("unshare")?;
    change(SHARED, MsFlags::MS_SLAVE)?;
    let place = "/tmp/read-only";
    fs::create_dir(place).context("mkdir")?;
    mount(Some(BARE), place, NONE, MsFlags::MS_BIND, NONE).context("bind")?;
    change(place, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY)?;
    umount(BARE).context("umount")?;
    let gone = File::open(format!("{place}/gone")).context("gone")?;
    let fixed = "/tmp/fixed";
    tmpfs(fixed)?;
    fs::write(format!("{fixed}/lost"), b"lost").context("write")?;
    let mut lost = File::open(format!("{fixed}/lost")).context("lost")?;
    fs::remove_file(format!("{fixed}/lost")).context("unlink")?;
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID;
    change(fixed, flags)?;
    let hidden = "/tmp/hidden";
    tmpfs(hidden)?;
    fs::write(format!("{hidden}/below"), b"below").context("write")?;
    tmpfs(hidden)?;
    rest()?;
    umount(hidden).context("umount")?;
    same("a file on a mount that another hid", read(format!("{hidden}/below"))?, b"below".to_vec())?;
    let mut text = String::new();
    lost.read_to_string(&mut text).context("read")?;
    same("a removed file of a file system that is mounted read-only", text.as_str(), "lost")?;
    let mut content = [0; 13];
    gone.read_exact_at(&mut content, 0).context("read")?;
    same("a removed file that the root has too", &content, b"removed later")?;
    for place in [place, fixed] {
        let refused = fs::write(format!("{place}/new"), b"no");
        let refused = refused.is_err_and(|e| e.raw_os_error() == Some(libc::EROFS));
        same("writing to a read-only mount", refused, true)?;
    }
    same("what the root has mounted", read(format!("{SHARED}/by-root/x"))?, b"root".to_vec())?;
    same("what the peer has mounted", read(format!("{SHARED}/by-peer/y"))?, b"peer".to_vec())?;
    tmpfs(&format!("{SHARED}/by-follower"))?;
    fs::write(format!("{SHARED}/by-follower/z"), b"follower").context("write")?;
    let root = format!("/proc/{}/root{SHARED}/by-follower", getppid());
    same("what the root has of that", fs::read_dir(root).context("readdir")?.count(), 0)
}
