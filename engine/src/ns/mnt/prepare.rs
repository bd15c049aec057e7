//! What a restore takes from the host, opened while we are there.

use std::{collections::BTreeMap, os::fd::OwnedFd, os::unix::ffi::OsStrExt, path::PathBuf};

use nix::{fcntl::OFlag, sys::stat::Mode};

use super::{
    external,
    paths::{below, join, shown},
    plan::root_of,
    tree::{Source, Tree},
};
use crate::{
    error::{Context, Error, Result, SysContext},
    options::RestoreOptions,
    procfs::mountinfo,
    sys::mount::{self as calls, Calls},
};

/// What stands outside for a mount.
#[derive(Debug)]
pub(super) enum Given {
    /// A clone of it that is mounted nowhere.
    Clone(OwnedFd),
    /// Where it is, for kernels without such clones, and the file there.
    Path(PathBuf, OwnedFd),
}

/// All that [`build`](super::build) needs besides the images. Dropped, it leaves nothing. Its descriptors are inherited
/// by all that are forked: whoever does not build drops it.
#[derive(Debug)]
pub struct Prepared {
    pub(super) calls: Calls,
    /// By position in the tree: root and external mounts.
    pub(super) given: BTreeMap<usize, Given>,
    /// By position in the tree: sources of file systems that are mounted anew.
    pub(super) sources: BTreeMap<usize, Vec<u8>>,
}

impl Prepared {
    /// Makes the root of `tree` the working folder, where it is known by a path that the users of the tree may be denied.
    /// The working folder goes along into a new mount namespace.
    ///
    /// Precondition: the calling process is still in the mount namespace in which this was prepared.
    pub fn go(&self, tree: &Tree) -> Result<()> {
        match tree.spaces.first().and_then(|space| self.given.get(&space.root)) {
            Some(Given::Path(path, file)) => {
                nix::unistd::fchdir(file).call("fchdir").during(|| path.display().to_string())
            }
            _ => Ok(()),
        }
    }
}

impl Tree {
    /// Opens what comes from outside. In the engine: in the namespaces of the host, with all rights, before the fork.
    ///
    /// # Errors
    /// A path that is not there; propagation that this kernel lets nobody make; a mount outside that nothing
    /// propagates to, though it should.
    pub fn prepare(&self, opts: &RestoreOptions) -> Result<Prepared> {
        let calls = if opts.mntns_compat_mode { Calls::OLD } else { Calls::probe() };
        log::debug!("Mounts are made with {calls:?}");
        if !calls.set_group {
            self.check_old()?;
        }
        let mut prepared = Prepared { calls, given: BTreeMap::new(), sources: BTreeMap::new() };
        let mut host = None;
        for (at, source) in self.sources.iter().enumerate() {
            let mount = self.at(at)?;
            let path = match source {
                Source::Of(_) => continue,
                Source::New => {
                    prepared.sources.insert(at, external::source_of(mount, &opts.common)?);
                    continue;
                }
                Source::Root => root_of(opts)?,
                Source::Outside => external::path_of(mount, &opts.common)?,
            };
            let mut given = || {
                if self.is_led_outside(at) {
                    let host = match &mut host {
                        Some(host) => host,
                        none => none.insert(mountinfo::own()?),
                    };
                    check_propagation(&path, host)?;
                }
                if calls.detached {
                    return calls::clone_at(path.as_os_str().as_bytes()).map(Given::Clone);
                }
                let file = nix::fcntl::open(&path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty());
                Ok(Given::Path(path.clone(), file.call("open")?))
            };
            let given = given().during(|| path.display().to_string()).during(|| mount.name())?;
            prepared.given.insert(at, given);
        }
        Ok(prepared)
    }

    /// The mount, or one made from it, is a slave of a group outside.
    pub(super) fn is_led_outside(&self, at: usize) -> bool {
        let made_from = |member: &usize| *member == at || self.sources.get(*member) == Some(&Source::Of(at));
        self.groups.iter().filter(|g| g.is_led_outside()).any(|g| g.members.iter().any(made_from))
    }

