//! Mounts whose file system stays outside: named by the user, or found in our own namespace.

use std::{
    collections::HashSet,
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use super::{
    mount::{Mount, Outside},
    paths::{below, join, shown},
};
use crate::{
    error::{Context, Error, Result},
    options::{CommonOptions, External},
};

/// Value of `--external mnt[KEY]:VALUE`.
fn value_of_mount<'a>(opts: &'a CommonOptions, key: &[u8]) -> Option<&'a str> {
    opts.external.iter().find_map(|external| match external {
        External::Mnt { key: k, value: Some(value) } if k.as_bytes() == key => Some(&value[..]),
        _ => None,
    })
}

fn value_of_device<'a>(opts: &'a CommonOptions, key: &str) -> Option<&'a str> {
    opts.external.iter().find_map(|external| match external {
        External::Dev { key: k, value: Some(value) } if k == key => Some(&value[..]),
        _ => None,
    })
}

/// Marks what options say is outside: `mounts` of a dump, with `host` for what we have mounted ourselves, empty if
/// nothing is to be found by itself. Roots are never outside. A mount point names a mount of the root task's namespace,
/// `first`, if that has one there: others may have something else.
///
/// `own` are mounts of control groups that show what is in the tree's own cgroup namespace, by number. Their roots are
/// folders below those of our mounts, but they can be made inside again, wherever a restore puts the tree.
pub(super) fn mark(
    mounts: &mut [Mount],
    first: &[Mount],
    (host, own): (&[Mount], &HashSet<u32>),
    opts: &CommonOptions,
) {
    for mount in mounts.iter_mut().filter(|m| m.point != b"/") {
        let another = first.iter().any(|other| other.point == mount.point);
        if let Some(name) = value_of_mount(opts, &mount.point).filter(|_| !another) {
            log::info!("{} is {name} outside", mount.name());
            mount.outside = Some(Outside::Named(name.to_owned()));
            continue;
        }
        let device = format!("{}/{}", mount.dev >> 20, mount.dev & 0xf_ffff);
        if let (true, None, Some(name)) = (mount.is_whole(), mount.kind, value_of_device(opts, &device)) {
            mount.source = format!("dev[{name}]").into_bytes();
            mount.outside = Some(Outside::Device);
            mount.by_name = true;
            continue;
        }
        let fits = |ours: &Mount| match own.contains(&mount.id) {
            true => mount.root == ours.root,
            false => {
                mount.root.as_deref().zip(ours.root.as_deref()).is_some_and(|(r, o)| below(r, o).is_some())
            }
        };
        let Some(found) = best(mount, host, fits) else { continue };
        if mount.shared != 0 {
            if !opts.external_mounts.sharing {
                continue;
            }
            mount.internal_sharing = mount.shared != found.shared;
        }
        if mount.master != 0
            && (!opts.external_mounts.masters || ![found.shared, found.master].contains(&mount.master))
        {
            continue;
        }
        let rest = mount.root.as_deref().zip(found.root.as_deref()).and_then(|(all, base)| below(all, base));
        mount.source = join(&found.point, rest.unwrap_or_default());
        log::info!("{} is {} outside", mount.name(), shown(&mount.source));
        mount.outside = Some(Outside::Automatic);
    }
}

/// The mount of ours that `mount` may have been made from, its root being one that `fits`: one it shares with, or is a
/// slave of; else the last that shows all of it.
fn best<'a>(mount: &Mount, host: &'a [Mount], fits: impl Fn(&Mount) -> bool) -> Option<&'a Mount> {
    let tied = |m: &&Mount| m.shared != 0 && [mount.shared, mount.master].contains(&m.shared);
    let candidates = || host.iter().filter(|m| m.dev == mount.dev && fits(m));
    candidates().find(tied).or_else(|| candidates().next_back())
}

/// Path outside of a mount that is.
///
/// # Errors
/// An option that is missing is named.
pub(super) fn path_of(mount: &Mount, opts: &CommonOptions) -> Result<PathBuf> {
    // As CRIU has it: a relative path is one from the root.
    let absolute = |path: &[u8]| Ok(Path::new("/").join(OsStr::from_bytes(path)));
    let path = match &mount.outside {
        Some(Outside::Named(name)) => match value_of_mount(opts, name.as_bytes()) {
            Some(path) if !path.is_empty() => absolute(path.as_bytes()),
            _ => Err(Error::usage("it comes from outside, and no option says from where")
                .remedy(format!("give --external mnt[{name}]:PATH"))),
        },
        Some(Outside::Automatic) if !opts.external_mounts.auto => Err(Error::usage(format!(
            "it was found to be {} outside when it was dumped",
            shown(&mount.source)
        ))
        .remedy("give --external mnt[]")),
        Some(Outside::Automatic) => absolute(&mount.source),
        _ => Err(Error::bug("no mount from outside")),
    };
    path.during(|| mount.name())
}

/// What mount(2) takes as source of a file system that is mounted anew.
///
/// # Errors
/// A device that is not said, or not there.
pub(super) fn source_of(mount: &Mount, opts: &CommonOptions) -> Result<Vec<u8>> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let source = || {
        if mount.dev >> 20 == 0 && mount.outside.is_none() {
            return Ok(mount.source.clone());
        }
        let text = String::from_utf8_lossy(&mount.source);
        let name = text.strip_prefix("dev[").and_then(|rest| rest.strip_suffix(']'));
        if let Some(name) = name {
            return value_of_device(opts, name).map(|path| path.as_bytes().to_vec()).ok_or_else(|| {
                Error::usage("its device comes from outside, and no option says which it is")
                    .remedy(format!("give --external dev[{name}]:PATH"))
            });
        }
        let found = std::fs::metadata(Path::new(&*text));
        let is = found.is_ok_and(|meta| {
            let dev = meta.rdev();
            meta.file_type().is_block_device()
                && super::mount::device(libc::major(dev), libc::minor(dev)) == mount.dev
        });
        match is {
            true => Ok(mount.source.clone()),
            false => Err(Error::host(format!("{text} is not the device it was")).remedy(
                "dump with --external dev[MAJOR/MINOR]:NAME, restore with --external dev[NAME]:PATH",
            )),
        }
    };
    source().during(|| mount.name())
}

