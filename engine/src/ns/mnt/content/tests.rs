//! Archives of tar(1), ours for it, and some that nobody made.

use std::{fs, os::fd::OwnedFd, path::Path, process::Command};

use nix::sched::{CloneFlags, unshare};
use rcriu_images::{ImageDir, ImageKind};
use tar::{EntryType, Header};

use super::{
    super::{ids::IdMaps, roundtrip::compare},
    archive::{time, time_text},
    *,
};

fn folder(path: &Path) -> OwnedFd {
    fs::File::open(path).unwrap().into()
}

/// Unpacking goes to folders: in a thread that has its own.
fn unpacked(archive: fs::File, to: &Path) -> crate::Result<()> {
    let to = folder(to);
    let act = move || {
        unshare(CloneFlags::CLONE_FS).unwrap();
        unpack(to, archive)
    };
    std::thread::spawn(act).join().unwrap()
}

fn fill(place: &Path) {
    fs::write(place.join("file"), "text").unwrap();
    fs::create_dir(place.join("folder")).unwrap();
    let long = place.join("folder").join("n".repeat(180));
    fs::write(&long, "long").unwrap();
    fs::hard_link(&long, place.join("again")).unwrap();
    std::os::unix::fs::symlink("l".repeat(200), place.join("link")).unwrap();
    let holes = fs::File::create(place.join("holes")).unwrap();
    for number in 0..60_u64 {
        std::os::unix::fs::FileExt::write_all_at(&holes, &[1; 4096], number << 17).unwrap();
    }
    holes.set_len(9 << 20).unwrap();
}

/// Without nanoseconds and disk usage, which other archives and file systems do not keep.
fn rough(place: &Path) -> String {
    let prefix = place.display().to_string();
    let line = |line: &str| {
        let line = line.replace(&prefix, "");
        let mut words: Vec<&str> = line.split(' ').collect();
        if let Some(time) = words.get_mut(4) {
            *time = time.split('.').next().unwrap();
        }
        words
            .join(" ")
            .split(" blocks")
            .next()
            .unwrap()
            .rsplit_once(", ")
            .map_or_else(|| words.join(" "), |(a, _)| a.to_owned())
    };
    compare::listed(place).lines().map(|l| line(l) + "\n").collect()
}

fn has_tar() -> bool {
    let has = Command::new("tar").arg("--version").output().is_ok_and(|o| o.status.success());
    if !has {
        eprintln!("skipped: no tar program");
    }
    has
}

#[test]
fn tar_reads_ours() {
    let (from, to, images) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fill(from.path());
    let dir = ImageDir::open(images.path()).unwrap();
    pack(std::os::fd::AsFd::as_fd(&folder(from.path())), 5, &dir, &IdMaps::default()).unwrap();
    let image = images.path().join(ImageKind::TmpfsDev.file_name(5));
    if !has_tar() {
        return;
    }
    // As CRIU does.
    let mut tar = Command::new("tar");
    tar.args(["--extract", "--gzip", "--no-unquote", "--no-wildcards", "--directory"]).arg(to.path());
    let out = tar.stdin(fs::File::open(image).unwrap()).output().unwrap();
    assert!(out.status.success() && out.stderr.is_empty(), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(rough(to.path()), rough(from.path()));
}

#[test]
fn we_read_those_of_tar() {
    if !has_tar() {
        return;
    }
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fill(from.path());
    for format in ["gnu", "pax"] {
        let archive = tempfile::tempfile().unwrap();
        let mut tar = Command::new("tar");
        tar.args(["--create", "--gzip", "--numeric-owner", "--format", format, "--directory"]);
        tar.arg(from.path()).stdout(archive.try_clone().unwrap());
        if format == "gnu" {
            tar.arg("--sparse");
        }
        assert!(tar.arg(".").status().unwrap().success());
        std::io::Seek::rewind(&mut &archive).unwrap();
        let inner = to.path().join(format);
        fs::create_dir(&inner).unwrap();
        unpacked(archive, &inner).unwrap();
        assert_eq!(rough(&inner), rough(from.path()));
    }
}

/// A member by type, name, link and data.
type By<'a> = (EntryType, &'a [u8], &'a [u8], &'a [u8]);

