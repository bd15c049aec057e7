//! Which label each thread gets, and whether this host can give it.

use std::collections::BTreeSet;

use rcriu_images::pb;
use restorer::args::module;

use super::{APPARMOR, Host, Module, UNCONFINED, label, policy::Policies};
use crate::{
    error::{Error, Result},
    options::{LsmKind, LsmProfile},
    restore::read::Snapshot,
};

/// What the restorer writes for a thread, as the module takes it; empty for nothing.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Written {
    /// One of [`module`].
    pub module: u32,
    /// To `attr/current`.
    pub profile: Vec<u8>,
    /// To `attr/sockcreate`.
    pub sockcreate: Vec<u8>,
}

impl Written {
    fn is_empty(&self) -> bool {
        self.profile.is_empty() && self.sockcreate.is_empty()
    }
}

/// What decides about labels.
#[derive(Debug)]
pub struct Labels {
    host: Host,
    /// Of the engine, which tasks have before they get theirs.
    own: Option<String>,
    /// What the tree was dumped under.
    images: Option<Module>,
    given: Option<LsmProfile>,
}

impl Labels {
    /// Of `--lsm-profile` and the images on this host.
    pub fn new(inventory: &pb::InventoryEntry, given: Option<&LsmProfile>) -> Labels {
        Labels::on(Host::look(), inventory, given)
    }

    fn on(host: Host, inventory: &pb::InventoryEntry, given: Option<&LsmProfile>) -> Labels {
        let own = host.own_label();
        Labels { own, images: Module::from_image(inventory.lsmtype), given: given.cloned(), host }
    }

    /// The host's module.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// What `--lsm-profile` says.
    pub fn given(&self) -> Option<&LsmProfile> {
        self.given.as_ref()
    }

    /// What is written for a thread with `entry`.
    ///
    /// # Errors
    /// A label for a module that this host does not have.
    pub fn of(&self, entry: &pb::CredsEntry) -> Result<Written> {
        let old = entry.lsm_profile.as_deref().map(str::trim_end).filter(|p| !matches!(*p, "" | UNCONFINED));
        let (module, profile) = match &self.given {
            Some(given) => (self.module_of(given)?, self.given_name(given, old)),
            None => (self.module_of_images(old.or(entry.lsm_sockcreate.as_deref()))?, old.map(str::to_owned)),
        };
        let profile = profile.filter(|profile| self.own.as_deref().unwrap_or(UNCONFINED) != profile);
        Ok(match module {
            None => Written::default(),
            Some(Module::AppArmor) => Written {
                module: module::APPARMOR,
                profile: profile.map(|name| format!("changeprofile {name}").into()).unwrap_or_default(),
                sockcreate: Vec::new(),
            },
            Some(Module::SeLinux) => {
                let sockcreate = entry.lsm_sockcreate.as_deref().filter(|label| !label.is_empty());
                let sockcreate = sockcreate.map(|old| self.given.as_ref().map_or(old, |given| &given.name));
                Written {
                    module: module::SELINUX,
                    profile: profile.unwrap_or_default().into(),
                    sockcreate: sockcreate.unwrap_or_default().into(),
                }
            }
        })
    }

    /// What `--lsm-profile` makes of a label; none leaves the engine's own.
    fn given_name(&self, given: &LsmProfile, old: Option<&str>) -> Option<String> {
        match given.kind {
            LsmKind::None => None,
            LsmKind::SeLinux => Some(given.name.clone()),
            LsmKind::AppArmor => {
                let old = old.filter(|_| self.images.is_none_or(|images| images == Module::AppArmor));
                Some(label::replace(old, &given.name))
            }
        }
    }

    /// # Errors
    /// The host lacks it.
    fn module_of(&self, given: &LsmProfile) -> Result<Option<Module>> {
        // Which is also what a kernel without AppArmor gives.
        if given.is_unconfined() && self.host.module != Some(Module::AppArmor) {
            return Ok(None);
        }
        match Module::of(given.kind) {
            Some(module) if self.host.module != Some(module) => {
                Err(Error::host(format!("--lsm-profile {given}: {}", self.lacks(module)))
                    .remedy(self.instead()))
            }
            module => Ok(module),
        }
    }

