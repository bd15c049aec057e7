use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Seek, SeekFrom, Write},
    os::{
        fd::AsFd,
        unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    },
    path::Path,
};

use nix::{
    fcntl::{OFlag, open},
    sys::stat::Mode,
};

use super::*;
use crate::files::build_id;
use crate::files::roundtrip::{FREE, Trip, at, get, link, pos_and_flags, same};

#[test]
fn silly_names_are_those_of_nfs() {
    assert!(is_silly_name(b"/mnt/.nfs000000000123456700000001"));
    assert!(!is_silly_name(b"/mnt/.nfs00000000012345670000000x"));
    assert!(!is_silly_name(b"/mnt/.nfs/file"));
}

#[test]
fn logs_may_grow() {
    let flags = |f: i32| must_keep_size(f.cast_unsigned());
    assert!(!flags(libc::O_WRONLY | libc::O_APPEND));
    assert!(flags(libc::O_RDWR | libc::O_APPEND) && flags(libc::O_WRONLY) && flags(libc::O_RDONLY));
}

#[test]
fn temporary_files_are_opened_without_asking_for_a_new_one() {
    let flags = RegFile::open_flags(libc::O_RDWR | libc::O_TMPFILE | libc::O_APPEND);
    assert_eq!(flags, OFlag::O_RDWR | OFlag::O_APPEND);
    let flags = RegFile::open_flags(libc::O_DIRECTORY);
    assert_eq!(flags, OFlag::O_DIRECTORY);
}

fn file(number: i32) -> File {
    get(number).try_clone_to_owned().unwrap().into()
}

fn content(number: i32) -> String {
    let mut text = String::new();
    let mut file = File::open(format!("/proc/self/fd/{number}")).unwrap();
    file.read_to_string(&mut text).unwrap();
    text
}

const LARGE: i32 = 0o100_000;

#[test]
fn positions_flags_and_sharing_come_back() {
    Trip::new(
        concat!(module_path!(), "::positions_flags_and_sharing_come_back"),
        |folder| {
            let mut a = OpenOptions::new();
            let mut file = a.read(true).write(true).create(true).open(folder.join("a")).unwrap();
            file.write_all(b"0123456789").unwrap();
            file.seek(SeekFrom::Start(4)).unwrap();
            at(file.try_clone().unwrap(), FREE, false);
            at(file, FREE + 1, true);
            let other = OpenOptions::new().append(true).custom_flags(libc::O_SYNC).open(folder.join("a"));
            at(other.unwrap(), FREE + 2, false);
            at(File::open(folder).unwrap(), FREE + 3, false);
            std::os::unix::fs::symlink("nowhere", folder.join("link")).unwrap();
            let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW;
            at(open(&folder.join("link"), flags, Mode::empty()).unwrap(), FREE + 4, false);
            at(File::open("/dev/null").unwrap(), FREE + 5, false);
            at(OpenOptions::new().write(true).open("/dev/full").unwrap(), FREE + 6, false);
            at(File::open("/proc/meminfo").unwrap(), FREE + 7, false);
        },
        |folder| {
            assert!(same(FREE, FREE + 1) && !same(FREE, FREE + 2));
            assert_eq!(pos_and_flags(FREE), (4, (libc::O_RDWR | LARGE) as u32));
            assert_eq!(pos_and_flags(FREE + 1), (4, (libc::O_RDWR | LARGE | libc::O_CLOEXEC) as u32));
            let append = libc::O_WRONLY | libc::O_APPEND | libc::O_SYNC | LARGE;
            assert_eq!(pos_and_flags(FREE + 2), (0, append as u32));
            file(FREE + 2).write_all(b"abc").unwrap();
            assert_eq!(fs::read(folder.join("a")).unwrap(), b"0123456789abc");
            assert_eq!(link(FREE + 3), folder.to_str().unwrap());
            assert_eq!(link(FREE + 4), folder.join("link").to_str().unwrap());
            assert_eq!(pos_and_flags(FREE + 4), (0, (libc::O_PATH | libc::O_NOFOLLOW) as u32));
            assert_eq!(file(FREE + 5).read(&mut [0; 8]).unwrap(), 0);
            assert_eq!(file(FREE + 6).write(b"x").unwrap_err().raw_os_error(), Some(libc::ENOSPC));
            assert_eq!(link(FREE + 7), "/proc/meminfo");
        },
    )
    .run();
}

