//! Labels of the threads of a tree.

use std::collections::BTreeMap;

use rcriu_images::pb;

use super::{Host, Module, attribute, is_context, label};
use crate::{
    error::{Context, Error, Result},
    procfs::ProcDir,
    pstree::RealPid,
};

/// The labels of one thread.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Seen {
    profile: Option<String>,
    sockcreate: Option<String>,
}

impl Seen {
    /// Puts them where images have them.
    pub fn into_entry(self, entry: &mut pb::CredsEntry) {
        entry.lsm_profile = self.profile;
        entry.lsm_sockcreate = self.sockcreate;
    }
}

/// What a dump knows of labels.
#[derive(Debug)]
pub struct LabelsOut {
    host: Host,
    /// Namespaces of AppArmor that threads are in, with the first of them.
    namespaces: BTreeMap<String, RealPid>,
}

impl LabelsOut {
    /// Asks which module there is.
    pub fn ask() -> LabelsOut {
        LabelsOut { host: Host::look(), namespaces: BTreeMap::new() }
    }

    /// The host's module.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Namespaces that were met.
    pub fn namespaces(&self) -> impl Iterator<Item = (&str, RealPid)> {
        self.namespaces.iter().map(|(name, tid)| (name.as_str(), *tid))
    }

    /// The labels of threads of one task, the leader first.
    ///
    /// # Errors
    /// Threads with different SELinux labels: a restore can give a process but one.
    pub fn of(&mut self, threads: impl IntoIterator<Item = RealPid>) -> Result<Vec<Seen>> {
        let mut all: Vec<Seen> = Vec::new();
        for tid in threads {
            if self.host.module.is_none() {
                all.push(Seen::default());
                continue;
            }
            let seen =
                ProcDir::open(tid).and_then(|dir| self.one(&dir)).during(|| format!("thread {tid}"))?;
            if self.host.module == Some(Module::SeLinux)
                && let Some(first) = all.first().filter(|first| first.profile != seen.profile)
            {
                return Err(Error::unsupported(format!(
                    "thread {tid} has the SELinux label {:?}, the first of its process {:?}: no restore can give threads different ones",
                    seen.profile.unwrap_or_default(),
                    first.profile.as_deref().unwrap_or_default()
                ))
                .remedy("run what needs another label as a process of its own"));
            }
            all.push(seen);
        }
        Ok(all)
    }

    fn one(&mut self, thread: &ProcDir) -> Result<Seen> {
        match self.host.module {
            None => Ok(Seen::default()),
            Some(Module::AppArmor) => {
                let told = match attribute(thread, "apparmor/current") {
                    Err(e) if e.errno() == Some(libc::ENOENT) => attribute(thread, "current"),
                    other => other,
                }?;
                let profile = label::profile(&told);
                for part in profile.iter().flat_map(|profile| label::parts(profile)) {
                    if let Some(namespace) = part.outermost() {
                        self.namespaces.entry(namespace.to_owned()).or_insert(thread.pid());
                    }
                }
                Ok(Seen { profile, sockcreate: None })
            }
            Some(Module::SeLinux) => {
                let context = attribute(thread, "current")?;
                if !is_context(&context) {
                    return Err(Error::unsupported(format!("its SELinux label {context:?} is none"))
                        .remedy("load an SELinux policy, or boot with selinux=0"));
                }
                let sockcreate = attribute(thread, "sockcreate")?;
                Ok(Seen {
                    profile: Some(context),
                    sockcreate: Some(sockcreate).filter(|label| !label.is_empty()),
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_go_where_images_have_them() {
        let mut entry = pb::CredsEntry::default();
        Seen { profile: Some("a".into()), sockcreate: Some("b".into()) }.into_entry(&mut entry);
        assert_eq!((entry.lsm_profile.as_deref(), entry.lsm_sockcreate.as_deref()), (Some("a"), Some("b")));
    }

    #[test]
    fn own_threads_are_asked() {
        let mut out = LabelsOut::ask();
        let me = RealPid(std::process::id().cast_signed());
        let seen = out.of([me, me]).unwrap();
        assert_eq!(seen.len(), 2);
        assert_eq!(seen[0].profile, out.host.own_label());
    }
}