    fn module_of_images(&self, label: Option<&str>) -> Result<Option<Module>> {
        let Some(label) = label else { return Ok(self.host.module) };
        match self.images {
            Some(module) if self.host.module != Some(module) => {
                let what = format!("it had the {} {label:?}, and {}", module.labels(), self.lacks(module));
                Err(Error::host(what).remedy(self.instead()))
            }
            None if self.host.module.is_none() => {
                let what = format!(
                    "it had the security label {label:?}, and this host has neither AppArmor nor SELinux"
                );
                Err(Error::host(what).remedy(self.instead()))
            }
            _ => Ok(self.host.module),
        }
    }

    fn lacks(&self, module: Module) -> String {
        match self.host.module {
            Some(other) => format!("this host has {} instead of {}", other.name(), module.name()),
            None => format!("this host has no {}", module.name()),
        }
    }

    fn instead(&self) -> &'static str {
        match self.host.module {
            Some(Module::AppArmor) => "give --lsm-profile apparmor:NAME, or unconfined",
            Some(Module::SeLinux) => "give --lsm-profile selinux:LABEL",
            None => "give --lsm-profile unconfined",
        }
    }

    /// Whether the restorer has anything to write.
    pub fn any(&self, snapshot: &Snapshot) -> bool {
        entries(snapshot).any(|(_, entry)| self.of(entry).is_ok_and(|written| !written.is_empty()))
    }

    /// Labels that a dump found in the tree.
    pub fn dumped(snapshot: &Snapshot) -> BTreeSet<&str> {
        entries(snapshot).filter_map(|(_, entry)| entry.lsm_profile.as_deref()).collect()
    }

    /// What is known to fail already.
    ///
    /// # Errors
    /// A module, a profile or a label that is not there, with the task that needs it.
    pub fn check(&self, snapshot: &Snapshot, policies: &Policies) -> Result<()> {
        let mut seen = BTreeSet::new();
        let mut alone = false;
        for (name, entry) in entries(snapshot) {
            let written = self.of(entry).map_err(|e| e.during(name.clone()))?;
            alone |= entry.lsm_profile.is_none();
            if seen.insert((written.profile.clone(), written.sockcreate.clone())) {
                for text in [&written.profile, &written.sockcreate].into_iter().filter(|t| !t.is_empty()) {
                    self.check_one(&String::from_utf8_lossy(text), policies)
                        .map_err(|e| e.during(name.clone()))?;
                }
            }
        }
        if alone
            && self.given.is_none()
            && self.host.module == Some(Module::AppArmor)
            && let Some(own) = &self.own
        {
            log::warn!(
                "Tasks that AppArmor did not confine will have the profile {own:?}, which this command has"
            );
        }
        Ok(())
    }

    fn check_one(&self, written: &str, policies: &Policies) -> Result<()> {
        match self.host.module {
            Some(Module::AppArmor) => {
                self.check_profile(written.strip_prefix("changeprofile ").unwrap_or(written), policies)
            }
            Some(Module::SeLinux) => self.check_context(written),
            None => Ok(()),
        }
    }

    /// Whether the kernel knows all profiles of a label; where that cannot be told it will say so later.
    fn check_profile(&self, profile: &str, policies: &Policies) -> Result<()> {
        let loaded = std::fs::read_to_string(self.host.path(APPARMOR).join("profiles"));
        for part in label::parts(profile) {
            let missing = match (&part.namespace, part.outermost()) {
                (None, _) => match &loaded {
                    Ok(loaded) => {
                        !loaded.lines().any(|line| label::profile(line).as_deref() == Some(&*part.name))
                    }
                    Err(_) => false,
                },
                (Some(_), Some(name)) => !policies.has(name) && !policies.exists(&self.host, name),
                (Some(_), None) => false,
            };
            if !missing || part.namespace.is_none() && part.name == UNCONFINED {
                continue;
            }
            return Err(match part.outermost() {
                None => Error::host(format!("the AppArmor profile {:?} is not loaded here", part.name))
                    .remedy("load it with apparmor_parser -r FILE, or give another one as --lsm-profile apparmor:NAME"),
                Some(name) => Error::host(format!("there is no AppArmor namespace {name:?} here, and the images hold none"))
                    .remedy("make it in /sys/kernel/security/apparmor/policy/namespaces, or give --lsm-profile apparmor:NAME"),
            });
        }
        Ok(())
    }

    /// Asks the kernel whether its policy knows the context.
    fn check_context(&self, context: &str) -> Result<()> {
        let asked = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(self.host.path("sys/fs/selinux/context"))
            .and_then(|mut file| std::io::Write::write_all(&mut file, context.as_bytes()));
        match asked {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                Err(Error::host(format!("the SELinux label {context:?} is none of this host's policy"))
                    .remedy("give one that is as --lsm-profile selinux:LABEL"))
            }
            // It may be hidden, or not ours to ask.
            _ => Ok(()),
        }
    }
}

