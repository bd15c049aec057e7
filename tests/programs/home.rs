//! What belongs to namespaces rather than to tasks: everything a tmpfs can hold, mounts that share and follow, objects
//! of System V that nobody has attached, names of the host, a network device with address and route, settings.
//!
//! The harness compares mounts, addresses, routes, settings and tables of objects; here content is.
//!
//! # Safety
//!
//! Calls made raw take numbers, or structures and texts that outlive them.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions, Permissions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{Mode, SFlag, makedev, mknod, umask};

use crate::kit::net::{Netlink, attribute, link};
use crate::kit::{Check, rest, same, sys};

/// Where a tmpfs is mounted.
const TMPFS: &str = "/tmp";

/// See the module. `net`: also a network device.
pub fn run(args: &[String]) -> Check {
    files(args.iter().all(|arg| arg != "no-socket")).context("files on a tmpfs")?;
    mounts().context("mounts")?;
    nix::unistd::sethostname("another-name").context("sethostname")?;
    // SAFETY: a text with its length.
    sys("setdomainname", unsafe { libc::setdomainname(c"a-domain".as_ptr(), 8) })?;
    let objects = Objects::make()?;
    if args.iter().any(|arg| arg == "net") {
        device().context("a network device")?;
    }
    let before = listing(Path::new(TMPFS))?;
    rest()?;
    let after = listing(Path::new(TMPFS))?;
    for (path, facts) in &before {
        same(path, after.get(path), Some(facts))?;
    }
    same("number of files", after.len(), before.len())?;
    let name = nix::unistd::gethostname().context("gethostname")?;
    same("name of the host", name.to_string_lossy().as_ref(), "another-name")?;
    fs::write(format!("{TMPFS}/shared/new"), b"made after").context("a new file")?;
    same("what a follower shows", fs::read(format!("{TMPFS}/follower/new"))?, b"made after".to_vec())?;
    let refused = fs::write(format!("{TMPFS}/read-only/new"), b"no");
    same(
        "writing to a read-only mount",
        refused.is_err_and(|e| e.raw_os_error() == Some(libc::EROFS)),
        true,
    )?;
    objects.check()
}

/// All types of files, and what each can have.
fn files(socket: bool) -> Check {
    let at = |name: &str| Path::new(TMPFS).join(name);
    let mask = umask(Mode::empty());
    fs::create_dir_all(at("folder/deep/deeper"))?;
    fs::set_permissions(at("folder/deep"), Permissions::from_mode(0o1751))?;
    fs::write(at("folder/data"), (0..100_000u32).flat_map(u32::to_le_bytes).collect::<Vec<u8>>())?;
    fs::write(at("folder/deep/empty"), b"")?;
    fs::hard_link(at("folder/data"), at("folder/deep/the-same"))?;
    let mut sparse = OpenOptions::new().create_new(true).write(true).open(at("sparse"))?;
    sparse.seek(SeekFrom::Start(3 << 20))?;
    sparse.write_all(b"after a hole")?;
    fs::write(at("set-user-id"), b"#!")?;
    // Changing the owner takes the bit away.
    chown(at("set-user-id"), Some(1234), Some(4321))?;
    fs::set_permissions(at("set-user-id"), Permissions::from_mode(0o4711))?;
    fs::write(at("name with spaces, \u{e4} and\nline"), b"odd")?;
    fs::write(at(&"long".repeat(60)), b"long")?;
    symlink("nowhere/at all", at("link"))?;
    chown_link(&at("link"))?;
    nix::unistd::mkfifo(&at("fifo"), Mode::from_bits_truncate(0o620)).context("mkfifo")?;
    if socket {
        drop(UnixListener::bind(at("socket"))?);
    }
    // Not within a user namespace.
    let node = mknod(&at("node"), SFlag::S_IFCHR, Mode::from_bits_truncate(0o640), makedev(1, 3));
    if node.is_err_and(|e| e != nix::errno::Errno::EPERM) {
        node.context("mknod")?;
    }
    umask(mask);
    let past = nix::sys::time::TimeSpec::new(1_000_000_000, 0);
    nix::sys::stat::utimensat(
        nix::fcntl::AT_FDCWD,
        &at("folder/data"),
        &past,
        &past,
        nix::sys::stat::UtimensatFlags::NoFollowSymlink,
    )
    .context("utimensat")
}