#[test]
fn files_of_one_folder_are_found_by_their_names() {
    fn long() -> String {
        "n".repeat(255)
    }
    Trip {
        // The way may lead elsewhere by now, also past links.
        between: |folder| {
            fs::rename(folder.join("d"), folder.join("e")).unwrap();
            std::os::unix::fs::symlink("e", folder.join("d")).unwrap();
            fs::remove_file(folder.join("e/b")).unwrap();
            std::os::unix::fs::symlink("../f", folder.join("e/b")).unwrap();
        },
        ..Trip::new(
            concat!(module_path!(), "::files_of_one_folder_are_found_by_their_names"),
            |folder| {
                fs::create_dir_all(folder.join("d/sub")).unwrap();
                fs::write(folder.join("f"), "2").unwrap();
                for (nr, name) in ["a", "b", &long(), "sub/a", "c"].into_iter().enumerate() {
                    fs::write(folder.join("d").join(name), nr.to_string().replace('1', "2")).unwrap();
                    at(File::open(folder.join("d").join(name)).unwrap(), FREE + nr as i32, nr % 2 == 0);
                }
                at(File::open(folder.join("d/sub")).unwrap(), FREE + 5, false);
                std::os::unix::fs::symlink("nowhere", folder.join("d/link")).unwrap();
                let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW;
                at(open(&folder.join("d/link"), flags, Mode::empty()).unwrap(), FREE + 6, false);
                at(File::open(folder).unwrap(), FREE + 7, false);
                at(File::open(folder.join("d/a")).unwrap(), FREE + 8, false);
            },
            |folder| {
                let names =
                    ["e/a", "f", &format!("e/{}", long()), "e/sub/a", "e/c", "e/sub", "e/link", "", "e/a"];
                for (nr, name) in names.into_iter().enumerate() {
                    let path = folder.join(name).display().to_string();
                    assert_eq!(link(FREE + nr as i32), path.trim_end_matches('/'));
                }
                assert_eq!(content(FREE + 1) + &content(FREE + 2) + &content(FREE + 3), "223");
                let open = fs::read_dir("/proc/self/fd").unwrap().flatten();
                let folders = [folder.join("d"), folder.join("e")];
                let left =
                    open.filter_map(|fd| fs::read_link(fd.path()).ok()).filter(|to| folders.contains(to));
                assert_eq!(left.count(), 0, "a folder was left open");
            },
        )
    }
    .run();
}

#[test]
fn files_without_a_name_come_back_and_leave_nothing() {
    Trip::new(
        concat!(module_path!(), "::files_without_a_name_come_back_and_leave_nothing"),
        |folder| {
            // Two names of one inode, each opened, both gone.
            fs::write(folder.join("one"), "short").unwrap();
            fs::hard_link(folder.join("one"), folder.join("two")).unwrap();
            fs::set_permissions(folder.join("one"), fs::Permissions::from_mode(0o4751)).unwrap();
            let mut rw = OpenOptions::new();
            at(rw.read(true).write(true).open(folder.join("one")).unwrap(), FREE, false);
            at(File::open(folder.join("two")).unwrap(), FREE + 1, false);
            fs::remove_file(folder.join("one")).unwrap();
            fs::remove_file(folder.join("two")).unwrap();
            // A sparse one in a folder that is gone as well.
            fs::create_dir(folder.join("dir")).unwrap();
            let big = File::create_new(folder.join("dir/big")).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&big, b"end", 900_000).unwrap();
            big.set_len(1 << 30).unwrap();
            at(big, FREE + 2, false);
            at(File::open(folder.join("dir")).unwrap(), FREE + 3, false);
            fs::remove_dir_all(folder.join("dir")).unwrap();
            // One that never had a name, and a link.
            let unnamed =
                OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).open(folder);
            let mut unnamed = unnamed.unwrap();
            unnamed.write_all(b"unnamed").unwrap();
            at(unnamed, FREE + 4, false);
            std::os::unix::fs::symlink("target", folder.join("link")).unwrap();
            let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW;
            at(open(&folder.join("link"), flags, Mode::empty()).unwrap(), FREE + 5, false);
            fs::remove_file(folder.join("link")).unwrap();
            // A name that somebody else has taken by now.
            fs::write(folder.join("taken"), "old").unwrap();
            at(File::open(folder.join("taken")).unwrap(), FREE + 6, false);
            fs::remove_file(folder.join("taken")).unwrap();
            fs::write(folder.join("taken"), "new").unwrap();
        },
        |folder| {
            let deleted = |name: &str| format!("{} (deleted)", folder.join(name).display());
            let (a, b) = (file(FREE).metadata().unwrap(), file(FREE + 1).metadata().unwrap());
            assert_eq!((a.ino(), a.nlink(), a.mode()), (b.ino(), 0, 0o104_751));
            assert_eq!(link(FREE), deleted("one"));
            assert_eq!(link(FREE + 1), deleted("two"));
            assert_eq!((content(FREE), content(FREE + 1)), ("short".into(), "short".into()));
            let big = file(FREE + 2).metadata().unwrap();
            assert_eq!(big.len(), 1 << 30);
            assert!(big.blocks() < 2048, "{} blocks", big.blocks());
            assert_eq!(link(FREE + 2), deleted("dir/big"));
            let mut end = [0; 3];
            let again = File::open(format!("/proc/self/fd/{}", FREE + 2)).unwrap();
            std::os::unix::fs::FileExt::read_exact_at(&again, &mut end, 900_000).unwrap();
            assert_eq!(&end, b"end");
            assert!(file(FREE + 3).metadata().unwrap().is_dir());
            assert_eq!(link(FREE + 3), deleted("dir"));
            assert_eq!(content(FREE + 4), "unnamed");
            assert_eq!(pos_and_flags(FREE + 4).0, 7);
            let target = nix::fcntl::readlinkat(get(FREE + 5), "").unwrap();
            assert_eq!(target, "target");
            assert_eq!(content(FREE + 6), "old");
            assert_eq!(fs::read(folder.join("taken")).unwrap(), b"new");
            names_left(folder, &["images", "said", "taken"]);
        },
    )
    .run();
}

