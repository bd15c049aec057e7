//! The UTS namespace: the names of host and domain (uts_namespaces(7)), in `utsns-ID.img`.
//!
//! The other strings of uname(2) are the kernel's own.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt};

use nix::sys::utsname::uname;
use rcriu_images::{ImageDir, ImageKind, pb};

use crate::{
    error::{Context, Error, Result, SysContext},
    sys::uts,
};

/// Bytes of a name at most (`__NEW_UTS_LEN`).
const LONGEST: usize = 64;

/// The names, as images have them: any bytes but zero.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uts {
    host: Vec<u8>,
    domain: Vec<u8>,
}

/// Writes `utsns-ID.img`.
///
/// World: Dump. Precondition: the calling thread is in the namespace, see [`inside`](super::enter::inside).
pub fn dump(images: &ImageDir, id: u32) -> Result<()> {
    let names = uname().call("uname")?;
    let mut out = images.writer(ImageKind::Utsns, id.into());
    out.write(&pb::UtsnsEntry {
        nodename: names.nodename().as_bytes().to_vec(),
        domainname: names.domainname().as_bytes().to_vec(),
    })?;
    Ok(out.finish()?)
}

/// Reads `utsns-ID.img`. World: Plan.
///
/// # Errors
/// No such image; a name that no host can have.
pub fn read(images: &ImageDir, id: u32) -> Result<Uts> {
    let entry: pb::UtsnsEntry = images.read_one(ImageKind::Utsns, id.into())?;
    for (what, name) in [("host", &entry.nodename), ("domain", &entry.domainname)] {
        if name.len() > LONGEST || name.contains(&0) {
            return Err(Error::image(format!(
                "{}: the {what}'s name {} cannot be one",
                ImageKind::Utsns.file_name(id.into()),
                crate::procfs::excerpt(name)
            )));
        }
    }
    Ok(Uts { host: entry.nodename, domain: entry.domainname })
}

impl Uts {
    /// Gives the names to the namespace of the calling thread. World: Task, the root of the tree.
    pub fn restore(&self) -> Result<()> {
        let both = uts::set_host(OsStr::from_bytes(&self.host)).and_then(|()| uts::set_domain(&self.domain));
        both.during(|| "UTS namespace".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sched::{CloneFlags, unshare};

    /// Does `act` in a thread in a namespace of its own; `None` where there can be none.
    fn apart<T: Send>(act: impl FnOnce() -> T + Send) -> Option<T> {
        std::thread::scope(|scope| {
            scope.spawn(|| unshare(CloneFlags::CLONE_NEWUTS).is_ok().then(act)).join().unwrap()
        })
    }

    fn folder() -> (tempfile::TempDir, ImageDir) {
        let folder = tempfile::tempdir().unwrap();
        let images = ImageDir::open(folder.path()).unwrap();
        (folder, images)
    }

    #[test]
    fn names_come_back_whatever_their_bytes() {
        let (_folder, images) = folder();
        let longest = [0xffu8; LONGEST];
        let done = apart(|| {
            uts::set_host(OsStr::from_bytes(&longest)).unwrap();
            uts::set_domain(b"do main").unwrap();
            dump(&images, 12).unwrap();
        });
        if done.is_none() {
            eprintln!("skipped: no UTS namespace can be made here");
            return;
        }
        let names = read(&images, 12).unwrap();
        let found = apart(|| {
            names.restore().unwrap();
            let found = uname().unwrap();
            (found.nodename().to_owned(), found.domainname().to_owned())
        });
        assert_eq!(found.unwrap(), (OsStr::from_bytes(&longest).to_owned(), "do main".into()));
        assert_ne!(uname().unwrap().domainname(), "do main");
    }

    #[test]
    fn names_that_cannot_be_are_errors() {
        let (_folder, images) = folder();
        assert!(read(&images, 1).unwrap_err().to_string().contains("utsns-1.img"));
        for bad in [&[b'x'; LONGEST + 1][..], b"a\0b"] {
            for entry in [
                pb::UtsnsEntry { nodename: bad.to_vec(), domainname: Vec::new() },
                pb::UtsnsEntry { nodename: Vec::new(), domainname: bad.to_vec() },
            ] {
                let mut out = images.writer(ImageKind::Utsns, 1);
                out.write(&entry).unwrap();
                out.finish().unwrap();
                let said = read(&images, 1).unwrap_err().to_string();
                assert!(said.starts_with("utsns-1.img: the ") && said.ends_with("cannot be one"), "{said}");
            }
        }
    }
}
