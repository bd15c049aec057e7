//! Propagation groups that make the trip.

use super::{
    cases::{external, proc},
    *,
};
use crate::options::External;

#[test]
fn groups_slaves_and_what_propagated_come_back() {
    Trip::new(name!("groups_slaves_and_what_propagated_come_back"), || {
        proc();
        mount("tmpfs", "/a", 0, "size=1m");
        fs::create_dir_all("/a/sub/dir").unwrap();
        fs::create_dir_all("/a/sub2").unwrap();
        fs::create_dir_all("/a/in").unwrap();
        change("/a", flags::SHARED);
        bind(Path::new("/a"), Path::new("/b"));
        bind(Path::new("/a/sub"), Path::new("/part"));
        bind(Path::new("/a"), Path::new("/slave"));
        change("/slave", flags::SLAVE);
        bind(Path::new("/a"), Path::new("/both"));
        change("/both", flags::SLAVE);
        change("/both", flags::SHARED);
        bind(Path::new("/both"), Path::new("/both2"));
        bind(Path::new("/both/sub"), Path::new("/last"));
        change("/last", flags::SLAVE);
        bind(Path::new("/a"), Path::new("/private"));
        change("/private", flags::PRIVATE);
        bind(Path::new("/a"), Path::new("/unbindable"));
        change("/unbindable", flags::UNBINDABLE);
        // Goes to all that receive it, and some lose it again.
        mount("tmpfs", "/a/in", 0, "size=64k");
        mount("tmpfs", "/a/sub/dir", 0, "size=64k");
        change("/slave/in", flags::PRIVATE);
        change("/b/sub/dir", flags::UNBINDABLE);
        mount("tmpfs", "/slave/sub2", 0, "size=64k");
        umount2("/slave/sub/dir", MntFlags::empty()).unwrap();
        // A group whose members have no common part, once the whole of it is private.
        mount("tmpfs", "/c", 0, "size=1m");
        fs::create_dir_all("/c/one").unwrap();
        fs::create_dir_all("/c/two").unwrap();
        change("/c", flags::SHARED);
        bind(Path::new("/c/one"), Path::new("/one"));
        bind(Path::new("/c/two"), Path::new("/two"));
        change("/c", flags::PRIVATE);
        // Mounted, and removed since.
        fs::create_dir("/c/gone").unwrap();
        fs::write("/c/gone file", "").unwrap();
        bind(Path::new("/c/gone"), Path::new("/gone"));
        bind(Path::new("/c/gone file"), Path::new("/gone file"));
        fs::remove_dir("/c/gone").unwrap();
        fs::remove_file("/c/gone file").unwrap();
        change("/", flags::SHARED);
    })
    .run();
}

fn groups() {
    proc();
    change("/", flags::SHARED);
    mount("tmpfs", "/a", 0, "size=1m");
    fs::write("/a/file", "").unwrap();
    change("/a", flags::SHARED);
    bind(Path::new("/a"), Path::new("/b"));
    bind(Path::new("/a/file"), Path::new("/file"));
    bind(Path::new("/a"), Path::new("/slave"));
    change("/slave", flags::SLAVE);
    bind(Path::new("/a"), Path::new("/both"));
    change("/both", flags::SLAVE);
    change("/both", flags::SHARED);
    mount("tmpfs", "/alone", 0, "size=1m");
    mount("tmpfs", "/alone/unbindable", 0, "size=1m");
    change("/alone/unbindable", flags::UNBINDABLE);
    change("/proc", flags::PRIVATE);
}

#[test]
fn groups_come_back_by_calls_of_old_kernels_too() {
    Trip {
        restore: |opts, _| opts.mntns_compat_mode = true,
        ..Trip::new(name!("groups_come_back_by_calls_of_old_kernels_too"), groups)
    }
    .run();
}

#[test]
fn groups_come_back_by_calls_of_kernels_between() {
    let calls = calls::Calls::probe();
    if !calls.detached {
        eprintln!("skipped: no open_tree(2)");
        return;
    }
    // Linux 5.2 to 5.11.
    let between = calls::Calls { set_group: false, setattr: false, ..calls };
    Trip { calls: Some(between), ..Trip::new(name!("groups_come_back_by_calls_of_kernels_between"), groups) }
        .run();
}

#[test]
fn what_old_kernels_cannot_build_is_refused_before_anything_is_made() {
    use super::super::testing::{mount as made, tree};
    let mut mounts = vec![made(1, 0, "/"), made(2, 1, "/a"), made(3, 1, "/b"), made(4, 2, "/a/on")];
    mounts[2].dev = mounts[1].dev;
    (mounts[1].shared, mounts[2].shared) = (5, 5);
    let folder = tempfile::tempdir().unwrap();
    let mut opts = RestoreOptions::new(Dir::open(folder.path()).unwrap());
    opts.mntns_compat_mode = true;
    let said = tree(mounts).unwrap().prepare(&opts).unwrap_err().to_string();
    assert!(said.contains("mount 4 on /a/on") && said.contains("Linux 5.15"), "{said}");
}

#[test]
fn slaves_of_a_group_of_the_host_are_that_again() {
    Trip {
        host: Some(|folder| {
            let shared = folder.join("shared");
            mount("tmpfs", shared.to_str().unwrap(), 0, "size=1m");
            change(shared.to_str().unwrap(), flags::SHARED);
        }),
        outside: |folder| {
            bind(&folder.join("shared"), &folder.join("root/ext"));
            bind(&folder.join("shared"), &folder.join("root/both"));
            change(folder.join("root/both").to_str().unwrap(), flags::SHARED);
        },
        dump: |opts, _| external(opts),
        restore: |opts, folder| {
            let path = folder.join("shared");
            opts.common.external.push(External::mnt("data", path.to_str()));
        },
        ..Trip::new(name!("slaves_of_a_group_of_the_host_are_that_again"), || {
            proc();
            bind(Path::new("/ext"), Path::new("/more"));
        })
    }
    .run();
}
