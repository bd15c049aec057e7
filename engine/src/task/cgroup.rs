//! Control groups: which set of groups each thread is in.
//!
//! A set is one group per hierarchy. Sets are numbered from 1, which is the dumping process's own; threads
//! name their set by number. Nothing is stored while all of them are in that one: they are restored where
//! the restoring process is.

use std::collections::HashMap;

use rcriu_images::{ImageDir, ImageKind, pb};

use crate::{
    error::Result,
    procfs::{
        ProcDir,
        cgroup::{self, Member},
    },
};

/// All sets of the dump.
#[derive(Debug)]
pub struct Sets {
    /// In order of their numbers, from 1.
    sets: Vec<Vec<Member>>,
    known: HashMap<Vec<Member>, u32>,
}

/// Number of the dumping process's own set.
pub const OWN: u32 = 1;

impl Sets {
    /// Starts with the set of this process.
    pub fn new() -> Result<Self> {
        let me = ProcDir::open(crate::pstree::RealPid(std::process::id().cast_signed()))?;
        let mut sets = Sets { sets: Vec::new(), known: HashMap::new() };
        sets.of(&me)?;
        Ok(sets)
    }

    /// Number of the set of the task or thread of `dir`.
    pub fn of(&mut self, dir: &ProcDir) -> Result<u32> {
        Ok(self.number(cgroup::read(dir)?))
    }

    fn number(&mut self, mut members: Vec<Member>) -> u32 {
        members.sort_by(|a, b| (&a.controllers, &a.path).cmp(&(&b.controllers, &b.path)));
        if let Some(n) = self.known.get(&members) {
            return *n;
        }
        let n = self.sets.len() as u32 + 1;
        self.sets.push(members.clone());
        self.known.insert(members, n);
        n
    }

    /// The entry of cgroup.img; `None` while there is only our own set.
    pub fn entry(&self) -> Option<pb::CgroupEntry> {
        let (own, others) = self.sets.split_first()?;
        if others.is_empty() {
            return None;
        }
        let sets = (OWN + 1..)
            .zip(others)
            .map(|(id, members)| pb::CgSetEntry {
                id,
                ctls: members
                    .iter()
                    .map(|m| pb::CgMemberEntry {
                        name: m.controllers.clone().into_bytes(),
                        path: m.path.clone(),
                        cgns_prefix: None,
                    })
                    .collect(),
            })
            .collect();
        let controllers = own
            .iter()
            .map(|m| pb::CgControllerEntry {
                cnames: m.controllers.split(',').map(str::to_owned).collect(),
                dirs: Vec::new(),
                is_threaded: Some(false),
            })
            .collect();
        Some(pb::CgroupEntry { sets, controllers })
    }

    /// Writes cgroup.img if it is needed.
    pub fn write(&self, images: &ImageDir) -> Result<()> {
        if let Some(entry) = self.entry() {
            let mut out = images.writer(ImageKind::Cgroup, 0);
            out.write(&entry)?;
            out.finish()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(controllers: &str, path: &str) -> Member {
        Member { hierarchy: 1, controllers: controllers.into(), path: path.into() }
    }

    #[test]
    fn equal_sets_share_a_number_whatever_their_order() {
        let mut sets = Sets { sets: Vec::new(), known: HashMap::new() };
        assert_eq!(sets.number(vec![member("cpu", "/"), member("", "/")]), OWN);
        assert_eq!(sets.entry(), None);
        assert_eq!(sets.number(vec![member("", "/"), member("cpu", "/")]), OWN);
        assert_eq!(sets.number(vec![member("", "/a"), member("cpu,cpuacct", "/")]), 2);
        let entry = sets.entry().unwrap();
        assert_eq!((entry.sets.len(), entry.sets[0].id), (1, 2));
        assert_eq!(entry.sets[0].ctls[0].path, b"/a");
        assert_eq!(entry.controllers.len(), 2);
    }
}
