//! Options about mounts and the root of the file system.

use super::{Group, Opt, Takes, on};

pub const OPTIONS: &[&Opt] = &[&ROOT, &SKIP_MNT, &ENABLE_FS, &MNTNS_COMPAT_MODE];

static ROOT: Opt = Opt {
    long: "root",
    short: Some('r'),
    takes: Takes::One("PATH"),
    group: Group::Mounts,
    on: on::RESTORE,
    help: "Root of the mount namespace that is restored",
    more: "",
    apply: |raw, v| {
        raw.root = Some(v.path()?);
        Ok(())
    },
};

static SKIP_MNT: Opt = Opt {
    long: "skip-mnt",
    short: None,
    takes: Takes::One("PATH"),
    group: Group::Mounts,
    on: on::BOTH,
    help: "Leave out the mount at PATH",
    more: "May be given more than once.",
    apply: |raw, v| {
        raw.skip_mnt.push(v.path()?);
        Ok(())
    },
};

static ENABLE_FS: Opt = Opt {
    long: "enable-fs",
    short: None,
    takes: Takes::One("TYPE,..|all"),
    group: Group::Mounts,
    on: on::BOTH,
    help: "Mount file systems of these types anew, though unknown",
    more: "Their content is not kept. May be given more than once.",
    apply: |raw, v| {
        raw.enable_fs.add(v.text()?);
        Ok(())
    },
};

static MNTNS_COMPAT_MODE: Opt = Opt {
    long: "mntns-compat-mode",
    short: None,
    takes: Takes::Switch,
    group: Group::Mounts,
    on: on::RESTORE,
    help: "Rebuild mounts the older way",
    more: "",
    apply: |raw, v| {
        raw.mntns_compat_mode = v.on();
        Ok(())
    },
};

#[cfg(test)]
mod tests {
    use super::super::try_it::raw;
    use std::path::{Path, PathBuf};

    #[test]
    fn root_takes_a_path() {
        assert_eq!(raw(&["-r", "/x"]).root.as_deref(), Some(Path::new("/x")));
    }

    #[test]
    fn skipped_mounts_add_up() {
        assert_eq!(
            raw(&["--skip-mnt", "/a", "--skip-mnt=/b"]).skip_mnt,
            [PathBuf::from("/a"), PathBuf::from("/b")]
        );
    }

    #[test]
    fn file_system_types_add_up() {
        let r = raw(&["--enable-fs", "hugetlbfs", "--enable-fs=tracefs"]);
        assert!(
            r.enable_fs.allows("hugetlbfs") && r.enable_fs.allows("tracefs") && !r.enable_fs.allows("xfs")
        );
        assert!(raw(&["--enable-fs", "all"]).enable_fs.allows("xfs"));
    }

    #[test]
    fn the_older_way_is_a_switch() {
        assert!(raw(&["--mntns-compat-mode"]).mntns_compat_mode);
        assert!(!raw(&["--mntns-compat-mode", "--no-mntns-compat-mode"]).mntns_compat_mode);
    }
}