fn names_left(folder: &Path, allowed: &[&str]) {
    let left: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|name| !allowed.contains(&name.as_str()))
        .collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}

#[test]
fn a_name_lost_while_others_remain_needs_link_remap() {
    let mut trip = Trip::new(
        concat!(module_path!(), "::a_name_lost_while_others_remain_needs_link_remap"),
        |folder| {
            fs::write(folder.join("a"), "linked").unwrap();
            fs::hard_link(folder.join("a"), folder.join("b")).unwrap();
            at(File::open(folder.join("a")).unwrap(), FREE, false);
            fs::remove_file(folder.join("a")).unwrap();
        },
        |folder| {
            let opened = file(FREE).metadata().unwrap();
            assert_eq!((opened.ino(), opened.nlink()), (fs::metadata(folder.join("b")).unwrap().ino(), 1));
            assert_eq!(link(FREE), format!("{} (deleted)", folder.join("a").display()));
            names_left(folder, &["images", "said", "b"]);
        },
    );
    if std::env::var_os("RCRIU_TEST_ROLE").is_none() {
        let e = trip.refusal().unwrap();
        assert!(e.contains("--link-remap"), "{e}");
    }
    trip.dump = |opts| opts.common.link_remap = true;
    trip.run();
}

#[test]
fn contents_above_the_limit_are_refused() {
    let mut trip = Trip::new(
        concat!(module_path!(), "::contents_above_the_limit_are_refused"),
        |folder| {
            fs::write(folder.join("a"), vec![1; 100_000]).unwrap();
            at(File::open(folder.join("a")).unwrap(), FREE, false);
            fs::remove_file(folder.join("a")).unwrap();
        },
        |_| {},
    );
    trip.dump = |opts| opts.ghost_limit = 50_000;
    if let Some(e) = trip.refusal() {
        assert!(e.contains("--ghost-limit"), "{e}");
    }
}

/// What happens to the file between dump and restore, and what the restore says to it.
fn changed(test: &'static str, between: fn(&Path), says: &str) {
    let mut trip = Trip::new(
        test,
        |folder| {
            fs::copy("/proc/self/exe", folder.join("a")).unwrap();
            at(File::open(folder.join("a")).unwrap(), FREE, false);
        },
        |_| {},
    );
    trip.between = between;
    if std::env::var_os("RCRIU_TEST_ROLE").is_some() {
        trip.run();
    }
    let e = std::panic::catch_unwind(|| trip.run()).unwrap_err();
    let e = e.downcast_ref::<String>().unwrap();
    assert!(e.contains(says), "{e}");
}

