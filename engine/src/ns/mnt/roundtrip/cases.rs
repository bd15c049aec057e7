//! Namespaces that make the trip.

use std::{
    fs,
    io::{Seek, SeekFrom, Write},
    os::unix::fs::{PermissionsExt, chown, symlink},
    path::Path,
};

use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use super::*;
use crate::options::External;

const RDONLY: u32 = flags::RDONLY;
pub(super) const NOSUID: u32 = libc::MS_NOSUID as u32;
pub(super) const NODEV: u32 = libc::MS_NODEV as u32;
pub(super) const NOEXEC: u32 = libc::MS_NOEXEC as u32;
const NOATIME: u32 = libc::MS_NOATIME as u32;

/// One of each kind of file there is.
fn fill(place: &str) {
    let at = |name: &str| Path::new(place).join(name);
    fs::write(at("plain"), "words").unwrap();
    fs::set_permissions(at("plain"), fs::Permissions::from_mode(0o4751)).unwrap();
    fs::write(at("empty"), "").unwrap();
    chown(at("empty"), Some(12_345_678), Some(7)).unwrap();
    fs::create_dir_all(at("folder/deep/deeper")).unwrap();
    fs::set_permissions(at("folder"), fs::Permissions::from_mode(0o1777)).unwrap();
    fs::write(at("folder/deep/deeper/file"), vec![7; 300_000]).unwrap();
    fs::hard_link(at("plain"), at("folder/again")).unwrap();
    symlink("../plain", at("folder/link")).unwrap();
    symlink("x".repeat(300), at("long link")).unwrap();
    let long = format!("{}/{}", "d".repeat(120), "f".repeat(200));
    fs::create_dir_all(at(&long)).unwrap();
    fs::write(at(&long).join("inner"), "far down").unwrap();
    mknod(&at("fifo"), SFlag::S_IFIFO, Mode::from_bits_truncate(0o640), 0).unwrap();
    mknod(&at("null"), SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(1, 3)).unwrap();
    mknod(&at("disk"), SFlag::S_IFBLK, Mode::from_bits_truncate(0o600), makedev(259, 300)).unwrap();
    drop(std::os::unix::net::UnixListener::bind(at("socket")).unwrap());
    let mut holes = fs::File::create(at("holes")).unwrap();
    for number in 0..40_u64 {
        holes.seek(SeekFrom::Start(number * (1 << 20))).unwrap();
        holes.write_all(&[number as u8; 4096]).unwrap();
    }
    holes.set_len(50 << 20).unwrap();
    fs::File::create(at("hole")).unwrap().set_len(1 << 20).unwrap();
    let set = |name: &str, key: &std::ffi::CStr, value: &[u8]| {
        xattr::set(at(name).to_str().unwrap().as_bytes(), key, value).unwrap();
    };
    set("plain", c"trusted.lines", b"one\ntwo\0three=4\n");
    set("folder", c"trusted.of_folder", b"yes");
    set("long link", c"trusted.of_link", b"too");
    let rights: Vec<u8> = [1_u32, 0, 0, 0, 0].iter().flat_map(|w| w.to_le_bytes()).collect();
    let mut capability = 0x0200_0000_u32.to_le_bytes().to_vec();
    capability.extend(&rights[..16]);
    set("empty", c"security.capability", &capability);
    let old = filetime(-5, 250_000_000);
    nix::sys::stat::utimensat(
        nix::fcntl::AT_FDCWD,
        &at("folder/deep"),
        &old,
        &old,
        nix::sys::stat::UtimensatFlags::NoFollowSymlink,
    )
    .unwrap();
}

fn filetime(seconds: i64, nanos: i64) -> nix::sys::time::TimeSpec {
    nix::sys::time::TimeSpec::new(seconds, nanos)
}

pub(super) fn proc() {
    mount("proc", "/proc", NOSUID | NODEV | NOEXEC, "");
}

fn outside(folder: &Path) {
    fs::create_dir_all(folder.join("outside/sub")).unwrap();
    fs::write(folder.join("outside/sub/file"), "from outside").unwrap();
    bind(&folder.join("outside/sub"), &folder.join("root/ext"));
    fs::create_dir_all(folder.join("root/own/sub")).unwrap();
    fs::write(folder.join("root/own/sub/file"), "of the root").unwrap();
}

