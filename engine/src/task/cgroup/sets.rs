//! Which set of groups each thread is in, and the image of all groups.
//!
//! A set is one group per hierarchy. Sets are numbered from 1, which is the dumping process's own; threads
//! name their set by number. Nothing is stored while all of them are in that one: they are restored where
//! the restoring process is.

use std::{
    collections::{BTreeSet, HashMap},
    path::{Path, PathBuf},
};

use rcriu_images::{ImageDir, ImageKind, pb};

use super::{
    folders::{FreezerState, Reader},
    properties::Known,
    yard,
};
use crate::{
    error::{Context, Result, SysContext},
    ns,
    options::{CgroupOptions, ManageCgroups},
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
    /// By the content of the file.
    by_content: HashMap<Vec<u8>, u32>,
    /// Only hierarchies with these controllers; all when empty.
    only: Vec<String>,
    properties: Known,
    freezer: Option<FreezerState>,
    /// What the tree's own cgroup namespace hides of paths, by controllers.
    hidden: HashMap<String, Vec<u8>>,
}

/// Number of the dumping process's own set.
pub const OWN: u32 = 1;

impl Sets {
    /// Starts with the set of this process.
    ///
    /// # Errors
    /// Lists of properties that are not understood.
    pub fn new(opts: &CgroupOptions) -> Result<Self> {
        let me = ProcDir::own()?;
        let mut sets = Sets {
            sets: Vec::new(),
            known: HashMap::new(),
            by_content: HashMap::new(),
            only: opts.dump_controllers.clone(),
            properties: Known::new(opts)?,
            freezer: None,
            hidden: HashMap::new(),
        };
        sets.of(&me)?;
        Ok(sets)
    }

    /// The group that was frozen for the dump, and whether it was found frozen: what its image says.
    pub fn set_freezer(&mut self, folder: &Path, frozen: bool) -> Result<()> {
        let stat = nix::sys::stat::stat(folder).call(format!("stat({})", folder.display()))?;
        self.freezer = Some(FreezerState { dev: stat.st_dev, ino: stat.st_ino, frozen });
        Ok(())
    }

    /// Takes note of the cgroup namespace that the tree has for itself; `root` is its root task.
    ///
    /// # Errors
    /// A root task that has left the groups of its namespace.
    pub fn set_namespace(&mut self, root: &ProcDir) -> Result<()> {
        let outside = cgroup::read(root)?;
        let prefixes = ns::cgroup::prefixes(&outside, &ns::cgroup::seen_inside(root.pid())?)?;
        let hidden = outside.into_iter().zip(prefixes).filter(|(_, hidden)| *hidden > 0);
        self.hidden = hidden.map(|(m, hidden)| (m.controllers, m.path[..hidden].to_vec())).collect();
        Ok(())
    }

    /// Where the tree's own cgroup namespace begins in the hierarchy of these controllers.
    pub fn beginning(&self, controllers: &str) -> Option<&[u8]> {
        self.hidden.get(controllers).map(Vec::as_slice)
    }

    /// Number of the set of the task or thread of `dir`.
    pub fn of(&mut self, dir: &ProcDir) -> Result<u32> {
        Ok(self.number(cgroup::read(dir)?))
    }

    /// Number of the set that a thread's file tells of, which may be that of thousands of threads.
    pub fn of_content(&mut self, dir: &ProcDir, content: &[u8]) -> Result<u32> {
        if let Some(n) = self.by_content.get(content) {
            return Ok(*n);
        }
        let members = cgroup::parse(content).ok_or_else(|| dir.strange("cgroup", content))?;
        let n = self.number(members);
        self.by_content.insert(content.to_vec(), n);
        Ok(n)
    }

    fn number(&mut self, mut members: Vec<Member>) -> u32 {
        members.retain(|m| self.only.is_empty() || self.only.contains(&m.controllers));
        members.sort_by(|a, b| (&a.controllers, &a.path).cmp(&(&b.controllers, &b.path)));
        if let Some(n) = self.known.get(&members) {
            return *n;
        }
        let n = self.sets.len() as u32 + 1;
        self.sets.push(members.clone());
        self.known.insert(members, n);
        n
    }

