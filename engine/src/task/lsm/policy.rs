//! Namespaces of AppArmor: policy that a container has loaded for itself. All of it is kept, also what no task uses yet,
//! as the blobs that the kernel was given, in the order in which they were loaded.
//!
//! ```text
//! /sys/kernel/security/apparmor/policy/namespaces/NS/profiles/NAME.3/name, raw_data
//!                                                 NS/namespaces/...
//!                                                 NS/.replace                       takes a blob
//! ```

use std::{
    fs,
    path::{Path, PathBuf},
};

use rcriu_images::{ImageDir, ImageKind, pb};

use super::{APPARMOR, Host, LabelsOut, Module, label};
use crate::{
    error::{Context, Error, Result, SysContext},
    options::{LsmKind, LsmProfile},
};

const NAMESPACES: &str = "policy/namespaces";
/// Deepest nesting that is read from images.
const DEEPEST: usize = 16;

/// Writes `apparmor.img` if any task is in a namespace.
///
/// # Errors
/// Policy that the kernel does not give.
pub fn dump(labels: &LabelsOut, images: &ImageDir) -> Result<()> {
    let host = labels.host();
    let mut entry = pb::ApparmorEntry::default();
    for (name, tid) in labels.namespaces() {
        let path = host.path(APPARMOR).join(NAMESPACES).join(name);
        let read =
            namespace(&path, name, 0).during(|| format!("AppArmor namespace {name:?} of thread {tid}"))?;
        entry.namespaces.push(read);
    }
    if entry.namespaces.is_empty() {
        return Ok(());
    }
    let mut out = images.writer(ImageKind::Apparmor, 0);
    out.write(&entry)?;
    Ok(out.finish()?)
}

fn namespace(path: &Path, name: &str, depth: usize) -> Result<pb::AaNamespace> {
    let mut read = pb::AaNamespace { name: name.to_owned(), ..Default::default() };
    for inner in entries(&path.join("namespaces"))? {
        if depth >= DEEPEST {
            return Err(Error::unsupported("namespaces nested this deep"));
        }
        read.namespaces.push(namespace(&path.join("namespaces").join(&inner), &inner, depth + 1)?);
    }
    let mut profiles = Vec::new();
    for folder in entries(&path.join("profiles"))? {
        let folder = path.join("profiles").join(folder);
        let loaded = fs::metadata(&folder).and_then(|meta| meta.modified());
        profiles.push((loaded.call("stat").during(|| folder.display().to_string())?, folder));
    }
    profiles.sort();
    for (_, folder) in profiles {
        let text =
            fs::read_to_string(folder.join("name")).call("read").during(|| folder.display().to_string())?;
        let name = text.trim_end().to_owned();
        let blob = fs::read(folder.join("raw_data")).map_err(|e| unreadable(&name, &e))?;
        read.policies.push(pb::AaPolicy { name, blob });
    }
    Ok(read)
}

fn unreadable(name: &str, e: &std::io::Error) -> Error {
    Error::unsupported(format!("the kernel does not give the policy of profile {name:?}: {e}"))
        .remedy("boot with apparmor.export_binary=Y, or run the tree outside of the namespace")
}

fn entries(folder: &Path) -> Result<Vec<String>> {
    let list = fs::read_dir(folder).map_err(|e| {
        Error::io("open", &e)
            .during(folder.display().to_string())
            .remedy("mount -t securityfs x /sys/kernel/security")
    })?;
    let mut names: Vec<String> =
        list.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    Ok(names)
}

/// Namespaces that a restore makes.
#[derive(Debug, Default)]
pub struct Policies {
    namespaces: Vec<pb::AaNamespace>,
}