fn simple() {
    proc();
    mount("sysfs", "/sys", NOSUID | NODEV | NOEXEC | RDONLY, "");
    mount("tmpfs", "/tmp", NOSUID | NODEV, "size=200m,mode=1777");
    fill("/tmp");
    mount("tmpfs", "/tmp/folder/nested", 0, "size=64k,mode=700");
    fs::write("/tmp/folder/nested/file", "nested").unwrap();
    mount("devpts", "/pts", 0, "newinstance,mode=620,ptmxmode=666");
    mount("mqueue", "/mq", 0, "");
    // Parts of file systems, files too; one with flags of its own.
    bind(Path::new("/tmp/folder"), Path::new("/part"));
    bind(Path::new("/tmp/plain"), Path::new("/a file"));
    bind(Path::new("/own/sub"), Path::new("/of root"));
    bind(Path::new("/pts/ptmx"), Path::new("/ptmx"));
    bind(Path::new("/part"), Path::new("/strict"));
    change("/strict", flags::BIND | flags::REMOUNT | RDONLY | NOSUID | NODEV | NOATIME);
    change("/ext", flags::BIND | flags::REMOUNT | RDONLY | NOEXEC);
    // A file system that is read-only itself, and one without access times.
    mount("tmpfs", "/ro", NOATIME, "size=64k");
    fs::write("/ro/file", "kept").unwrap();
    change("/ro", flags::REMOUNT | RDONLY | NOATIME);
    mount("tmpfs", "/mixed", RDONLY | libc::MS_STRICTATIME as u32, "size=64k");
    // Over another, and over what has others on it.
    mount("tmpfs", "/over", 0, "size=8k");
    fs::write("/over/below", "hidden").unwrap();
    mount("tmpfs", "/over/on", 0, "size=8k");
    fs::write("/over/on/too", "hidden too").unwrap();
    mount("tmpfs", "/over", 0, "size=12k");
    fs::write("/over/above", "seen").unwrap();
}

pub(super) fn external(opts: &mut DumpOptions) {
    opts.common.external.push(External::mnt("/ext", Some("data")));
}

fn given(opts: &mut RestoreOptions, folder: &Path) {
    let path = folder.join("outside/sub");
    opts.common.external.push(External::mnt("data", path.to_str()));
}

fn simple_trip(test: &'static str) -> Trip {
    Trip {
        outside,
        content: &["/tmp", "/part", "/strict", "/ro", "/over", "/ext", "/of root", "/a file"],
        dump: |opts, _| external(opts),
        restore: given,
        check: || {
            assert_eq!(text("/ext/file"), "from outside");
            assert_eq!(text("/of root/file"), "of the root");
            // What was hidden is there when what hides it goes.
            umount2("/over", MntFlags::MNT_DETACH).unwrap();
            assert_eq!((text("/over/below"), text("/over/on/too")), ("hidden".into(), "hidden too".into()));
            assert_eq!(std::env::current_dir().unwrap(), Path::new("/"));
        },
        ..Trip::new(test, simple)
    }
}

#[test]
fn file_systems_binds_and_content_come_back() {
    simple_trip(name!("file_systems_binds_and_content_come_back")).run();
}

#[test]
fn they_come_back_by_calls_of_old_kernels_too() {
    let trip = simple_trip(name!("they_come_back_by_calls_of_old_kernels_too"));
    Trip {
        restore: |opts, folder| {
            given(opts, folder);
            opts.mntns_compat_mode = true;
        },
        ..trip
    }
    .run();
}