fn chown_link(link: &Path) -> Check {
    std::os::unix::fs::lchown(link, Some(7), Some(8)).context("lchown")
}

/// Kind, permissions, owners, links, device, time and content of everything in a folder.
fn listing(folder: &Path) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            let meta = fs::symlink_metadata(&path)?;
            let kind = meta.file_type();
            let size = if kind.is_file() { meta.size() } else { 0 };
            let time = if kind.is_file() { meta.mtime() } else { 0 };
            let content = if kind.is_symlink() {
                fs::read_link(&path)?.display().to_string()
            } else if kind.is_file() {
                sum(&fs::read(&path)?)
            } else {
                String::new()
            };
            let facts = format!(
                "{:o} {}:{} links {} size {size} device {:x} time {time} {content}",
                meta.mode(),
                meta.uid(),
                meta.gid(),
                meta.nlink(),
                meta.rdev(),
            );
            found.insert(path.display().to_string(), facts);
            if kind.is_dir() {
                folders.push(path);
            }
        }
    }
    Ok(found)
}

fn sum(content: &[u8]) -> String {
    let sum = content.iter().fold(0u64, |sum, byte| sum.wrapping_mul(0x100_0000_01b3) ^ u64::from(*byte));
    format!("{sum:x}")
}

/// A mount that others follow, one of those, and one that is read-only.
fn mounts() -> Check {
    let none: Option<&str> = None;
    let at = |name: &str| format!("{TMPFS}/{name}");
    for name in ["shared", "follower", "read-only"] {
        fs::create_dir(at(name))?;
    }
    let options = Some("size=1m,mode=711");
    mount(Some("a-name"), at("shared").as_str(), Some("tmpfs"), MsFlags::MS_NOSUID, options)
        .context("tmpfs")?;
    mount(none, at("shared").as_str(), none, MsFlags::MS_SHARED, none).context("shared")?;
    fs::write(at("shared/inside"), b"of the shared mount")?;
    let bind = |from: &str, to: &str| {
        mount(Some(at(from).as_str()), at(to).as_str(), none, MsFlags::MS_BIND, none).context("bind")
    };
    bind("shared", "follower")?;
    mount(none, at("follower").as_str(), none, MsFlags::MS_SLAVE, none).context("slave")?;
    bind("folder", "read-only")?;
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | MsFlags::MS_NOEXEC;
    mount(none, at("read-only").as_str(), none, flags, none).context("read-only")
}

/// Objects of System V that no task has attached.
struct Objects {
    queue: i32,
    set: i32,
    segment: i32,
}

#[repr(C)]
struct Message {
    kind: libc::c_long,
    text: [u8; 40],
}

const VALUES: [u16; 3] = [3, 0, 77];

impl Objects {
    fn make() -> Result<Objects> {
        // SAFETY: numbers only.
        let queue = sys("msgget", unsafe { libc::msgget(0x77, libc::IPC_CREAT | 0o640) })?;
        for kind in [5, 2] {
            let message = Message { kind, text: [kind as u8; 40] };
            // SAFETY: the message outlives the call.
            sys("msgsnd", unsafe {
                libc::msgsnd(queue, (&raw const message).cast(), 10 * kind as usize - 10, 0)
            })?;
        }
        // SAFETY: numbers only.
        let set = sys("semget", unsafe { libc::semget(0x78, 3, libc::IPC_CREAT | 0o600) })?;
        // SAFETY: as many numbers as the set has.
        sys("semctl", unsafe { libc::semctl(set, 0, libc::SETALL, VALUES.as_ptr()) })?;
        // SAFETY: numbers only.
        let segment = sys("shmget", unsafe { libc::shmget(0x79, 3 * 4096, libc::IPC_CREAT | 0o600) })?;
        let objects = Objects { queue, set, segment };
        objects.with_segment(|bytes| bytes[5000..5003].copy_from_slice(b"abc"))?;
        Ok(objects)
    }