impl Policies {
    /// Those of the images, under the names that `--lsm-profile` gives them. Where another module or no profile
    /// at all is asked for there are none.
    ///
    /// # Errors
    /// A damaged image.
    pub fn read<'a>(
        images: &ImageDir,
        given: Option<&LsmProfile>,
        dumped: impl IntoIterator<Item = &'a str>,
    ) -> Result<Policies> {
        let entry: Option<pb::ApparmorEntry> = images.read_opt(ImageKind::Apparmor, 0)?;
        let mut namespaces = entry.unwrap_or_default().namespaces;
        // CRIU lists nested ones once more.
        let nested: Vec<pb::AaNamespace> = namespaces.iter().flat_map(|n| n.namespaces.clone()).collect();
        namespaces.retain(|namespace| !nested.contains(namespace));
        namespaces.iter().try_for_each(|namespace| checked(namespace, 0))?;
        match given {
            None => {}
            Some(LsmProfile { kind: LsmKind::AppArmor, name }) => {
                let names: Vec<_> = dumped.into_iter().flat_map(|old| label::renamed(old, name)).collect();
                for namespace in &mut namespaces {
                    if let Some((_, new)) = names.iter().find(|(old, _)| *old == namespace.name) {
                        namespace.name.clone_from(new);
                    }
                }
                // Nobody goes there if a lone profile is given.
                if label::parts(name).iter().all(|part| part.namespace.is_none())
                    && label::parts(name).len() == 1
                {
                    namespaces.clear();
                }
            }
            Some(_) => namespaces.clear(),
        }
        Ok(Policies { namespaces })
    }

    /// Whether the namespace is among them.
    pub fn has(&self, name: &str) -> bool {
        self.namespaces.iter().any(|namespace| namespace.name == name)
    }

    /// Whether it is on the host already.
    pub fn exists(&self, host: &Host, name: &str) -> bool {
        host.path(APPARMOR).join(NAMESPACES).join(name).exists()
    }

    /// What is known to fail already.
    ///
    /// # Errors
    /// A host that has no such namespaces.
    pub fn check(&self, host: &Host) -> Result<()> {
        let Some(first) = self.namespaces.first() else { return Ok(()) };
        let what = format!("the images hold policy of the AppArmor namespace {:?}", first.name);
        if host.module != Some(Module::AppArmor) {
            return Err(Error::host(format!("{what}, and this host has no AppArmor"))
                .remedy("give --lsm-profile unconfined, or on a host with SELinux selinux:LABEL"));
        }
        if !host.path(APPARMOR).join(NAMESPACES).exists() {
            return Err(Error::host(format!("{what}, and this host shows no namespaces"))
                .remedy("mount -t securityfs x /sys/kernel/security"));
        }
        Ok(())
    }

    /// Makes the namespaces and loads their policy. What was made goes with the guard unless it is kept.
    ///
    /// # Errors
    /// What the kernel does not take.
    pub fn load(&self, host: &Host) -> Result<Loaded> {
        let mut loaded = Loaded::default();
        for namespace in &self.namespaces {
            let parent = host.path(APPARMOR).join("policy");
            loaded
                .namespace(&parent, namespace)
                .during(|| format!("AppArmor namespace {:?}", namespace.name))?;
        }
        Ok(loaded)
    }
}

/// Names become paths.
fn checked(namespace: &pb::AaNamespace, depth: usize) -> Result<()> {
    if depth > DEEPEST
        || namespace.name.is_empty()
        || namespace.name.starts_with('.')
        || namespace.name.contains('/')
    {
        return Err(Error::image(format!("apparmor.img: a namespace called {:?}", namespace.name)));
    }
    namespace.namespaces.iter().try_for_each(|inner| checked(inner, depth + 1))
}

/// Namespaces that were made, the outer ones first.
#[derive(Debug, Default)]
pub struct Loaded {
    made: Vec<PathBuf>,
}

impl Loaded {
    fn namespace(&mut self, parent: &Path, namespace: &pb::AaNamespace) -> Result<()> {
        let path = parent.join("namespaces").join(&namespace.name);
        match fs::create_dir(&path) {
            Ok(()) => self.made.push(path.clone()),
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(Error::io("mkdir", &e).during(path.display().to_string())),
        }
        let there = current(&path);
        let mut last: Option<&[u8]> = None;
        for policy in &namespace.policies {
            // One blob may hold several profiles.
            if last == Some(&policy.blob) || there.contains(policy) {
                continue;
            }
            last = Some(&policy.blob);
            log::info!("Loads the AppArmor profile {:?} in {}", policy.name, path.display());
            let mut file = fs::OpenOptions::new().write(true).open(path.join(".replace"));
            // The kernel takes it in one write only.
            let written = file
                .as_mut()
                .map_err(|e| Error::io("open", e))
                .and_then(|file| nix::unistd::write(&*file, &policy.blob).call("write"));
            if written.during(|| format!("profile {:?}", policy.name))? != policy.blob.len() {
                return Err(Error::host(format!("the kernel took but a part of profile {:?}", policy.name)));
            }
        }
        namespace.namespaces.iter().try_for_each(|inner| self.namespace(&path, inner))
    }

    /// The restore has succeeded.
    pub fn keep(mut self) {
        self.made.clear();
    }
}

/// What is loaded there and is readable.
fn current(path: &Path) -> Vec<pb::AaPolicy> {
    namespace(path, "", 0).map(|there| there.policies).unwrap_or_default()
}

