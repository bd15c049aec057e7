//! Namespaces: which of them a tree has for itself, one kind per file.

pub mod enter;
pub mod time;

use rcriu_images::pb;

use crate::error::{Error, Result};

/// Refuses a task that is to live in namespaces of its own, of a kind that is not made here. `host` are those
/// of the process that made the dump: equal numbers mean that the task had the same ones.
pub fn check(ids: &pb::TaskKobjIdsEntry, host: Option<&pb::TaskKobjIdsEntry>) -> Result<()> {
    let Some(host) = host else { return Ok(()) };
    let kinds = [
        ("pid", ids.pid_ns_id, host.pid_ns_id),
        ("network", ids.net_ns_id, host.net_ns_id),
        ("IPC", ids.ipc_ns_id, host.ipc_ns_id),
        ("UTS", ids.uts_ns_id, host.uts_ns_id),
        ("mount", ids.mnt_ns_id, host.mnt_ns_id),
        ("user", ids.user_ns_id, host.user_ns_id),
        ("cgroup", ids.cgroup_ns_id, host.cgroup_ns_id),
    ];
    // Images of a kernel without the kind have no number.
    match kinds.iter().find(|(_, own, host)| own.is_some() && host.is_some() && own != host) {
        Some((kind, ..)) => {
            Err(Error::unsupported(format!("a {kind} namespace of its own cannot be restored"))
                .remedy("restore these images with CRIU"))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_of_its_own_are_refused_by_name() {
        let host = pb::TaskKobjIdsEntry { net_ns_id: Some(2), time_ns_id: Some(3), ..Default::default() };
        let own = pb::TaskKobjIdsEntry { net_ns_id: Some(9), ..host };
        check(&host, Some(&host)).unwrap();
        check(&own, None).unwrap();
        check(&pb::TaskKobjIdsEntry { time_ns_id: Some(9), ipc_ns_id: Some(1), ..host }, Some(&host))
            .unwrap();
        let said = check(&own, Some(&host)).unwrap_err().to_string();
        assert!(said.contains("a network namespace of its own"), "{said}");
    }
}
