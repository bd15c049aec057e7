//! Root folders of hierarchies, wherever and whether they are mounted.

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use nix::{fcntl::OFlag, sys::stat::Mode};

use crate::{
    error::{Context, Error, Result, SysContext},
    procfs::mountinfo,
    sys::fsmount::{self, Parameter},
};

/// Name of a hierarchy's folder in a yard: `cpu,cpuacct`, `systemd` for `name=systemd`, `unified` for version 2.
pub fn folder(controllers: &str) -> String {
    let names: Vec<&str> = controllers
        .split(',')
        .map(|c| match c {
            "" => "unified",
            named => named.strip_prefix("name=").unwrap_or(named),
        })
        .collect();
    names.join(",")
}

/// Opens the root folder of the hierarchy of `controllers` (as in `/proc/PID/cgroup`; empty for version 2): in
/// the yard if there is one, else by a mount that only its descriptor knows, or, where the kernel has no such
/// mounts (before 5.2), where it is mounted.
///
/// # Errors
/// The hierarchy does not exist, or cannot be reached; named.
pub fn hierarchy(controllers: &str, yard: Option<&Path>) -> Result<OwnedFd> {
    open(controllers, yard)
        .during(|| format!("hierarchy of cgroup controllers '{}'", folder(controllers)))
        .map_err(|e| {
            e.remedy(
                "mount it, give --cgroup-yard a folder with all hierarchies, or use --manage-cgroups=ignore",
            )
        })
}

fn open(controllers: &str, yard: Option<&Path>) -> Result<OwnedFd> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let at =
        |path: &Path| nix::fcntl::open(path, flags, Mode::empty()).call(format!("open({})", path.display()));
    if let Some(yard) = yard {
        return at(&yard.join(folder(controllers)));
    }
    let made = if controllers.is_empty() {
        fsmount::detached("cgroup2", &[])
    } else {
        let parameters: Vec<Parameter<'_>> = controllers
            .split(',')
            .map(|c| {
                c.strip_prefix("name=").map_or(Parameter::Flag(c), |name| Parameter::Value("name", name))
            })
            .collect();
        fsmount::detached("cgroup", &parameters)
    };
    match made {
        Err(e) if e.errno() == Some(libc::ENOSYS) => at(&mounted(controllers)?),
        made => made,
    }
}

/// Where the hierarchy is mounted with its root.
fn mounted(controllers: &str) -> Result<PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    let kind: &[u8] = if controllers.is_empty() { b"cgroup2" } else { b"cgroup" };
    mountinfo::own()?
        .iter()
        .filter(|m| m.fs_type == kind && m.root == b"/")
        .find(|m| {
            let mut wanted: Vec<&str> = controllers.split(',').filter(|c| !c.is_empty()).collect();
            let mut has: Vec<&str> = m
                .super_options
                .split(|c| *c == b',')
                .filter_map(|o| std::str::from_utf8(o).ok())
                .filter(|o| wanted.contains(o))
                .collect();
            wanted.sort_unstable();
            has.sort_unstable();
            has == wanted
        })
        .map(|m| PathBuf::from(std::ffi::OsStr::from_bytes(&m.point)))
        .ok_or_else(|| Error::host("it is mounted nowhere"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_named_as_in_a_yard() {
        assert_eq!(folder("cpu,cpuacct"), "cpu,cpuacct");
        assert_eq!(folder("name=systemd"), "systemd");
        assert_eq!(folder(""), "unified");
    }
}