#[test]
fn what_containers_have_comes_back() {
    Trip {
        outside,
        content: &["/dev/null", "/dev/fd", "/dev/ptmx", "/dev/shm"],
        dump: |opts, _| external(opts),
        restore: given,
        ..Trip::new(name!("what_containers_have_comes_back"), || {
            proc();
            mount("tmpfs", "/dev", NOSUID | libc::MS_STRICTATIME as u32, "mode=755,size=64k");
            mknod(Path::new("/dev/null"), SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(1, 3))
                .unwrap();
            symlink("/proc/self/fd", "/dev/fd").unwrap();
            mount("devpts", "/dev/pts", NOSUID | NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5");
            symlink("pts/ptmx", "/dev/ptmx").unwrap();
            mount("tmpfs", "/dev/shm", NOSUID | NODEV | NOEXEC, "size=65536k,mode=1777");
            mount("mqueue", "/dev/mqueue", NOSUID | NODEV | NOEXEC, "");
            mount("sysfs", "/sys", NOSUID | NODEV | NOEXEC | RDONLY, "");
            // Masked and read-only parts of proc.
            for place in ["/proc/kcore", "/proc/timer_list"] {
                if Path::new(place).exists() {
                    let (source, target) = (&b"/dev/null"[..], place.as_bytes());
                    calls::mount(Mounting { source, target, flags: flags::BIND, ..Mounting::default() })
                        .unwrap();
                }
            }
            for place in ["/proc/bus", "/proc/sys", "/proc/irq"] {
                let (source, target) = (place.as_bytes(), place.as_bytes());
                calls::mount(Mounting { source, target, flags: flags::BIND, ..Mounting::default() }).unwrap();
                change(place, flags::BIND | flags::REMOUNT | RDONLY | NOSUID | NODEV | NOEXEC);
            }
            mount("tmpfs", "/sys/firmware", RDONLY, "");
            // Removed since, from what is read-only by now.
            fs::create_dir("/own/gone").unwrap();
            bind(Path::new("/own/gone"), Path::new("/gone"));
            fs::remove_dir("/own/gone").unwrap();
            change("/", flags::BIND | flags::REMOUNT | RDONLY);
        })
    }
    .run();
}

#[test]
fn memory_that_is_never_swapped_comes_back() {
    Trip {
        content: &["/run/credentials/a", "/run/credentials/b"],
        check: || assert_eq!(text("/run/credentials/a/secret"), "a"),
        ..Trip::new(name!("memory_that_is_never_swapped_comes_back"), || {
            proc();
            mount("tmpfs", "/run", NOSUID | NODEV, "mode=755,size=1m");
            // As systemd has the credentials of each service.
            for name in ["a", "b"] {
                let place = format!("/run/credentials/{name}");
                fs::create_dir_all(&place).unwrap();
                mount("ramfs", &place, NOSUID | NODEV | NOEXEC, "mode=0700");
                fs::write(format!("{place}/secret"), name).unwrap();
                fs::set_permissions(format!("{place}/secret"), fs::Permissions::from_mode(0o400)).unwrap();
                change(&place, flags::BIND | flags::REMOUNT | RDONLY | NOSUID | NODEV | NOEXEC);
            }
        })
    }
    .run();
}

#[test]
fn control_groups_and_other_single_file_systems_come_back() {
    Trip::new(name!("control_groups_and_other_single_file_systems_come_back"), || {
        proc();
        for (kind, options) in [
            ("cgroup2", ""),
            ("cgroup", "cpu"),
            ("devtmpfs", ""),
            ("securityfs", ""),
            ("debugfs", ""),
            ("tracefs", ""),
            ("binfmt_misc", ""),
            ("fusectl", ""),
        ] {
            let place = format!("/{kind}");
            fs::create_dir(&place).unwrap();
            let (target, kind, options) = (place.as_bytes(), kind.as_bytes(), options.as_bytes());
            let _ = calls::mount(Mounting { source: b"of its own", target, kind, options, flags: NOSUID });
        }
        mount("proc", "/proc2", 0, "");
    })
    .run();
}

#[test]
fn mounts_of_a_user_namespace_come_back_in_another() {
    Trip {
        users: true,
        outside: |folder| {
            outside(folder);
            // Only where others of the kind can be seen may they be mounted.
            let at = |name: &str| folder.join("root").join(name).to_str().unwrap().to_owned();
            mount("proc", &at("proc"), NOSUID | NODEV | NOEXEC, "");
            mount("sysfs", &at("sys"), NOSUID | NODEV | NOEXEC | RDONLY, "");
        },
        content: &["/tmp", "/ext", "/of root"],
        dump: |opts, _| external(opts),
        restore: given,
        ..Trip::new(name!("mounts_of_a_user_namespace_come_back_in_another"), || {
            mount("devpts", "/pts", NOSUID, "newinstance,mode=620,ptmxmode=666");
            mount("mqueue", "/mq", NOSUID, "");
            mount("tmpfs", "/tmp", 0, "size=2m");
            fs::create_dir("/tmp/folder").unwrap();
            fs::write("/tmp/folder/file", "content").unwrap();
            fs::hard_link("/tmp/folder/file", "/tmp/again").unwrap();
            let mut capability = 0x0200_0000_u32.to_le_bytes().to_vec();
            capability.extend([1; 16]);
            xattr::set(b"/tmp/again", c"security.capability", &capability).unwrap();
            mount("tmpfs", "/tmp/folder/on", 0, "size=2m");
            bind(Path::new("/tmp/folder"), Path::new("/shared"));
            change("/shared", flags::SHARED);
            bind(Path::new("/shared"), Path::new("/peer"));
            bind(Path::new("/own/sub"), Path::new("/of root"));
            change("/ext", flags::BIND | flags::REMOUNT | RDONLY | NOEXEC);
        })
    }
    .run();
}

#[test]
fn mounts_that_the_host_has_too_are_found() {
    let trip = Trip {
        outside,
        dump: |opts, _| opts.common.external_mounts.auto = true,
        restore: |opts, _| opts.common.external_mounts.auto = true,
        check: || assert_eq!(text("/ext/file"), "from outside"),
        ..Trip::new(name!("mounts_that_the_host_has_too_are_found"), proc)
    };
    trip.run();
}