/// An archive of members made by hand.
fn archive(members: &[By]) -> fs::File {
    let mut out = flate2::write::GzEncoder::new(tempfile::tempfile().unwrap(), flate2::Compression::fast());
    for (kind, name, link, data) in members {
        let mut header = Header::new_gnu();
        header.set_entry_type(*kind);
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1);
        header.set_size(data.len() as u64);
        header.set_cksum();
        let padding = vec![0; (512 - data.len() % 512) % 512];
        for bytes in [&header.as_bytes()[..], data, &padding] {
            std::io::Write::write_all(&mut out, bytes).unwrap();
        }
    }
    std::io::Write::write_all(&mut out, &[0; 1024]).unwrap();
    let mut file = out.finish().unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    file
}

#[test]
fn archives_that_lead_out_are_errors() {
    let file = EntryType::Regular;
    let outer = tempfile::tempdir().unwrap();
    let target = outer.path().as_os_str().to_str().unwrap();
    for (number, members) in [
        vec![(file, &b"../x"[..], &b""[..], &b"data"[..])],
        vec![(file, b"/x", b"", b"data")],
        vec![(EntryType::Symlink, b"a", target.as_bytes(), b""), (file, b"a/x", b"", b"data")],
        vec![(EntryType::Symlink, b"a", b"/x", b""), (file, b"a", b"", b"data")],
        vec![(EntryType::Link, b"a", b"../x", b"")],
        vec![(EntryType::Symlink, b"d", b"..", b""), (EntryType::Link, b"a", b"d/x", b"")],
        vec![(EntryType::XHeader, b"p", b"", b"13 path=../x\n"), (file, b"a", b"", b"data")],
        vec![(EntryType::XHeader, b"p", b"", b"99 path=x\n"), (file, b"a", b"", b"data")],
        vec![
            (EntryType::XHeader, b"p", b"", b"22 RCRIU.sockets=600\0\n"),
            (EntryType::Directory, b"./", b"", b""),
        ],
        vec![(EntryType::new(b'?'), b"a", b"", b"")],
        vec![(EntryType::GNUSparse, b"a", b"", b"data")],
    ]
    .into_iter()
    .enumerate()
    {
        let to = outer.path().join(number.to_string());
        fs::create_dir(&to).unwrap();
        assert!(unpacked(archive(&members), &to).is_err(), "{members:?}");
    }
    assert!(!outer.path().join("x").exists());
}

#[test]
fn damaged_archives_are_errors() {
    use std::io::Read;
    let mut whole = Vec::new();
    let members = [(EntryType::Regular, &b"file"[..], &b""[..], &[7; 2000][..])];
    archive(&members).read_to_end(&mut whole).unwrap();
    let place = tempfile::tempdir().unwrap();
    for len in (0..whole.len() - 8).step_by(7) {
        let file = place.path().join("archive");
        fs::write(&file, &whole[..len]).unwrap();
        let to = place.path().join(format!("to {len}"));
        fs::create_dir(&to).unwrap();
        assert!(unpacked(fs::File::open(&file).unwrap(), &to).is_err(), "{len} bytes");
    }
    for at in 0..whole.len() {
        let mut other = whole.clone();
        other[at] ^= 0x55;
        let file = place.path().join("archive");
        fs::write(&file, &other).unwrap();
        let to = place.path().join(format!("other {at}"));
        fs::create_dir(&to).unwrap();
        let _ = unpacked(fs::File::open(&file).unwrap(), &to);
    }
}

#[test]
fn times_go_both_ways() {
    for (seconds, nanos) in [(0, 0), (1, 5), (7, 999_999_999), (-1, 0), (-1, 750_000_000), (-5, 1)] {
        assert_eq!(time(time_text(seconds, nanos).as_bytes()), Some((seconds, nanos)));
    }
    assert_eq!(time(b"-4.75"), Some((-5, 250_000_000)));
    assert_eq!(time_text(-5, 250_000_000), "-4.750000000");
    assert_eq!((time(b"12"), time(b"x"), time(b"")), (Some((12, 0)), None, None));
}
