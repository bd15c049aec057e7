//! Labels of security modules: the AppArmor profile or SELinux context that a thread is confined by.
//!
//! Images hold them as CRIU does: in the credentials of each thread, with the module in the inventory. A thread that
//! AppArmor does not confine has none. Namespaces of AppArmor hold policy of their own, which goes into
//! `apparmor.img`.
//!
//! ```text
//! dump     LabelsOut::of (each thread)        -> core-TID.img: creds.lsm_profile, creds.lsm_sockcreate
//!          SocketLabels (SELinux)             -> fdinfo-ID.img: xattr_security_selinux
//!          policy::dump                       -> apparmor.img
//! restore  Labels::check                      before anything is made
//!          policy::load                       namespaces and their policy
//!          Labels::of                         what the restorer writes, see restorer/src/label.rs
//! ```

mod dump;
mod label;
pub mod policy;
mod restore;
pub mod sockets;

use std::path::{Path, PathBuf};

use rcriu_images::pb;

use crate::{
    error::Result,
    options::LsmKind,
    procfs::{ProcDir, trim},
};

pub use dump::{LabelsOut, Seen};
pub use restore::{Labels, Written};

/// AppArmor's word for a thread that it does not confine.
const UNCONFINED: &str = "unconfined";

/// A module that labels threads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Module {
    /// Labels are profiles, known to the kernel by name.
    AppArmor,
    /// Labels are contexts, `user:role:type:range`.
    SeLinux,
}

impl Module {
    /// As messages call it.
    pub fn name(self) -> &'static str {
        match self {
            Module::AppArmor => "AppArmor",
            Module::SeLinux => "SELinux",
        }
    }

    /// As messages call its labels.
    fn labels(self) -> &'static str {
        match self {
            Module::AppArmor => "AppArmor profile",
            Module::SeLinux => "SELinux label",
        }
    }

    /// The number in the inventory.
    pub fn to_image(module: Option<Module>) -> i32 {
        (match module {
            None => pb::Lsmtype::NoLsm,
            Some(Module::AppArmor) => pb::Lsmtype::Apparmor,
            Some(Module::SeLinux) => pb::Lsmtype::Selinux,
        }) as i32
    }

    fn from_image(number: Option<i32>) -> Option<Module> {
        match number {
            Some(n) if n == pb::Lsmtype::Apparmor as i32 => Some(Module::AppArmor),
            Some(n) if n == pb::Lsmtype::Selinux as i32 => Some(Module::SeLinux),
            _ => None,
        }
    }

    fn of(kind: LsmKind) -> Option<Module> {
        match kind {
            LsmKind::None => None,
            LsmKind::AppArmor => Some(Module::AppArmor),
            LsmKind::SeLinux => Some(Module::SeLinux),
        }
    }
}

/// The module that is at work on this host, and where it shows itself.
#[derive(Clone, Debug)]
pub struct Host {
    /// None where neither is.
    pub module: Option<Module>,
    root: PathBuf,
}

impl Host {
    /// Looks at this host.
    pub fn look() -> Host {
        Host::below(Path::new("/"))
    }

    /// As though `root` were `/`.
    fn below(root: &Path) -> Host {
        let mut host = Host { module: None, root: root.to_owned() };
        // Without securityfs, as in many containers, a parameter tells.
        let parameter = std::fs::read(host.path("sys/module/apparmor/parameters/enabled"));
        if host.path(APPARMOR).exists() || parameter.is_ok_and(|on| on.starts_with(b"Y")) {
            host.module = Some(Module::AppArmor);
        } else if host.has_selinux() {
            host.module = Some(Module::SeLinux);
        }
        host
    }

    /// Without a policy SELinux gives labels that are none.
    fn has_selinux(&self) -> bool {
        let listed = || {
            let known = std::fs::read_to_string(self.path("proc/filesystems")).unwrap_or_default();
            known.lines().any(|line| line.ends_with("\tselinuxfs"))
        };
        (self.path("sys/fs/selinux/enforce").exists() || listed())
            && self.own_text("current").is_ok_and(|label| is_context(&label))
    }

    fn path(&self, below: &str) -> PathBuf {
        self.root.join(below)
    }

    fn own_text(&self, name: &str) -> std::io::Result<String> {
        let bytes = std::fs::read(self.path("proc/thread-self/attr").join(name))?;
        Ok(text(&bytes))
    }

    /// The label of the calling thread; none if it is not confined.
    pub fn own_label(&self) -> Option<String> {
        match self.module? {
            Module::AppArmor => {
                let own = self.own_text("apparmor/current").or_else(|_| self.own_text("current")).ok()?;
                label::profile(&own)
            }
            Module::SeLinux => self.own_text("current").ok(),
        }
    }
}

/// AppArmor's folder.
const APPARMOR: &str = "sys/kernel/security/apparmor";

/// The content of an attribute: labels end with a zero or a line feed, or with neither.
fn text(bytes: &[u8]) -> String {
    let bytes = bytes.strip_suffix(b"\0").unwrap_or(bytes);
    String::from_utf8_lossy(trim(bytes)).into_owned()
}

/// Whether it may be an SELinux context: at least a user, a role, a type and a range.
fn is_context(label: &str) -> bool {
    label.split(':').count() >= 4
}

/// Attribute `name` of the thread.
fn attribute(thread: &ProcDir, name: &str) -> Result<String> {
    Ok(text(&thread.read(&format!("attr/{name}"))?))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A root folder with these files.
    pub(in crate::task::lsm) fn root(files: &[(&str, &[u8])]) -> (tempfile::TempDir, Host) {
        let dir = tempfile::tempdir().unwrap();
        for (name, content) in files {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        let host = Host::below(dir.path());
        (dir, host)
    }

    #[test]
    fn the_module_at_work_is_found() {
        assert_eq!(root(&[]).1.module, None);
        let (_dir, host) = root(&[
            ("sys/kernel/security/apparmor/profiles", b""),
            ("proc/thread-self/attr/current", b"box (enforce)\n"),
        ]);
        assert_eq!((host.module, host.own_label().as_deref()), (Some(Module::AppArmor), Some("box")));
        let hidden = [("sys/module/apparmor/parameters/enabled", b"Y\n" as &[u8])];
        assert_eq!(root(&hidden).1.module, Some(Module::AppArmor));
        let off = [("sys/module/apparmor/parameters/enabled", b"N\n" as &[u8])];
        assert_eq!(root(&off).1.module, None);
    }

    #[test]
    fn selinux_without_a_policy_is_none() {
        let enforce = ("sys/fs/selinux/enforce", b"1" as &[u8]);
        let current = |label: &'static [u8]| [enforce, ("proc/thread-self/attr/current", label)];
        let (_dir, host) = root(&current(b"u:r:some_t:s0-s0:c0.c9\0"));
        assert_eq!(
            (host.module, host.own_label().as_deref()),
            (Some(Module::SeLinux), Some("u:r:some_t:s0-s0:c0.c9"))
        );
        assert_eq!(root(&current(b"kernel\0")).1.module, None);
        let listed = [
            ("proc/filesystems", b"nodev\tsysfs\nnodev\tselinuxfs\n" as &[u8]),
            ("proc/thread-self/attr/current", b"a:b:c:s0\0"),
        ];
        assert_eq!(root(&listed).1.module, Some(Module::SeLinux));
    }

    #[test]
    fn modules_have_their_numbers_in_the_inventory() {
        for module in [None, Some(Module::AppArmor), Some(Module::SeLinux)] {
            assert_eq!(Module::from_image(Some(Module::to_image(module))), module);
        }
        assert_eq!(Module::from_image(None), None);
    }
}
