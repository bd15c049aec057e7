//! Images that no dump writes, and those of CRIU.

use rcriu_images::{ImageKind, pb};

use super::{
    super::{testing::mount as made, tree::Tree},
    *,
};
use crate::{Kind, options::External};

fn options(folder: &Path) -> RestoreOptions {
    RestoreOptions::new(Dir::open(folder).unwrap())
}

/// What reading these mounts says.
fn said(mounts: &[Mount]) -> crate::Error {
    let folder = tempfile::tempdir().unwrap();
    let images = ImageDir::open(folder.path()).unwrap();
    let mut out = images.writer(ImageKind::Mnts, ID.into());
    for mount in mounts.iter().rev() {
        out.write(&mount.entry()).unwrap();
    }
    out.finish().unwrap();
    super::super::read(&images, &[ID], &options(folder.path())).unwrap_err()
}

#[test]
fn tables_that_are_no_tree_are_errors() {
    let root = || made(1, 0, "/");
    for (mounts, word) in [
        (vec![], "no mount is the root"),
        (vec![made(2, 3, "/a"), made(3, 2, "/b")], "no mount is the root"),
        (vec![root(), made(2, 3, "/a"), made(3, 2, "/a")], "it is not on the root"),
        (vec![root(), made(2, 9, "/a")], "mount 9"),
        (vec![root(), made(2, 0, "/")], "two roots"),
        (vec![root(), made(1, 1, "/a")], "have the number 1"),
        (vec![root(), made(2, 1, "/a"), made(3, 2, "/b")], "said to be on"),
        (vec![root(), made(2, 1, "/a/../../b")], "paths that no mount has"),
        (vec![root(), Mount { root: Some(b"../..".into()), ..made(2, 1, "/a") }], "paths that no mount has"),
        (vec![root(), made(2, 1, "/a"), made(3, 1, "/a")], "same place"),
        (vec![root(), Mount { flags: flags::REMOUNT, ..made(2, 1, "/a") }], "unknown flags"),
    ] {
        let error = said(&mounts);
        assert!(matches!(error.kind(), Kind::Image(_) | Kind::Unsupported(_)), "{error:?}");
        assert!(error.to_string().contains(word), "{word}: {error}");
    }
}

#[test]
fn mounts_that_cannot_be_made_name_what_would_help() {
    let root = || made(1, 0, "/");
    let kind = |name: &[u8]| Mount { kind: super::super::fstypes::by_name(name), ..made(2, 1, "/a") };
    let named = Mount { outside: Some(super::super::Outside::Named("data".into())), ..made(2, 1, "/a") };
    for (mount, word) in [
        (made(2, 1, "/a"), "tmpfs-dev-102.tar.gz.img, its content, is missing"),
        (kind(b"autofs"), "--external mnt[/a]:NAME"),
        (kind(b"fuse"), "type fuse cannot be mounted again"),
        (Mount { root: Some(b"/sub".into()), ..kind(b"tmpfs") }, "no larger mount"),
        (named, "--external mnt[data]:PATH"),
        (Mount { master: 4, ..kind(b"proc") }, "--external mnt[]:m"),
    ] {
        let text = said(&[root(), mount]).to_string();
        assert!(text.contains(word) && text.contains("mount 2"), "{word}: {text}");
    }
}

proptest::proptest! {
    #[test]
    fn no_table_makes_a_panic(
        rows in proptest::collection::vec((0..6_u32, 0..6_u32, 0..3_u32, 0..5_usize, 0..4_usize, 0..4_u32, 0..4_u32), 0..8)
    ) {
        let points = [&b"/"[..], b"/a", b"/a/b", b"/c", b"relative"];
        let roots = [&b"/"[..], b"/x", b"/x/y", b"//"];
        let mounts: crate::Result<Vec<Mount>> = rows
            .into_iter()
            .map(|(mnt_id, parent_mnt_id, root_dev, point, root, shared, master)| {
                Mount::from_entry(pb::MntEntry {
                    fstype: 5,
                    mnt_id,
                    parent_mnt_id,
                    root_dev,
                    root: roots[root].into(),
                    mountpoint: points[point].into(),
                    sb_flags: Some(0),
                    shared_id: Some(shared),
                    master_id: Some(master),
                    ..Default::default()
                })
            })
            .collect();
        if let Ok(tree) = mounts.and_then(|mounts| Tree::new(vec![(1, mounts)])) {
            for at in 0..tree.mounts.len() {
                tree.is_hidden(at).unwrap();
            }
        }
    }
}

