//! SELinux among the options of a mount: `context="user:role:type:range"` gives all files there one label, and says so
//! to who mounts it again. `seclabel` only says that files have labels.

use crate::{
    error::{Error, Result},
    options::{CommonOptions, LsmKind},
    task::lsm::{Host, Module},
};

/// Options by which SELinux is told labels.
const CONTEXTS: [&[u8]; 4] = [b"context=", b"fscontext=", b"defcontext=", b"rootcontext="];

/// What becomes of contexts on a restore.
#[derive(Debug)]
pub(super) struct Contexts<'a> {
    selinux: bool,
    /// `--lsm-mount-context`.
    given: Option<&'a str>,
    /// `--lsm-profile` says that labels of SELinux are not wanted.
    unwanted: bool,
}

impl<'a> Contexts<'a> {
    pub fn new(opts: &'a CommonOptions) -> Contexts<'a> {
        Contexts {
            selinux: Host::look().module == Some(Module::SeLinux),
            given: opts.lsm_mount_context.as_deref(),
            unwanted: opts.lsm_profile.as_ref().is_some_and(|given| given.kind != LsmKind::SeLinux),
        }
    }

    /// The options to mount with here.
    ///
    /// # Errors
    /// A context on a host without SELinux.
    pub fn settle(&self, options: &[u8]) -> Result<Vec<u8>> {
        let mut kept: Vec<Vec<u8>> = Vec::new();
        for option in split(options) {
            if option == b"seclabel" {
                continue;
            }
            if !CONTEXTS.iter().any(|name| option.starts_with(name)) {
                kept.push(option.to_vec());
                continue;
            }
            let shown = || String::from_utf8_lossy(option).into_owned();
            match (self.selinux, self.given) {
                (true, Some(context)) if option.starts_with(CONTEXTS[0]) => {
                    kept.push(format!("context=\"{context}\"").into());
                }
                (true, _) => kept.push(option.to_vec()),
                (false, _) if self.unwanted => {
                    log::warn!("The mount option {} is left out: this host has no SELinux", shown());
                }
                (false, _) => {
                    let what = format!("the mount option {}, and this host has no SELinux", shown());
                    return Err(Error::host(what).remedy("give --lsm-profile unconfined to leave it out"));
                }
            }
        }
        Ok(kept.join(&b','))
    }
}

/// Options, of which values in quotes may have commas.
fn split(options: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut quoted = false;
    options
        .split(move |c| {
            quoted ^= *c == b'"';
            *c == b',' && !quoted
        })
        .filter(|option| !option.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settled(selinux: bool, given: Option<&str>, unwanted: bool, options: &[u8]) -> Result<String> {
        let contexts = Contexts { selinux, given, unwanted };
        contexts.settle(options).map(|options| String::from_utf8(options).unwrap())
    }

    #[test]
    fn the_context_of_a_mount_is_replaced() {
        let old = b"rw,context=\"a:b:c:s0:c1,c2\",inode64";
        assert_eq!(settled(true, Some("x:y"), false, old).unwrap(), "rw,context=\"x:y\",inode64");
        assert_eq!(settled(true, Some("x"), false, b"context=a,size=1").unwrap(), "context=\"x\",size=1");
        assert_eq!(settled(true, Some("x"), false, b"size=1,seclabel").unwrap(), "size=1");
        assert_eq!(settled(true, Some("x"), false, b"fscontext=a").unwrap(), "fscontext=a");
        assert_eq!(settled(true, None, false, old).unwrap().as_bytes(), old);
        assert_eq!(settled(true, Some("x"), false, b"").unwrap(), "");
    }

    #[test]
    fn without_selinux_a_context_is_refused_or_left_out() {
        let old = b"size=1,context=\"a:b:c:s0:c1,c2\",seclabel";
        let e = settled(false, Some("x"), false, old).unwrap_err().to_string();
        assert!(e.contains("c1,c2") && e.contains("--lsm-profile unconfined"), "{e}");
        assert_eq!(settled(false, None, true, old).unwrap(), "size=1");
        assert_eq!(settled(false, None, false, b"size=1,seclabel").unwrap(), "size=1");
    }
}
