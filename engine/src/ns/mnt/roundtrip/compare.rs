//! What must be the same before and after.

use std::{
    collections::HashMap,
    fs,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use super::super::{Mount, Tree};
use crate::{procfs::mountinfo, sys::xattr};

/// Compares mounts of texts of mountinfo, one for each namespace, with those of `tree`: numbers may differ.
pub(super) fn assert_like(tree: &Tree, texts: &[Vec<u8>]) {
    let (mut found, mut spaces) = (Vec::new(), HashMap::new());
    for (space, text) in texts.iter().enumerate() {
        let mounts = mountinfo::parse(text).unwrap();
        spaces.extend(mounts.iter().map(|line| (line.id.cast_unsigned(), space)));
        found.extend(mounts.iter().map(Mount::from_kernel).map(named));
    }
    let wanted: Vec<Mount> = tree.mounts.iter().cloned().map(named).collect();
    let of_tree: HashMap<u32, usize> =
        tree.mounts.iter().enumerate().map(|(at, mount)| (mount.id, tree.space_of(at))).collect();
    let place = |all: &[Mount], spaces: &HashMap<u32, usize>, m: &Mount| {
        // Mount points from the root downwards: several may be at one place.
        let mut chain = vec![spaces[&m.id].to_string().into_bytes(), m.point.clone()];
        let mut at = m.parent;
        while let Some(m) = all.iter().find(|m| m.id == at && m.parent != m.id) {
            chain.push(m.point.clone());
            at = m.parent;
        }
        chain
    };
    let shown = |all: &[Mount]| all.iter().map(|m| format!("{m:?}\n")).collect::<String>();
    let both = || format!("wanted:\n{}found:\n{}", shown(&wanted), shown(&found));
    assert_eq!(found.len(), wanted.len(), "{}", both());
    let mut groups: HashMap<u32, u32> = HashMap::from([(0, 0)]);
    let mut devices = HashMap::new();
    for want in &wanted {
        let chain = place(&wanted, &of_tree, want);
        let found_one = found.iter().find(|m| place(&found, &spaces, m) == chain);
        let found = found_one.unwrap_or_else(|| panic!("{} is missing: {}", want.name(), both()));
        for (a, b) in [(want.shared, found.shared), (want.master, found.master)] {
            // A group outside is the host's, whatever its number.
            assert_eq!(*groups.entry(a).or_insert(b), b, "{}: {}", want.name(), both());
        }
        assert_eq!(*devices.entry(want.dev).or_insert(found.dev), found.dev, "{}", both());
        let same = Mount {
            id: want.id,
            parent: want.parent,
            dev: want.dev,
            shared: want.shared,
            master: want.master,
            outside: want.outside.clone(),
            internal_sharing: want.internal_sharing,
            ..found.clone()
        };
        let source_is_its_own = want.outside.is_none() && want.point != b"/";
        let same = Mount {
            source: if source_is_its_own { same.source } else { want.source.clone() },
            root: if source_is_its_own { same.root } else { want.root.clone() },
            ..same
        };
        assert_eq!(&same, want, "{}", both());
    }
    let mut renamed: Vec<u32> = groups.values().copied().collect();
    renamed.sort_unstable();
    renamed.dedup();
    assert_eq!(renamed.len(), groups.len(), "groups have become one: {}", both());
}

/// Without what only one side knows.
fn named(mount: Mount) -> Mount {
    let words = mount.options.split(|c| *c == b',').filter(|w| *w != b"newinstance").collect::<Vec<_>>();
    Mount { fs_name: Vec::new(), options: words.join(&b','), ..mount }
}

/// All below a folder, with everything an inode has.
pub(in super::super) fn listed(place: &Path) -> String {
    let mut out = String::new();
    let mut names: Vec<PathBuf> = vec![place.to_owned()];
    let mut at = 0;
    while let Some(path) = names.get(at).cloned() {
        at += 1;
        let meta = fs::symlink_metadata(&path).unwrap();
        let kind = meta.file_type();
        let mut more = String::new();
        if kind.is_dir() {
            let mut inner: Vec<PathBuf> = fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()).collect();
            inner.sort();
            names.extend(inner);
        } else if kind.is_symlink() {
            more = format!("-> {}", fs::read_link(&path).unwrap().display());
        } else if kind.is_file() {
            let data = fs::read(&path).unwrap();
            more =
                format!("{} bytes, sum {:x}, {} blocks", data.len(), crc32fast::hash(&data), meta.blocks());
        } else if kind.is_char_device() || kind.is_block_device() {
            more = format!("device {:x}", meta.rdev());
        }
        let bytes = path.as_os_str().as_bytes();
        let mut attributes: Vec<String> = xattr::list(bytes)
            .unwrap()
            .into_iter()
            .map(|name| format!("{name:?}={:?}", xattr::get(bytes, &name).unwrap()))
            .collect();
        attributes.sort();
        let (links, time) = (meta.nlink(), format!("{}.{:09}", meta.mtime(), meta.mtime_nsec()));
        let owner = format!("{}:{}", meta.uid(), meta.gid());
        let mode = meta.mode();
        out += &format!("{} {mode:o} {owner} {links} {time} {more} {attributes:?}\n", path.display());
    }
    out
}