fn criu() -> Option<PathBuf> {
    let found = std::env::var_os("CRIU_BIN").map(PathBuf::from);
    if found.is_none() {
        eprintln!("skipped: CRIU_BIN does not say where CRIU is");
    }
    found
}

fn criu_trip(test: &'static str) -> Trip {
    Trip {
        program: true,
        outside: |folder| {
            fs::create_dir_all(folder.join("root")).unwrap();
            bind(Path::new("/usr"), &folder.join("root/usr"));
            for name in ["lib", "lib64", "bin"] {
                std::os::unix::fs::symlink(format!("usr/{name}"), folder.join("root").join(name)).unwrap();
            }
        },
        dump: |opts, _| opts.common.external.push(External::mnt("/usr", Some("usr"))),
        restore: |opts, _| opts.common.external.push(External::mnt("usr", Some("/usr"))),
        check: || {
            // What is over it goes.
            umount2("/a/sub", MntFlags::MNT_DETACH).unwrap();
            assert_eq!(text("/a/sub/file"), "content");
            assert_eq!(fs::read_link("/a/link").unwrap(), Path::new("sub/file"));
            assert_eq!(fs::metadata("/a/hole").unwrap().len(), 3 << 20);
        },
        ..Trip::new(test, || {
            mount("proc", "/proc", 0, "");
            mount("sysfs", "/sys", flags::RDONLY, "");
            mount("devpts", "/pts", 0, "newinstance,mode=620,ptmxmode=666");
            mount("tmpfs", "/a", 0, "size=4m,mode=755");
            fs::create_dir("/a/sub").unwrap();
            fs::write("/a/sub/file", "content").unwrap();
            std::os::unix::fs::symlink("sub/file", "/a/link").unwrap();
            let hole = fs::File::create("/a/hole").unwrap();
            std::os::unix::fs::FileExt::write_all_at(&hole, b"x", 1 << 20).unwrap();
            hole.set_len(3 << 20).unwrap();
            change("/a", flags::SHARED);
            bind(Path::new("/a"), Path::new("/b"));
            bind(Path::new("/a/sub"), Path::new("/slave"));
            change("/slave", flags::SLAVE);
            bind(Path::new("/a/sub/file"), Path::new("/file"));
            change("/file", flags::PRIVATE);
            change("/file", flags::BIND | flags::REMOUNT | flags::RDONLY | libc::MS_NOSUID as u32);
            mount("tmpfs", "/a/sub", 0, "size=8k");
            mount("tmpfs", "/private", 0, "size=8k");
            change("/private", flags::UNBINDABLE);
        })
    }
}

/// Images of CRIU in `images`, and the number of the namespace in them.
fn dumped_by(criu: &Path, folder: &Path, pid: RealPid) -> u32 {
    let images = folder.join("images");
    fs::create_dir_all(&images).unwrap();
    let mut command = Command::new(criu);
    command.args(["dump", "--leave-running", "--shell-job", "-v4", "-o", "dump.log", "-D"]).arg(&images);
    command.args(["--external", "mnt[/usr]:usr", "-t", &pid.0.to_string()]);
    let out = command.output().unwrap();
    let log = fs::read_to_string(images.join("dump.log")).unwrap_or_default();
    let errors: String = log.lines().filter(|l| l.contains("Error")).map(|l| format!("{l}\n")).collect();
    assert!(out.status.success(), "{errors}");
    let names = ImageDir::open(&images).unwrap().images().unwrap();
    let id = names.iter().find(|(kind, _)| *kind == ImageKind::Mnts).unwrap().1;
    id as u32
}

