//! The network namespaces of a restored tree, from where the engine stands: it has the ones locked, makes them known to
//! each other, and connects them with ours.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sched::CloneFlags;
use rcriu_images::ImageDir;

use super::{home::network_of, kinds::Kinds};
use crate::{
    error::{Error, Result, SysContext},
    files::Space,
    ns::net::{self, Nets},
    options::RestoreOptions,
    pstree::RealPid,
};

/// Reads and checks what is to be in network namespaces `ids`, the root task's first; `None` if there are none.
///
/// # Errors
/// Damaged images; one from outside that is not given, or that a tree with users of its own may not enter.
pub(super) fn read(
    images: &ImageDir,
    ids: &[u32],
    kinds: Kinds,
    opts: &RestoreOptions,
) -> Result<Option<Nets>> {
    if ids.is_empty() {
        return Ok(None);
    }
    let nets = net::read(images, ids, opts)?;
    for name in ids.iter().filter_map(|id| nets.external(*id)) {
        if !opts.inherit_fds.iter().any(|fd| fd.is_for(name)) {
            return Err(Error::host(format!("the network namespace {name} must be given from outside"))
                .remedy(format!("restore with --inherit-fd fd[N]:{name}")));
        }
        if kinds.has(CloneFlags::CLONE_NEWUSER) {
            return Err(Error::unsupported(format!(
                "tasks in a user namespace that is made for the tree cannot enter the network namespace {name} from \
                 outside"
            ))
            .remedy("dump the tree without --external net[]"));
        }
    }
    Ok(Some(nets))
}

/// Files of the network namespaces among those that were made.
pub(super) fn files(made: &[Space]) -> Vec<(u32, BorrowedFd<'_>)> {
    let networks = made.iter().filter(|space| space.kind == CloneFlags::CLONE_NEWNET);
    networks.map(|space| (space.id, space.file.as_fd())).collect()
}

/// Connects the networks of the tree whose root task is `root` with each other and with ours; `made` are the namespaces if
/// there are several. All but the first are locked by `lock`, which is told whether they come from outside.
///
/// Precondition: they are empty.
pub(super) fn connect(
    nets: &Nets,
    root: RealPid,
    made: &[Space],
    mut lock: impl FnMut(OwnedFd, bool) -> Result<()>,
) -> Result<net::Undo> {
    let own = network_of(root)?;
    let mut spaces = files(made);
    if spaces.is_empty() {
        spaces.extend(nets.ids().map(|id| (id, own.as_fd())));
    }
    for (id, file) in spaces.iter().skip(1) {
        lock(file.try_clone_to_owned().call("dup")?, nets.external(*id).is_some())?;
    }
    net::introduce(nets, &spaces)?;
    net::restore_outside(nets, &spaces)
}
