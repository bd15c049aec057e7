//! Numbers of namespaces in images.
//!
//! Every namespace gets a number in order of appearance, this process's own first. A restore compares a
//! task's numbers with those that the inventory gives for the dumping process: equal means that the task is
//! to live in whatever namespace the restoring process is in.

use std::{collections::HashMap, os::unix::ffi::OsStrExt, path::PathBuf};

use rcriu_images::pb;

use crate::{error::Result, ns::home::Apart, procfs::ProcDir};

/// Namespaces met so far.
#[derive(Debug, Default)]
pub struct NsIds {
    /// Link text (`net:[4026531840]`) -> number.
    known: HashMap<Vec<u8>, u32>,
}

impl NsIds {
    /// Fills in the namespaces of the task of `dir`; absent where the kernel has no such kind.
    pub fn fill(&mut self, dir: &ProcDir, ids: &mut pb::TaskKobjIdsEntry) -> Result<()> {
        // The order in which numbers are given out.
        ids.pid_ns_id = self.number(dir, "ns/pid")?;
        ids.net_ns_id = self.number(dir, "ns/net")?;
        ids.ipc_ns_id = self.number(dir, "ns/ipc")?;
        ids.uts_ns_id = self.number(dir, "ns/uts")?;
        ids.time_ns_id = self.number(dir, "ns/time")?;
        ids.mnt_ns_id = self.number(dir, "ns/mnt")?;
        ids.user_ns_id = self.number(dir, "ns/user")?;
        ids.cgroup_ns_id = self.number(dir, "ns/cgroup")?;
        Ok(())
    }

    /// The same for a task that is in all namespaces of `home`, but for those in `apart`.
    pub fn fill_as(&mut self, home: &pb::TaskKobjIdsEntry, apart: &Apart, ids: &mut pb::TaskKobjIdsEntry) {
        let mut number =
            |link: &Option<PathBuf>| Some(self.known(link.as_ref()?.as_os_str().as_bytes().to_vec()));
        ids.pid_ns_id = home.pid_ns_id;
        ids.net_ns_id = number(&apart.net);
        ids.ipc_ns_id = number(&apart.ipc);
        ids.uts_ns_id = number(&apart.uts);
        ids.time_ns_id = number(&apart.time);
        ids.mnt_ns_id = number(&apart.mnt);
        ids.user_ns_id = home.user_ns_id;
        ids.cgroup_ns_id = home.cgroup_ns_id;
    }

    fn known(&mut self, text: Vec<u8>) -> u32 {
        let next = self.known.len() as u32 + 1;
        *self.known.entry(text).or_insert(next)
    }

    fn number(&mut self, dir: &ProcDir, link: &str) -> Result<Option<u32>> {
        let text = match dir.link(link) {
            Ok(path) => path.into_os_string().into_encoded_bytes(),
            Err(e) if e.errno() == Some(libc::ENOENT) => return Ok(None),
            Err(e) => return Err(e),
        };
        Ok(Some(self.known(text)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pstree::RealPid;

    #[test]
    fn numbers_start_at_one_and_stay() {
        let me = ProcDir::open(RealPid(std::process::id() as i32)).unwrap();
        let mut namespaces = NsIds::default();
        let mut first = pb::TaskKobjIdsEntry::default();
        namespaces.fill(&me, &mut first).unwrap();
        assert_eq!((first.pid_ns_id, first.net_ns_id), (Some(1), Some(2)));
        let mut again = pb::TaskKobjIdsEntry::default();
        namespaces.fill(&me, &mut again).unwrap();
        assert_eq!(first, again);
    }
}