impl Drop for Loaded {
    fn drop(&mut self) {
        for path in self.made.iter().rev() {
            if let Err(e) = fs::remove_dir(path) {
                log::warn!("rmdir({}): {e}", path.display());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::root;
    use super::*;

    const AT: &str = "sys/kernel/security/apparmor/policy/namespaces";

    fn policy(name: &str, blob: &[u8]) -> pb::AaPolicy {
        pb::AaPolicy { name: name.into(), blob: blob.into() }
    }

    fn sample() -> pb::AaNamespace {
        pb::AaNamespace {
            name: "ns".into(),
            policies: vec![policy("a", b"AA"), policy("a//b", b"AA"), policy("c", b"CC")],
            namespaces: vec![pb::AaNamespace {
                name: "in".into(),
                policies: vec![policy("d", b"DD")],
                ..Default::default()
            }],
        }
    }

    #[test]
    fn policy_is_read_with_everything_nested() {
        let file = |rest: &str| format!("{AT}/ns/{rest}");
        let names = [
            "profiles/a.1/name",
            "profiles/a.1/raw_data",
            "namespaces/in/profiles/d.2/name",
            "namespaces/in/profiles/d.2/raw_data",
        ]
        .map(file);
        let (dir, host) =
            root(&[(&names[0], b"a\n"), (&names[1], b"AA"), (&names[2], b"d\n"), (&names[3], b"DD")]);
        fs::create_dir_all(dir.path().join(AT).join("ns/namespaces/in/namespaces")).unwrap();
        let read = namespace(&host.path(APPARMOR).join(NAMESPACES).join("ns"), "ns", 0).unwrap();
        assert_eq!(read.policies, [policy("a", b"AA")]);
        assert_eq!(read.namespaces, sample().namespaces);
        fs::remove_file(dir.path().join(&names[1])).unwrap();
        let e = namespace(&host.path(APPARMOR).join(NAMESPACES).join("ns"), "ns", 0).unwrap_err().to_string();
        assert!(e.contains("the policy of profile \"a\"") && e.contains("export_binary"), "{e}");
    }

    fn images(entry: &pb::ApparmorEntry) -> (tempfile::TempDir, ImageDir) {
        let dir = tempfile::tempdir().unwrap();
        let images = ImageDir::open(dir.path()).unwrap();
        let mut out = images.writer(ImageKind::Apparmor, 0);
        out.write(entry).unwrap();
        out.finish().unwrap();
        (dir, images)
    }

    #[test]
    fn namespaces_come_back_under_the_name_that_is_given() {
        let nested = sample().namespaces[0].clone();
        let (_dir, images) = images(&pb::ApparmorEntry { namespaces: vec![sample(), nested] });
        let read = |given: Option<&str>| {
            let given = given.map(|text| LsmProfile::parse(text).unwrap());
            let read = Policies::read(&images, given.as_ref(), ["out//&:ns:a"]).unwrap();
            read.namespaces.into_iter().map(|namespace| namespace.name).collect::<Vec<_>>()
        };
        assert_eq!(read(None), ["ns"]);
        assert_eq!(read(Some("apparmor:new//&:other:")), ["other"]);
        assert!(read(Some("apparmor:new")).is_empty());
        assert!(read(Some("unconfined")).is_empty());
        assert!(read(Some("selinux:a:b:c:s0")).is_empty());
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in ["..", "a/b", ""] {
            let bad = pb::AaNamespace { name: name.into(), ..Default::default() };
            let (_dir, images) = images(&pb::ApparmorEntry { namespaces: vec![bad] });
            assert!(Policies::read(&images, None, []).is_err(), "{name}");
        }
    }

    #[test]
    fn a_host_without_namespaces_is_named() {
        let policies = Policies { namespaces: vec![sample()] };
        let (_dir, host) = root(&[]);
        assert!(policies.check(&host).unwrap_err().to_string().contains("no AppArmor"));
        let (_dir, host) = root(&[("sys/module/apparmor/parameters/enabled", b"Y")]);
        assert!(policies.check(&host).unwrap_err().to_string().contains("securityfs"));
        Policies::default().check(&host).unwrap();
    }

    #[test]
    fn what_was_made_goes_unless_it_is_kept() {
        let (dir, host) = root(&[(&format!("{AT}/there/.replace"), b"")]);
        let at = |name: &str| dir.path().join(AT).join(name);
        let empty = |name: &str| pb::AaNamespace { name: name.into(), ..Default::default() };
        let there = pb::AaNamespace { policies: vec![policy("a", b"AA")], ..empty("there") };
        let policies = Policies { namespaces: vec![there, empty("new")] };
        drop(policies.load(&host).unwrap());
        assert_eq!(fs::read(at("there/.replace")).unwrap(), b"AA");
        assert!(!at("new").exists() && at("there").exists());
        policies.load(&host).unwrap().keep();
        assert!(at("new").exists());
    }
}
