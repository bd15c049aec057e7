//! Namespaces: which of them a tree has for itself, one kind per file.

pub mod cgroup;
pub mod enter;
pub mod home;
pub mod ipc;
pub mod mnt;
pub mod net;
pub mod pid;
#[cfg(test)]
pub(crate) mod testing;
pub mod time;
pub mod user;
pub mod uts;

use nix::sched::CloneFlags;
use rcriu_images::pb;

use crate::{
    error::{Error, Result},
    procfs::{ProcDir, number},
    restore::home::Kinds,
};

/// Number in images of the namespace of a task of which there may be several in one tree ([`home::SEVERAL`]).
pub fn id(ids: &pb::TaskKobjIdsEntry, kind: CloneFlags) -> Option<u32> {
    match kind {
        CloneFlags::CLONE_NEWNS => ids.mnt_ns_id,
        CloneFlags::CLONE_NEWNET => ids.net_ns_id,
        CloneFlags::CLONE_NEWIPC => ids.ipc_ns_id,
        CloneFlags::CLONE_NEWUTS => ids.uts_ns_id,
        _ => None,
    }
}

/// Number of a namespace of a task, as in its file `ns/KIND`: what options like `net[INODE]` name.
///
/// # Errors
/// A link of /proc that is not understood; ENOENT for a kind that the kernel has not.
pub fn inode(dir: &ProcDir, kind: &str) -> Result<u64> {
    let file = format!("ns/{kind}");
    let link = dir.link(&file)?.into_os_string().into_encoded_bytes();
    let bare = link.strip_prefix(kind.as_bytes()).and_then(|rest| rest.strip_prefix(b":["));
    let number = bare.and_then(|rest| rest.strip_suffix(b"]")).and_then(number);
    number.ok_or_else(|| dir.strange(&file, &link))
}

/// Refuses a task that is to live in other namespaces than the root task, whose numbers are `root`, but for kinds of
/// which a tree may have several, if the root has one of its own: those are `own`.
pub fn check(ids: &pb::TaskKobjIdsEntry, root: &pb::TaskKobjIdsEntry, own: Kinds) -> Result<()> {
    let unless = |kind, id: Option<u32>| id.filter(|_| !own.has(kind));
    let kinds = [
        ("pid", ids.pid_ns_id, root.pid_ns_id),
        ("network", unless(CloneFlags::CLONE_NEWNET, ids.net_ns_id), root.net_ns_id),
        ("IPC", unless(CloneFlags::CLONE_NEWIPC, ids.ipc_ns_id), root.ipc_ns_id),
        ("UTS", unless(CloneFlags::CLONE_NEWUTS, ids.uts_ns_id), root.uts_ns_id),
        ("mount", unless(CloneFlags::CLONE_NEWNS, ids.mnt_ns_id), root.mnt_ns_id),
        ("user", ids.user_ns_id, root.user_ns_id),
        ("cgroup", ids.cgroup_ns_id, root.cgroup_ns_id),
    ];
    // Images of a kernel without the kind have no number.
    match kinds.iter().find(|(_, own, root)| own.is_some() && root.is_some() && own != root) {
        Some((kind, ..)) => Err(Error::unsupported(format!(
            "a {kind} namespace other than the root task's cannot be restored"
        ))
        .remedy("restore these images with CRIU")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pstree::RealPid;

    #[test]
    fn namespaces_of_its_own_are_refused_by_name() {
        let host = pb::TaskKobjIdsEntry { net_ns_id: Some(2), time_ns_id: Some(3), ..Default::default() };
        let own = pb::TaskKobjIdsEntry { net_ns_id: Some(9), ..host };
        let none = Kinds::default();
        check(&host, &host, none).unwrap();
        let others = pb::TaskKobjIdsEntry { time_ns_id: Some(9), ipc_ns_id: Some(1), ..host };
        check(&others, &host, none).unwrap();
        let said = check(&own, &host, none).unwrap_err().to_string();
        assert!(said.contains("a network namespace other than"), "{said}");
        let root = pb::TaskKobjIdsEntry { mnt_ns_id: Some(4), ..host };
        let other = pb::TaskKobjIdsEntry { mnt_ns_id: Some(5), ..host };
        check(&other, &root, Kinds::of(&root, Some(&pb::TaskKobjIdsEntry { mnt_ns_id: Some(3), ..host })))
            .unwrap();
        let said = check(&other, &root, Kinds::of(&root, Some(&root))).unwrap_err().to_string();
        assert!(said.contains("a mount namespace other than"), "{said}");
    }

    #[test]
    fn the_number_is_that_of_the_file() {
        let me = ProcDir::open(RealPid(std::process::id().cast_signed())).unwrap();
        for kind in ["pid", "net"] {
            let stat = nix::sys::stat::stat(format!("/proc/self/ns/{kind}").as_str()).unwrap();
            assert_eq!(inode(&me, kind).unwrap(), stat.st_ino);
        }
    }
}