/// Credentials of all threads, with the task they are of.
fn entries(snapshot: &Snapshot) -> impl Iterator<Item = (String, &pb::CredsEntry)> {
    snapshot.alive().flat_map(|(_, task)| {
        let cores = (0..task.threads.len()).filter_map(|at| task.thread_core(at)?.thread_core.as_ref());
        cores.filter_map(|core| Some((task.name(), core.creds.as_ref()?)))
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::root;
    use super::*;

    type Files<'a> = &'a [(&'a str, &'a [u8])];
    const APPARMOR_HOST: Files<'_> = &[
        ("sys/kernel/security/apparmor/profiles", b"box (enforce)\nbox//hat (complain)\n"),
        ("sys/kernel/security/apparmor/policy/namespaces/there/x", b""),
        ("proc/thread-self/attr/current", b"unconfined\n"),
    ];
    const SELINUX_HOST: Files<'_> =
        &[("sys/fs/selinux/enforce", b"1"), ("proc/thread-self/attr/current", b"u:r:engine_t:s0\0")];

    fn labels(files: Files<'_>, images: Option<Module>, given: Option<&str>) -> (tempfile::TempDir, Labels) {
        let (dir, host) = root(files);
        let inventory = pb::InventoryEntry { lsmtype: Some(Module::to_image(images)), ..Default::default() };
        let given = given.map(|text| LsmProfile::parse(text).unwrap());
        let labels = Labels::on(host, &inventory, given.as_ref());
        (dir, labels)
    }

    fn entry(profile: Option<&str>, sockcreate: Option<&str>) -> pb::CredsEntry {
        let text = |label: Option<&str>| label.map(str::to_owned);
        pb::CredsEntry {
            lsm_profile: text(profile),
            lsm_sockcreate: text(sockcreate),
            ..pb::CredsEntry::default()
        }
    }

    fn written(files: Files<'_>, images: Option<Module>, given: Option<&str>, old: Option<&str>) -> String {
        let (_dir, labels) = labels(files, images, given);
        match labels.of(&entry(old, None)) {
            Ok(written) => String::from_utf8(written.profile).unwrap(),
            Err(e) => e.to_string(),
        }
    }

    #[test]
    fn a_profile_comes_back_or_the_one_that_is_given_instead() {
        let on = |given, old| written(APPARMOR_HOST, Some(Module::AppArmor), given, old);
        assert_eq!(on(None, Some("box")), "changeprofile box");
        assert_eq!(on(None, None), "");
        assert_eq!(on(Some("apparmor:new"), Some("box")), "changeprofile new");
        // Also for tasks that had none.
        assert_eq!(on(Some("apparmor:new"), None), "changeprofile new");
        assert_eq!(on(Some("unconfined"), Some("box")), "");
        assert_eq!(on(Some("none:"), Some("box")), "");
    }

    #[test]
    fn what_the_command_has_itself_is_not_written() {
        let own: Files<'_> = &[
            ("sys/kernel/security/apparmor/profiles", b""),
            ("proc/thread-self/attr/apparmor/current", b"box (enforce)\n"),
        ];
        let on = |given, old| written(own, Some(Module::AppArmor), given, old);
        assert_eq!(on(None, Some("box")), "");
        assert_eq!(on(None, Some("other")), "changeprofile other");
        assert_eq!(on(Some("apparmor:unconfined"), Some("box")), "changeprofile unconfined");
    }

    #[test]
    fn contexts_come_back_and_those_of_new_sockets_follow() {
        let (_dir, on) = labels(SELINUX_HOST, Some(Module::SeLinux), None);
        let got = on.of(&entry(Some("u:r:box_t:s0"), Some("u:r:sock_t:s0"))).unwrap();
        assert_eq!((got.module, &*got.profile), (module::SELINUX, b"u:r:box_t:s0" as &[u8]));
        assert_eq!(got.sockcreate, b"u:r:sock_t:s0");
        assert!(on.of(&entry(Some("u:r:engine_t:s0"), None)).unwrap().is_empty());
        let (_dir, on) = labels(SELINUX_HOST, Some(Module::SeLinux), Some("selinux:u:r:new_t:s0:c1"));
        let got = on.of(&entry(Some("u:r:box_t:s0"), Some("u:r:sock_t:s0"))).unwrap();
        assert_eq!(
            (&*got.profile, &*got.sockcreate),
            (b"u:r:new_t:s0:c1" as &[u8], b"u:r:new_t:s0:c1" as &[u8])
        );
        assert_eq!(on.of(&entry(Some("u:r:box_t:s0"), None)).unwrap().sockcreate, b"");
    }

    #[test]
    fn a_module_that_is_not_there_is_named_with_what_to_give() {
        let none: Files<'_> = &[];
        let text = written(none, Some(Module::AppArmor), None, Some("box"));
        assert!(text.contains("AppArmor profile \"box\", and this host has no AppArmor"), "{text}");
        assert!(text.contains("--lsm-profile unconfined"), "{text}");
        assert_eq!(written(none, Some(Module::AppArmor), Some("apparmor:unconfined"), Some("box")), "");
        let text = written(SELINUX_HOST, Some(Module::AppArmor), None, Some("box"));
        assert!(text.contains("SELinux instead of AppArmor") && text.contains("selinux:LABEL"), "{text}");
        assert_eq!(
            written(SELINUX_HOST, Some(Module::AppArmor), Some("selinux:a:b:c:s0"), Some("box")),
            "a:b:c:s0"
        );
        let text = written(none, None, Some("apparmor:new"), None);
        assert!(text.contains("--lsm-profile apparmor:new: this host has no AppArmor"), "{text}");
        assert!(written(none, None, None, Some("box")).contains("neither"));
        assert_eq!(written(none, Some(Module::SeLinux), None, None), "");
        // A context of SELinux says nothing about profiles.
        assert_eq!(
            written(APPARMOR_HOST, Some(Module::SeLinux), Some("apparmor::there:"), Some("a:b:c:s0")),
            "changeprofile :there:"
        );
    }

    #[test]
    fn profiles_and_namespaces_that_are_not_there_are_named() {
        let (_dir, on) = labels(APPARMOR_HOST, None, None);
        let none = Policies::default();
        on.check_profile("box//&box//hat//&:there:x", &none).unwrap();
        on.check_profile("unconfined", &none).unwrap();
        let text = on.check_profile("bix", &none).unwrap_err().to_string();
        assert!(text.contains("profile \"bix\" is not loaded here (load it with apparmor_parser"), "{text}");
        let text = on.check_profile("box//&:ns:x", &none).unwrap_err().to_string();
        assert!(text.contains("no AppArmor namespace \"ns\""), "{text}");
    }
}
