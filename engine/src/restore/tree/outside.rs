//! What lies outside of the tree: the session and group it was started in, and numbers that are taken there.

use std::collections::{BTreeSet, HashSet};

use super::{Build, Node};
use crate::error::{Error, Result};
use crate::pstree::VirtPid;

/// Helpers without a number of their own start here: lower ones belong to a booting system.
const FIRST_FREE: i32 = 301;
/// `pid_max` of a kernel that was told nothing.
const LAST_FREE: i32 = 32768;

/// One of the numbers of a node.
type Field = fn(&mut Node) -> &mut VirtPid;

impl<'a> Build<'a> {
    /// Puts the session and the group that lie outside the tree in the place of those of the dump.
    pub(super) fn adopt_outside(&mut self) -> Result<()> {
        let (root, out) = (&self.nodes[0], self.outside);
        let (pid, pgid, sid) = (root.pid, root.pgid, root.sid);
        // 0: the leader was outside the pid namespace that was dumped.
        let mut sids = vec![VirtPid(0)];
        let mut pgids = vec![(VirtPid(0), out.pgid)];
        if sid != pid {
            if !out.shell_job && sid.0 != 0 {
                return Err(Error::usage(format!(
                    "the root task {pid} is in the session of {sid}, which is not part of the dump"
                ))
                .remedy("give --shell-job to restore it into the session of this shell"));
            }
            sids.push(sid);
            // A group that a task of the tree has made is none of those outside.
            let led_outside = !self.by_pid.contains_key(&pgid);
            pgids.extend(led_outside.then_some((pgid, out.pgid)));
            // Others may be in the group of the shell itself; its session has such a group, too.
            pgids.push((sid, out.sid));
        }
        let sids: Vec<_> = sids.into_iter().map(|sid| (sid, out.sid)).collect();
        self.replace(&pgids, "GID", |n| &mut n.pgid)?;
        self.from_outside = self.replace(&sids, "SID", |n| &mut n.sid)?;
        Ok(())
    }

    /// Gives each node the new number in the place of the old one; of several, the first counts. Gives whether
    /// there was one.
    fn replace(&mut self, numbers: &[(VirtPid, VirtPid)], what: &str, field: Field) -> Result<bool> {
        let mut ours = BTreeSet::new();
        let mut kept = HashSet::new();
        for node in &mut self.nodes {
            let number = field(node);
            match numbers.iter().find(|(old, _)| old == number) {
                Some((old, new)) => {
                    if old != new && ours.insert(*new) {
                        log::info!("Migrating process tree ({what} {old}->{new})");
                    }
                    ours.insert(*new);
                    *number = *new;
                }
                None => _ = kept.insert(*number),
            }
        }
        // Our own session or group must not be mistaken for one of the dump.
        let mut clash = ours
            .iter()
            .filter(|new| self.by_pid.contains_key(new) || self.tids.contains(new) || kept.contains(new));
        match clash.next() {
            Some(new) => Err(Error::host(format!("our own {what} {new} has the number of one in the dump"))
                .remedy("restore from another shell")),
            None => Ok(!ours.is_empty()),
        }
    }

    /// Whether that is the session that the restore runs in, as the one of some task.
    pub(super) fn is_outside(&self, sid: VirtPid) -> bool {
        self.from_outside && sid == self.outside.sid
    }

    /// All numbers that neither the images nor the host use, but for those `used`.
    pub(super) fn free_numbers(&self, mut used: HashSet<VirtPid>) -> impl Iterator<Item = VirtPid> + use<'a> {
        used.extend(self.tids.iter().copied());
        let is_free = self.is_free;
        (FIRST_FREE..LAST_FREE).map(VirtPid).filter(move |p| !used.contains(p) && is_free(*p))
    }
}