#[cfg(test)]
mod tests {
    use super::super::testing::mount;
    use super::*;
    use crate::options::{Dir, DumpOptions};

    fn options(external: &[&str]) -> CommonOptions {
        let mut opts = DumpOptions::new(Dir::open("/").unwrap(), 1).common;
        opts.external = external.iter().map(|text| External::parse(text).unwrap()).collect();
        opts
    }

    #[test]
    fn named_mounts_go_to_images_by_name_and_come_back_by_path() {
        let mut mounts = [mount(1, 0, "/"), mount(2, 1, "/data")];
        mark(&mut mounts, &[], (&[], &HashSet::new()), &options(&["mnt[/data]:disk", "mnt[/]:never"]));
        assert_eq!(mounts[0].outside, None);
        assert_eq!(mounts[1].outside, Some(Outside::Named("disk".into())));
        // The same place in another namespace is not meant.
        let mut others = [mount(11, 0, "/"), mount(12, 11, "/data")];
        mark(&mut others, &mounts, (&[], &HashSet::new()), &options(&["mnt[/data]:disk"]));
        assert_eq!(others[1].outside, None);
        let path = path_of(&mounts[1], &options(&["mnt[disk]:/srv/x"])).unwrap();
        assert_eq!(path, Path::new("/srv/x"));
        let said = path_of(&mounts[1], &options(&[])).unwrap_err().to_string();
        assert!(said.contains("mount 2 on /data") && said.contains("--external mnt[disk]:PATH"), "{said}");
        assert_eq!(path_of(&mounts[1], &options(&["mnt[disk]:srv"])).unwrap(), Path::new("/srv"));
    }

    #[test]
    fn devices_from_outside_are_mounted_by_type() {
        let mut mounts = [mount(2, 1, "/disk")];
        mounts[0].dev = 8 << 20 | 1;
        mounts[0].kind = None;
        mounts[0].fs_name = b"ext4".into();
        mark(&mut mounts, &[], (&[], &HashSet::new()), &options(&["dev[8/1]:disk"]));
        assert_eq!((&mounts[0].source[..], mounts[0].by_name), (&b"dev[disk]"[..], true));
        assert_eq!(source_of(&mounts[0], &options(&["dev[disk]:/dev/sdb1"])).unwrap(), b"/dev/sdb1");
        let said = source_of(&mounts[0], &options(&[])).unwrap_err().to_string();
        assert!(said.contains("--external dev[disk]:PATH"), "{said}");
    }

    #[test]
    fn what_is_mounted_here_too_is_found() {
        let mut opts = options(&[]);
        opts.external_mounts.auto = true;
        let mut host = [mount(1, 0, "/"), mount(2, 1, "/srv/disk"), mount(3, 1, "/srv/other")];
        (host[1].dev, host[2].dev) = (7, 7);
        host[1].shared = 4;
        let mut of = mount(20, 1, "/data");
        (of.dev, of.root) = (7, Some(b"/sub".into()));
        let mut mounts = [of.clone()];
        mark(&mut mounts, &[], (&host, &HashSet::new()), &opts);
        assert_eq!(
            (&mounts[0].source[..], &mounts[0].outside),
            (&b"/srv/other/sub"[..], &Some(Outside::Automatic))
        );
        let said = path_of(&mounts[0], &options(&[])).unwrap_err().to_string();
        assert!(said.contains("--external mnt[]"), "{said}");
        assert_eq!(path_of(&mounts[0], &opts).unwrap(), Path::new("/srv/other/sub"));
        // Slaves only when asked for, and then of the mount they are slaves of.
        of.master = 4;
        let mut mounts = [of.clone()];
        mark(&mut mounts, &[], (&host, &HashSet::new()), &opts);
        assert_eq!(mounts[0].outside, None);
        opts.external_mounts.masters = true;
        mark(&mut mounts, &[], (&host, &HashSet::new()), &opts);
        assert_eq!(mounts[0].source, b"/srv/disk/sub");
    }

    #[test]
    fn groups_of_an_own_namespace_are_outside_only_where_we_have_the_very_same_mounted() {
        let mut opts = options(&[]);
        opts.external_mounts.auto = true;
        let mut host = [mount(1, 0, "/"), mount(2, 1, "/sys/fs/cgroup")];
        host[1].dev = 7;
        let mut of = mount(20, 1, "/sys/fs/cgroup");
        (of.dev, of.root) = (7, Some(b"/payload".into()));
        let marked = |host: &[Mount], own: &[u32]| {
            let mut mounts = [of.clone()];
            mark(&mut mounts, &[], (host, &own.iter().copied().collect()), &opts);
            mounts[0].outside.is_some().then(|| shown(&mounts[0].source).to_string())
        };
        assert_eq!(marked(&host, &[20]), None);
        assert_eq!(marked(&host, &[]).as_deref(), Some("/sys/fs/cgroup/payload"));
        host[1].root = of.root.clone();
        assert_eq!(marked(&host, &[20]).as_deref(), Some("/sys/fs/cgroup"));
    }
}