#[test]
fn images_of_criu_are_read_and_built() {
    let test = concat!(module_path!(), "::images_of_criu_are_read_and_built");
    let trip = criu_trip(test);
    if let Some(folder) = trip.role() {
        return trip.play(&folder);
    }
    let (Some(criu), folder) = (criu(), tempfile::tempdir().unwrap()) else { return };
    let Some(mut first) = First::start(&trip, folder.path()) else { return };
    let id = dumped_by(&criu, folder.path(), first.pids[0]);
    let images = folder.path().join("images");
    let theirs = images.join(format!("mountpoints-{id}.img"));
    fs::copy(&theirs, images.join("mountpoints-7.img")).unwrap();
    // Ours of the same mounts say the same.
    let place = tempfile::tempdir().unwrap();
    let table = trip.dumped(place.path(), &first.pids).unwrap();
    let dir = ImageDir::open(&images).unwrap();
    let mut entries = dir.read_all::<pb::MntEntry>(ImageKind::Mnts, ID.into()).unwrap();
    entries.reverse();
    let ours: Vec<pb::MntEntry> = table.mounts().iter().map(Mount::entry).collect();
    assert_eq!(ours, entries);
    first.end();
    trip.built(folder.path());
}

#[test]
fn criu_restores_what_we_dump() {
    let test = concat!(module_path!(), "::criu_restores_what_we_dump");
    let trip = criu_trip(test);
    if let Some(folder) = trip.role() {
        return trip.play(&folder);
    }
    let (Some(criu), folder) = (criu(), tempfile::tempdir().unwrap()) else { return };
    let Some(mut first) = First::start(&trip, folder.path()) else { return };
    let id = dumped_by(&criu, folder.path(), first.pids[0]);
    let images = folder.path().join("images");
    // Ours in the place of theirs.
    let place = tempfile::tempdir().unwrap();
    trip.dumped(place.path(), &first.pids).unwrap();
    first.end();
    for entry in fs::read_dir(place.path().join("images")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let to = name.replace("mountpoints-7", &format!("mountpoints-{id}"));
        assert!(images.join(&to).exists(), "{to}");
        fs::copy(place.path().join("images").join(&name), images.join(&to)).unwrap();
    }
    let root = folder.path().join("root");
    // CRIU wants the root to be a mount point; so it has a namespace in which it is.
    let script = format!(
        "mount --bind {0} {0} && exec {1} restore -d --shell-job -v4 -o restore.log -D {2} --root {0} \
         --external 'mnt[usr]:/usr' --pidfile {2}/pid",
        root.display(),
        criu.display(),
        images.display()
    );
    let out = Command::new("unshare").args(["--mount", "sh", "-c", &script]).output().unwrap();
    let log = fs::read_to_string(images.join("restore.log")).unwrap_or_default();
    let errors: String = log.lines().filter(|l| l.contains("Error")).map(|l| format!("{l}\n")).collect();
    assert!(out.status.success(), "{errors}");
    let pid: i32 = fs::read_to_string(images.join("pid")).unwrap().trim().parse().unwrap();
    let _restored = Killed(pid);
    let mut opts = options(&images);
    opts.common.root = Some(root);
    (trip.restore)(&mut opts, folder.path());
    let tree = super::super::read(&ImageDir::open(&images).unwrap(), &[id], &opts).unwrap();
    assert_like(&tree, &[fs::read(format!("/proc/{pid}/mountinfo")).unwrap()]);
    crate::ns::enter::inside(RealPid(pid), CloneFlags::CLONE_NEWNS, || {
        (trip.check)();
        Ok(())
    })
    .unwrap();
}

/// A process that goes with the test.
struct Killed(i32);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.0), Signal::SIGKILL);
    }
}
