//! Several namespaces that make the trip together.

use super::{
    cases::{NODEV, NOEXEC, NOSUID, proc},
    *,
};

/// Mounts that copies of the namespace share, follow, hide or have lost.
fn first() {
    proc();
    mounts();
}

fn mounts() {
    mount("tmpfs", "/a", 0, "size=1m");
    fs::create_dir_all("/a/sub").unwrap();
    fs::create_dir_all("/a/in").unwrap();
    fs::create_dir_all("/a/on").unwrap();
    fs::write("/a/file", "of all").unwrap();
    change("/a", flags::SHARED);
    mount("tmpfs", "/b", 0, "size=1m");
    fs::write("/b/file", "of the first").unwrap();
    change("/", flags::SHARED);
}

fn peer() {
    mount("tmpfs", "/a/in", 0, "size=64k");
    bind(Path::new("/a/sub"), Path::new("/part"));
    umount2("/b", MntFlags::empty()).unwrap();
    mount("tmpfs", "/b", 0, "size=64k");
    fs::write("/b/file", "of the peer").unwrap();
    bind(Path::new("/b/file"), Path::new("/a/file"));
}

fn follower() {
    change("/", flags::REC | flags::SLAVE);
    mount("tmpfs", "/a/on", 0, "size=64k");
    change("/a/on", flags::SHARED);
    bind(Path::new("/b"), Path::new("/read-only"));
    change("/read-only", flags::BIND | flags::REMOUNT | flags::RDONLY);
    change("/b", flags::UNBINDABLE);
}

#[test]
fn namespaces_come_back_with_what_they_share() {
    Trip {
        others: &[peer, follower],
        content: &["/b"],
        ..Trip::new(name!("namespaces_come_back_with_what_they_share"), first)
    }
    .run();
}

#[test]
fn namespaces_come_back_with_users_of_their_own() {
    Trip {
        others: &[peer, follower],
        users: true,
        outside: |folder| {
            // Only where others of the kind can be seen may they be mounted.
            mount("proc", folder.join("root/proc").to_str().unwrap(), NOSUID | NODEV | NOEXEC, "");
        },
        content: &["/b"],
        ..Trip::new(name!("namespaces_come_back_with_users_of_their_own"), mounts)
    }
    .run();
}

/// Nothing that old kernels could not make.
fn alone() {
    proc();
    mount("tmpfs", "/a", 0, "size=1m");
    fs::write("/a/file", "").unwrap();
    change("/a", flags::SHARED);
    mount("tmpfs", "/b", 0, "size=1m");
    fs::write("/b/file", "of the first").unwrap();
}

fn copy_of_it() {
    change("/a", flags::SLAVE);
    umount2("/b", MntFlags::empty()).unwrap();
    mount("tmpfs", "/b", 0, "size=64k");
    mount("tmpfs", "/c", 0, "size=64k");
    change("/c", flags::SHARED);
    bind(Path::new("/c"), Path::new("/d"));
    mount("tmpfs", "/e", 0, "size=64k");
    change("/e", flags::UNBINDABLE);
}

#[test]
fn namespaces_come_back_by_calls_of_old_kernels_too() {
    Trip {
        others: &[copy_of_it, || ()],
        content: &["/b"],
        restore: |opts, _| opts.mntns_compat_mode = true,
        ..Trip::new(name!("namespaces_come_back_by_calls_of_old_kernels_too"), alone)
    }
    .run();
}

#[test]
fn namespaces_come_back_by_calls_of_kernels_between() {
    let calls = calls::Calls::probe();
    if !calls.detached {
        eprintln!("skipped: no open_tree(2)");
        return;
    }
    let between = calls::Calls { set_group: false, setattr: false, ..calls };
    Trip {
        others: &[copy_of_it, || ()],
        content: &["/b"],
        calls: Some(between),
        ..Trip::new(name!("namespaces_come_back_by_calls_of_kernels_between"), alone)
    }
    .run();
}

#[test]
fn numbers_of_mounts_lead_to_their_namespaces() {
    use super::super::testing::mount as made;
    let mounts = |first: u32| vec![made(first, 0, "/"), made(first + 1, first, "/a")];
    let tree = Tree::new(vec![(7, mounts(1)), (9, mounts(11))]);
    // The second has another root, which is nowhere.
    assert!(tree.unwrap_err().to_string().contains("mount 11 on /"));
    let mut second = mounts(11);
    second[0].dev = 101;
    let tree = Tree::new(vec![(7, mounts(1)), (9, second)]).unwrap();
    assert_eq!(tree.ids().collect::<Vec<_>>(), [7, 9]);
    assert_eq!((tree.space_of(1), tree.space_of(2)), (0, 1));
    assert!(tree.is_root(2) && !tree.is_root(3));
    assert_eq!(tree.places()[1][1].id, 12);
}