#[test]
fn another_size_is_refused() {
    let test = concat!(module_path!(), "::another_size_is_refused");
    changed(test, |folder| fs::write(folder.join("a"), "x").unwrap(), "it has 1 bytes, ");
}

#[test]
fn another_mode_is_refused() {
    let test = concat!(module_path!(), "::another_mode_is_refused");
    changed(
        test,
        |folder| fs::set_permissions(folder.join("a"), fs::Permissions::from_mode(0o600)).unwrap(),
        "its mode is 100600, 100755",
    );
}

/// The same program of the same size, but another build of it.
fn other_build(test: &'static str) -> Option<Trip> {
    if build_id::of(&File::open("/bin/sh").unwrap()).unwrap().is_none() {
        eprintln!("SKIP: /bin/sh has no build-id");
        return None;
    }
    let mut trip = Trip::new(
        test,
        |folder| {
            fs::copy("/bin/sh", folder.join("a")).unwrap();
            at(File::open(folder.join("a")).unwrap(), FREE, false);
        },
        |_| {},
    );
    trip.between = |folder| {
        let path = folder.join("a");
        let id = build_id::of(&File::open(&path).unwrap()).unwrap().unwrap();
        let id: Vec<u8> = id.iter().flat_map(|w| w.to_ne_bytes()).collect();
        let mut bytes = fs::read(&path).unwrap();
        let at = bytes.windows(id.len()).position(|w| w == id).unwrap();
        bytes[at] ^= 1;
        fs::write(&path, bytes).unwrap();
    };
    Some(trip)
}

#[test]
fn another_build_is_refused() {
    let Some(trip) = other_build(concat!(module_path!(), "::another_build_is_refused")) else { return };
    if std::env::var_os("RCRIU_TEST_ROLE").is_some() {
        trip.run();
    }
    let e = std::panic::catch_unwind(|| trip.run()).unwrap_err();
    let e = e.downcast_ref::<String>().unwrap();
    assert!(e.contains("its build-id is another"), "{e}");
}

#[test]
fn another_build_is_fine_when_only_sizes_count() {
    let name = concat!(module_path!(), "::another_build_is_fine_when_only_sizes_count");
    let Some(mut trip) = other_build(name) else { return };
    trip.restore = |opts| opts.common.file_validation = FileValidation::Size;
    trip.run();
}

#[test]
fn a_file_can_come_from_outside() {
    let mut trip = Trip::new(
        concat!(module_path!(), "::a_file_can_come_from_outside"),
        |folder| {
            fs::write(folder.join("a"), "one").unwrap();
            at(File::open(folder.join("a")).unwrap(), FREE, false);
        },
        |_| assert_eq!(content(FREE), "another"),
    );
    trip.between = |folder| {
        fs::remove_file(folder.join("a")).unwrap();
        fs::write(folder.join("b"), "another").unwrap();
    };
    trip.restore = |opts| {
        let folder = std::path::PathBuf::from(std::env::var_os("RCRIU_TEST_FOLDER").unwrap());
        let other = File::open(folder.join("b")).unwrap();
        let key = folder.join("a").to_str().unwrap().trim_start_matches('/').to_owned();
        opts.inherit_fds.push(crate::options::InheritFd { fd: std::os::fd::AsRawFd::as_raw_fd(&other), key });
        std::mem::forget(other);
    };
    trip.run();
}

#[test]
fn owners_of_signals_come_back() {
    Trip::new(
        concat!(module_path!(), "::owners_of_signals_come_back"),
        |_| {
            let (read, write) = nix::unistd::pipe().unwrap();
            crate::sys::fd::set_signal(read.as_fd(), libc::SIGUSR1).unwrap();
            let owner = crate::sys::fd::Owner { kind: 1, pid: nix::unistd::getppid().as_raw() };
            crate::sys::fd::set_owner(read.as_fd(), owner).unwrap();
            at(read, FREE, false);
            at(write, FREE + 1, false);
        },
        |_| {
            assert_eq!(crate::sys::fd::signal(get(FREE)).unwrap(), libc::SIGUSR1);
            let owner = crate::sys::fd::owner(get(FREE)).unwrap();
            assert_eq!(owner, crate::sys::fd::Owner { kind: 1, pid: nix::unistd::getppid().as_raw() });
            assert_eq!(crate::sys::fd::owner(get(FREE + 1)).unwrap().pid, 0);
        },
    )
    .run();
}
