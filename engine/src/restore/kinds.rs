//! Kinds of namespaces.

use nix::sched::CloneFlags;
use rcriu_images::pb;

/// Which kinds.
#[derive(Clone, Copy, Debug)]
pub struct Kinds(pub(super) CloneFlags);

impl Default for Kinds {
    fn default() -> Self {
        Kinds(CloneFlags::empty())
    }
}

impl Kinds {
    /// Those in which a tree whose root has `ids` does not share the namespace of `host`, the process that dumped it.
    /// Images of a kernel without the kind have no number.
    pub fn of(ids: &pb::TaskKobjIdsEntry, host: Option<&pb::TaskKobjIdsEntry>) -> Kinds {
        let Some(host) = host else { return Kinds::default() };
        let kinds = [
            (CloneFlags::CLONE_NEWPID, ids.pid_ns_id, host.pid_ns_id),
            (CloneFlags::CLONE_NEWNET, ids.net_ns_id, host.net_ns_id),
            (CloneFlags::CLONE_NEWIPC, ids.ipc_ns_id, host.ipc_ns_id),
            (CloneFlags::CLONE_NEWUTS, ids.uts_ns_id, host.uts_ns_id),
            (CloneFlags::CLONE_NEWNS, ids.mnt_ns_id, host.mnt_ns_id),
            (CloneFlags::CLONE_NEWUSER, ids.user_ns_id, host.user_ns_id),
            (CloneFlags::CLONE_NEWCGROUP, ids.cgroup_ns_id, host.cgroup_ns_id),
        ];
        let own = kinds.iter().filter(|(_, own, host)| own.is_some() && host.is_some() && own != host);
        Kinds(own.fold(CloneFlags::empty(), |flags, (flag, ..)| flags | *flag))
    }

    /// Whether this is one of them.
    pub fn has(self, flag: CloneFlags) -> bool {
        self.0.contains(flag)
    }

    /// The others.
    pub fn without(self, flags: CloneFlags) -> Kinds {
        Kinds(self.0 & !flags)
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.0.is_empty()
    }
}