    /// Kernels that cannot put mounts into groups where they stand: they must be in them before, and then nothing
    /// may be mounted on them that others would receive.
    fn check_old(&self) -> Result<()> {
        let needs = || "a kernel with MOVE_MOUNT_SET_GROUP (Linux 5.15) is needed";
        for (at, mount) in self.mounts.iter().enumerate() {
            let Some(parent) = self.parents.get(at).copied().flatten() else { continue };
            let on = self.at(parent)?;
            let (Some(root), Some(rest)) = (&on.root, below(&mount.point, &on.point)) else { continue };
            let place = join(root, rest);
            let receives = |other: &usize| {
                *other != parent
                    && self
                        .mounts
                        .get(*other)
                        .and_then(|m| m.root.as_ref())
                        .is_some_and(|root| below(&place, root).is_some())
            };
            if on.shared != 0
                && let Some(other) = self.receivers(on.shared).iter().find(|other| receives(other))
            {
                let what = format!("it is on a mount that shares with {}", self.at(*other)?.name());
                return Err(Error::unsupported(what).remedy(needs()).during(mount.name()));
            }
        }
        for group in &self.groups {
            let roots = self.spaces.iter().map(|space| space.root);
            let lost = roots.filter(|root| group.members.contains(root));
            let lost =
                lost.into_iter().find(|root| group.above.is_some() || group.members.first() != Some(root));
            if let Some(root) = lost {
                let what =
                    "the root is in a propagation group with another mount, or is a slave of one inside";
                return Err(Error::unsupported(what).remedy(needs()).during(self.at(root)?.name()));
            }
            let first =
                group.members.first().and_then(|at| self.mounts.get(*at)).and_then(|m| m.root.clone());
            let above = group.above.and_then(|g| self.groups.get(g)).and_then(|g| g.members.first());
            let above = above.and_then(|at| self.mounts.get(*at)).and_then(|m| m.root.clone());
            for mount in group.members.iter().filter_map(|at| self.mounts.get(*at)) {
                let within = |base: &Option<Vec<u8>>| {
                    let base = base.as_ref().zip(mount.root.as_ref());
                    base.is_none_or(|(base, root)| below(root, base).is_some())
                };
                let first_needed = group.shared != 0 || group.above.is_some();
                if (first_needed && !within(&first)) || (group.above.is_some() && !within(&above)) {
                    let what = format!(
                        "its propagation group has mounts of other parts than {}",
                        shown(mount.root.as_deref().unwrap_or_default())
                    );
                    return Err(Error::unsupported(what).remedy(needs()).during(mount.name()));
                }
            }
        }
        Ok(())
    }

    /// Mounts of a group and of all that are slaves of it.
    fn receivers(&self, shared: u32) -> Vec<usize> {
        let mut groups = vec![shared];
        let mut members = Vec::new();
        for group in &self.groups {
            // Those above come first.
            let below = group.master != 0 && groups.contains(&group.master);
            if below && group.shared != 0 {
                groups.push(group.shared);
            }
            if below || group.shared == shared {
                members.extend(&group.members);
            }
        }
        members
    }
}

/// The host's mount that a path is on must be shared or a slave for others to be slaves of the same group.
fn check_propagation(path: &std::path::Path, host: &[mountinfo::Mount]) -> Result<()> {
    let whole = std::fs::canonicalize(path).call("realpath")?;
    let on = |m: &&mountinfo::Mount| below(whole.as_os_str().as_bytes(), &m.point).is_some();
    // The longest path; of several on one place the last hides the others.
    let mount = host.iter().filter(on).max_by_key(|m| m.point.len());
    match mount {
        Some(mount) if mount.shared == 0 && mount.master == 0 => {
            let point = shown(&mount.point);
            let what = format!("nothing propagates from {point}, which it is on, though it should");
            Err(Error::host(what).remedy(format!("mount --make-shared {point}")))
        }
        _ => Ok(()),
    }
}
