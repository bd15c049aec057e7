//! Maps read, translated and written; a root that is one.

use super::*;
use crate::ns::testing::{self, Apart};

fn map(ranges: &[(u32, u32, u32)]) -> Map {
    Map(ranges
        .iter()
        .map(|&(first, lower_first, count)| pb::UidGidExtent { first, lower_first, count })
        .collect())
}

/// A namespace with the same map of users and groups, of (inside, outside, count).
pub(in crate::ns) fn mapped(ranges: &[(u32, u32, u32)]) -> UserNs {
    UserNs { uid: map(ranges), gid: map(ranges) }
}

fn folder() -> (tempfile::TempDir, ImageDir) {
    let folder = tempfile::tempdir().unwrap();
    let images = ImageDir::open(folder.path()).unwrap();
    (folder, images)
}

fn written(images: &ImageDir, namespace: &UserNs) {
    let mut out = images.writer(ImageKind::Userns, 7);
    out.write(&namespace.entry()).unwrap();
    out.finish().unwrap();
}

#[test]
fn ids_are_translated_both_ways() {
    let namespace = UserNs {
        uid: map(&[(0, 100_000, 1000), (1000, 1000, 1), (1001, 101_001, u32::MAX - 101_001)]),
        gid: map(&[(0, 5, 1)]),
    };
    assert_eq!(namespace.uid_inside(100_999), Some(999));
    assert_eq!(namespace.uid_inside(1000), Some(1000));
    assert_eq!(namespace.uid_inside(101_000), None);
    assert_eq!(namespace.uid_inside(u32::MAX - 1), Some(u32::MAX - 1 - 101_001 + 1001));
    assert_eq!(namespace.uid_outside(1001), Some(101_001));
    assert_eq!(namespace.image_uid(0), UNMAPPED);
    assert_eq!(
        (namespace.image_gid(5), namespace.gid_outside(0), namespace.gid_outside(1)),
        (0, Some(5), None)
    );
    assert_eq!(
        Map::parse(b"         0     100000       1000\n      1000 1000 1\n"),
        Some(map(&[(0, 100_000, 1000), (1000, 1000, 1)]))
    );
    assert_eq!(Map::parse(b"0 1\n"), None);
    assert_eq!(Map::parse(b"0 1 1 1\n"), None);
    assert_eq!(Map::parse(b"0 1 -1\n"), None);
}

#[test]
fn maps_that_no_kernel_takes_are_errors() {
    let (_folder, images) = folder();
    assert!(read(&images, 7).is_err());
    let good = map(&[(0, 1, 2)]);
    let many: Vec<_> = (0..=RANGES as u32).map(|n| (n, n, 1)).collect();
    for (bad, why) in [
        (map(&[]), "no id 0"),
        (map(&[(1, 0, 5)]), "no id 0"),
        (map(&[(0, 0, 0)]), "empty"),
        (map(&[(0, u32::MAX, 2)]), "beyond"),
        (map(&[(0, 0, 10), (9, 20, 1)]), "overlap"),
        (map(&[(0, 0, 10), (20, 9, 1)]), "overlap"),
        (map(&many), "more ranges"),
    ] {
        for namespace in
            [UserNs { uid: bad.clone(), gid: good.clone() }, UserNs { uid: good.clone(), gid: bad.clone() }]
        {
            written(&images, &namespace);
            let said = read(&images, 7).unwrap_err().to_string();
            assert!(said.starts_with("userns-7.img: the map of ") && said.contains(why), "{why}: {said}");
        }
    }
    let all = UserNs { uid: map(&[(0, 0, u32::MAX)]), gid: good };
    written(&images, &all);
    assert_eq!(read(&images, 7).unwrap(), all);
}

#[test]
fn maps_come_back_and_root_is_root() {
    if testing::apart() {
        testing::say("ready");
        UserNs::become_root().unwrap();
        let ids = (nix::unistd::getresuid().unwrap(), nix::unistd::getresgid().unwrap());
        assert!(ids.0.saved.is_root() && ids.0.real.is_root() && ids.1.saved.as_raw() == 0);
        assert_eq!(nix::unistd::getgroups().unwrap(), []);
        // Of a process that cannot be looked at it is not ours.
        assert_eq!(nix::sys::stat::stat("/proc/thread-self/environ").unwrap().st_uid, 0);
        testing::say("root");
        return;
    }
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let (_folder, images) = folder();
    let namespace = UserNs { uid: map(&[(0, 100_000, 10), (10, 0, 1)]), gid: map(&[(0, 200_000, 70_000)]) };
    let test = concat!(module_path!(), "::maps_come_back_and_root_is_root");
    // Who starts a program without being mapped loses the rights of a namespace's maker otherwise.
    let Some(mut child) = Apart::start(&["--user", "--uts", "--keep-caps"], test) else { return };
    // Nothing is mapped yet.
    assert!(dump(child.pid(), &images, 7).unwrap_err().to_string().contains("no id 0"));
    namespace.write_maps(child.pid()).unwrap();
    assert!(namespace.write_maps(child.pid()).is_err());
    assert_eq!(child.go().as_deref(), Some("root"));
    assert_eq!(dump(child.pid(), &images, 7).unwrap(), namespace);
    assert_eq!(read(&images, 7).unwrap(), namespace);
}

#[test]
fn namespaces_of_another_owner_are_refused() {
    if testing::apart() {
        testing::say("ready");
        return;
    }
    let test = concat!(module_path!(), "::namespaces_of_another_owner_are_refused");
    // The outer unshare makes a UTS namespace that belongs to us.
    let options = ["--uts", "unshare", "--user", "--map-root-user", "--ipc"];
    let Some(child) = Apart::start(&options, test) else { return };
    let (_folder, images) = folder();
    let said = dump(child.pid(), &images, 1).unwrap_err().to_string();
    assert!(said.contains("its uts namespace belongs to another"), "{said}");
    assert!(images.names().unwrap().is_empty());
    // The older way finds the same.
    let (dir, me) =
        (ProcDir::open(child.pid()).unwrap(), ProcDir::open(RealPid(std::process::id() as i32)).unwrap());
    let user = dir.file("ns/user", OFlag::O_RDONLY).unwrap();
    let files = |names: &[&'static str]| -> Vec<_> {
        names.iter().filter_map(|name| own(&dir, &me, name).unwrap()).collect()
    };
    let not_told: &Owner<'_> = &|_| Ok(None);
    assert_eq!(first_stranger(&user, &files(&["ipc", "uts"]), not_told).unwrap(), Some("uts"));
    assert_eq!(first_stranger(&user, &files(&["ipc", "net"]), not_told).unwrap(), None);
}