    fn with_segment<T>(&self, act: impl FnOnce(&mut [u8]) -> T) -> Result<T> {
        // SAFETY: at an address of the kernel's choice.
        let at = unsafe { libc::shmat(self.segment, std::ptr::null(), 0) };
        anyhow::ensure!(at as isize != -1, "shmat: {}", nix::errno::Errno::last());
        // SAFETY: attached with this size; nobody else has it.
        let result = act(unsafe { std::slice::from_raw_parts_mut(at.cast(), 3 * 4096) });
        // SAFETY: attached above, not used again.
        sys("shmdt", unsafe { libc::shmdt(at) })?;
        Ok(result)
    }

    fn check(&self) -> Check {
        for kind in [5, 2] {
            let mut message = Message { kind: 0, text: [0; 40] };
            // SAFETY: there is room for as many bytes.
            let got = unsafe { libc::msgrcv(self.queue, (&raw mut message).cast(), 40, 0, libc::IPC_NOWAIT) };
            let got = sys("msgrcv", got)?;
            same("a message", (message.kind, got), (kind, 10 * kind as isize - 10))?;
            same("its text", message.text[..got as usize].iter().all(|b| i64::from(*b) == kind), true)?;
        }
        let mut values = [0; 3];
        // SAFETY: as many numbers as the set has.
        sys("semctl", unsafe { libc::semctl(self.set, 0, libc::GETALL, values.as_mut_ptr()) })?;
        same("semaphores", values, VALUES)?;
        let found = self.with_segment(|bytes| (bytes[4999], bytes[5000..5003].to_vec()))?;
        same("a segment that nobody had attached", found, (0, b"abc".to_vec()))
    }
}

/// `first0`, one end of a pair, with an address, a route through it, and a setting of its own.
fn device() -> Check {
    let netlink = Netlink::open()?;
    let info = attribute(libc::IFLA_LINKINFO, &attribute(1, b"veth\0"));
    let mut new = link(0, 0);
    new.extend(
        [attribute(libc::IFLA_IFNAME, b"first0\0"), info, attribute(libc::IFLA_MTU, &1400u32.to_ne_bytes())]
            .concat(),
    );
    if let Err(e) = netlink.ask(libc::RTM_NEWLINK, &new) {
        return Err(crate::kit::skip(format!("a pair of devices (veth): {e:#}")));
    }
    // SAFETY: a text that outlives the call.
    let index = unsafe { libc::if_nametoindex(c"first0".as_ptr()) };
    netlink.up(index)?;
    netlink.address(index, [10, 9, 8, 7])?;
    let mut route =
        vec![libc::AF_INET as u8, 16, 0, 0, libc::RT_TABLE_MAIN, libc::RTPROT_STATIC, 0, libc::RTN_UNICAST];
    route.extend(0u32.to_ne_bytes());
    let parts = [
        attribute(libc::RTA_DST, &[172, 20, 0, 0]),
        attribute(libc::RTA_GATEWAY, &[10, 9, 8, 1]),
        attribute(libc::RTA_OIF, &index.to_ne_bytes()),
    ];
    route.extend(parts.concat());
    netlink.ask(libc::RTM_NEWROUTE, &route).context("route")?;
    fs::write("/proc/sys/net/ipv4/conf/first0/accept_redirects", "0").context("a setting of the device")?;
    fs::write("/proc/sys/net/ipv4/conf/lo/forwarding", "1").context("a setting")
}