    /// The entry of cgroup.img without folders; `None` while there is only our own set.
    fn entry(&self) -> Option<pb::CgroupEntry> {
        let (own, others) = self.sets.split_first()?;
        if others.is_empty() {
            return None;
        }
        let member = |m: &Member| pb::CgMemberEntry {
            name: m.controllers.clone().into_bytes(),
            path: m.path.clone(),
            cgns_prefix: self.hidden_of(m),
        };
        let sets = (OWN + 1..)
            .zip(others)
            .map(|(id, members)| pb::CgSetEntry { id, ctls: members.iter().map(member).collect() })
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

    /// Bytes of a path that the tree's namespace hides, as images have it.
    fn hidden_of(&self, member: &Member) -> Option<u32> {
        let hidden = self.hidden.get(&member.controllers)?;
        let rest = member.path.strip_prefix(hidden.as_slice())?;
        (rest.is_empty() || rest.first() == Some(&b'/')).then_some(hidden.len() as u32)
    }

    /// Paths of the topmost groups of one hierarchy that the sets use. All below the beginning of a cgroup namespace
    /// of the tree's own are the tree's, also those nobody is in.
    fn tops(&self, controllers: &str) -> Vec<&[u8]> {
        let used: BTreeSet<&[u8]> = self.sets[1..]
            .iter()
            .flatten()
            .filter(|m| m.controllers == controllers)
            .map(|m| match self.hidden_of(m) {
                Some(hidden) => m.path.get(..hidden as usize).unwrap_or(&m.path),
                None => m.path.as_slice(),
            })
            .collect();
        let below = |path: &[u8], top: &[u8]| {
            top != b"/" && path.strip_prefix(top).is_some_and(|rest| rest.first() == Some(&b'/'))
        };
        used.iter().copied().filter(|p| !used.iter().any(|top| below(p, top))).collect()
    }

    /// Writes cgroup.img if it is needed.
    ///
    /// # Errors
    /// A hierarchy that cannot be opened, a property that cannot be kept.
    pub fn write(&self, images: &ImageDir, opts: &CgroupOptions) -> Result<()> {
        let Some(mut entry) = self.entry() else { return Ok(()) };
        if opts.manage != ManageCgroups::Ignore {
            for controller in &mut entry.controllers {
                let name = controller.cnames.join(",");
                let root = new_root(opts, &name);
                let tops = match &root {
                    Some(path) => vec![std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str())],
                    None => self.tops(&name),
                };
                let mut reader = Reader {
                    root: yard::hierarchy(&name, opts.yard.as_deref())?,
                    controllers: &name,
                    known: &self.properties,
                    freezer: self.freezer,
                    threaded: false,
                };
                for top in tops {
                    let folder = reader.read(top).during(|| format!("cgroup controllers '{name}'"))?;
                    controller.dirs.push(folder);
                }
                controller.is_threaded = Some(reader.threaded);
            }
        }
        let mut out = images.writer(ImageKind::Cgroup, 0);
        out.write(&entry)?;
        out.finish()?;
        Ok(())
    }
}

/// `--cgroup-root` for the hierarchy of these controllers: its own if there is one, else the common one.
pub fn new_root(opts: &CgroupOptions, controllers: &str) -> Option<PathBuf> {
    let last = |wanted: Option<&str>| {
        opts.roots.iter().rev().find(|r| r.controllers.as_deref() == wanted).map(|r| r.path.clone())
    };
    last(Some(controllers)).or_else(|| last(None))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(controllers: &str, path: &str) -> Member {
        Member { hierarchy: 1, controllers: controllers.into(), path: path.into() }
    }

    fn sets() -> Sets {
        Sets {
            sets: Vec::new(),
            known: HashMap::new(),
            by_content: HashMap::new(),
            only: Vec::new(),
            properties: Known::new(&CgroupOptions::default()).unwrap(),
            freezer: None,
            hidden: HashMap::new(),
        }
    }

    #[test]
    fn only_topmost_groups_are_walked() {
        let mut sets = sets();
        for path in ["/own", "/a/b", "/a", "/ab", "/", "/a/c"] {
            sets.number(vec![member("cpu", path)]);
        }
        assert_eq!(sets.tops("cpu"), [&b"/"[..], b"/a", b"/ab"]);
        assert!(sets.tops("memory").is_empty());
    }

    #[test]
    fn all_below_the_beginning_of_a_namespace_is_walked() {
        let mut sets = sets();
        sets.hidden.insert("cpu".into(), b"/box".to_vec());
        for path in ["/own", "/box/init.scope", "/box/a/b", "/boxes"] {
            sets.number(vec![member("cpu", path), member("pids", path)]);
        }
        assert_eq!(sets.tops("cpu"), [&b"/box"[..], b"/boxes"]);
        assert_eq!(sets.tops("pids"), [&b"/box/a/b"[..], b"/box/init.scope", b"/boxes"]);
    }

    #[test]
    fn hierarchies_not_asked_for_do_not_count() {
        let mut sets = sets();
        sets.only = vec!["cpu".into()];
        assert_eq!(sets.number(vec![member("cpu", "/"), member("memory", "/x")]), OWN);
        assert_eq!(sets.number(vec![member("cpu", "/"), member("memory", "/y")]), OWN);
    }

    #[test]
    fn a_root_of_its_own_beats_the_common_one() {
        use crate::options::CgroupRoot;
        let root = |c: Option<&str>, p: &str| CgroupRoot { controllers: c.map(Into::into), path: p.into() };
        let opts = CgroupOptions {
            roots: vec![root(None, "/x"), root(Some("cpu"), "/y"), root(None, "/z")],
            ..CgroupOptions::default()
        };
        assert_eq!(new_root(&opts, "cpu"), Some("/y".into()));
        assert_eq!(new_root(&opts, "memory"), Some("/z".into()));
        assert_eq!(new_root(&CgroupOptions::default(), "cpu"), None);
    }

    #[test]
    fn equal_sets_share_a_number_whatever_their_order() {
        let mut sets = sets();
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
