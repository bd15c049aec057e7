//! NUMA memory policies: on which nodes memory is taken, for a thread (set_mempolicy(2)) and for a range of
//! addresses (mbind(2)).
//!
//! The home node of a range (set_mempolicy_home_node(2)) is set only; no interface tells it.

use rcriu_images::pb;

use crate::{
    error::Result,
    procfs::{ProcDir, status::Status},
    sys::attributes,
};

/// `MPOL_DEFAULT`: no policy of its own.
pub const DEFAULT: u32 = 0;
/// `MPOL_PREFERRED` and `MPOL_LOCAL`, the modes that may have no nodes.
const WITHOUT_NODES: [u32; 2] = [1, 4];
/// `MPOL_F_STATIC_NODES`, `MPOL_F_RELATIVE_NODES`, `MPOL_F_NUMA_BALANCING`.
const MODE_FLAGS: u32 = 0xe000;
/// `MPOL_F_RELATIVE_NODES`: numbers count among the nodes that are allowed.
const RELATIVE: u32 = 0x4000;

/// A policy as get_mempolicy(2) tells it; `None` for the default one, and without NUMA.
pub fn dump(mode: i64, nodes: &[u64]) -> Option<pb::RcriuPolicyEntry> {
    let mode = u32::try_from(mode).ok().filter(|mode| *mode != DEFAULT)?;
    let mut bytes: Vec<u8> = nodes.iter().flat_map(|word| word.to_le_bytes()).collect();
    while bytes.last() == Some(&0) {
        bytes.pop();
    }
    Some(pb::RcriuPolicyEntry { mode, nodes: (!bytes.is_empty()).then_some(bytes) })
}

/// Which nodes policies can name here.
#[derive(Debug)]
pub struct Nodes(Vec<u8>);

impl Nodes {
    /// Those this process may use.
    pub fn own() -> Result<Nodes> {
        let me = ProcDir::own()?;
        Ok(Nodes(Status::read(&me)?.nodes))
    }

    /// Mode and nodes to ask for, nodes that are not here left out; `None` if none of them is, which a warning
    /// tells: memory then comes from where there is some.
    pub fn fit<'a>(&self, what: &str, policy: &'a pb::RcriuPolicyEntry) -> Option<(u32, &'a [u8])> {
        let wanted = policy.nodes();
        let here = wanted.iter().zip(&self.0).any(|(a, b)| a & b != 0);
        let all = wanted.iter().enumerate().all(|(i, byte)| byte & !self.0.get(i).copied().unwrap_or(0) == 0);
        let bare = wanted.is_empty() && WITHOUT_NODES.contains(&(policy.mode & !MODE_FLAGS));
        if here || bare || policy.mode & RELATIVE != 0 {
            if !all && policy.mode & RELATIVE == 0 {
                log::warn!("Not all NUMA nodes of the memory policy of {what} are here");
            }
            return Some((policy.mode, wanted));
        }
        log::warn!("None of the NUMA nodes of the memory policy of {what} is here: the policy is lost");
        None
    }
}

/// Gives the calling process, which will be the leader, its policy before it takes memory.
pub fn enter(what: &str, wanted: Option<&pb::RcriuPolicyEntry>, nodes: &Nodes) -> Result<()> {
    match wanted.and_then(|policy| nodes.fit(what, policy)) {
        Some((mode, nodes)) => attributes::set_memory_policy(mode, nodes),
        // Its parent may have had one.
        None => match attributes::set_memory_policy(DEFAULT, &[]) {
            Err(e) if e.errno() == Some(libc::ENOSYS) => Ok(()),
            other => other,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_not_kept() {
        assert_eq!(dump(0, &[0; 16]), None);
        assert_eq!(dump(-38, &[0; 16]), None);
        let kept = dump(0x8002, &[1, 0, 1]).unwrap();
        assert_eq!((kept.mode, kept.nodes().len(), kept.nodes()[16]), (0x8002, 17, 1));
    }

    #[test]
    fn nodes_that_are_not_here_do_no_harm() {
        let policy = |mode, nodes: &[u8]| pb::RcriuPolicyEntry { mode, nodes: Some(nodes.to_vec()) };
        let here = Nodes(vec![3]);
        assert_eq!(here.fit("it", &policy(2, &[1])), Some((2, &[1][..])));
        assert_eq!(here.fit("it", &policy(2, &[5])), Some((2, &[5][..])));
        assert_eq!(here.fit("it", &policy(2, &[4])), None);
        assert_eq!(here.fit("it", &policy(2 | RELATIVE, &[4])), Some((2 | RELATIVE, &[4][..])));
        assert_eq!(here.fit("it", &policy(4, &[])), Some((4, &[][..])));
        assert_eq!(here.fit("it", &policy(2, &[])), None);
    }

    #[test]
    fn a_policy_can_be_set_and_taken_back() {
        let nodes = Nodes::own().unwrap();
        let bind = pb::RcriuPolicyEntry { mode: 2, nodes: Some(nodes.0.clone()) };
        // In a thread of its own: others must not come into it.
        std::thread::spawn(move || {
            enter("it", Some(&bind), &nodes).unwrap();
            enter("it", None, &nodes).unwrap();
        })
        .join()
        .unwrap();
    }
}
