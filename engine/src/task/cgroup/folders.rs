//! Folders of groups with their properties, as the images have them.

use std::os::{
    fd::{AsFd, OwnedFd},
    unix::ffi::OsStrExt,
};

use nix::{
    dir::{Dir, Type},
    errno::Errno,
    fcntl::OFlag,
    sys::stat::{Mode, fstat},
};
use rcriu_images::pb;

use super::{
    attributes,
    properties::{self, Known},
};
use crate::error::{Context, Error, Result, SysContext};

const FOLDER: OFlag = OFlag::O_DIRECTORY.union(OFlag::O_RDONLY).union(OFlag::O_CLOEXEC);
/// Groups below each other; deeper ones are refused before the stack runs out.
const DEEPEST: usize = 256;

/// State of the group that was frozen for the dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FreezerState {
    /// `st_dev` of its folder.
    pub dev: u64,
    /// `st_ino` of its folder.
    pub ino: u64,
    /// Whether it was found frozen.
    pub frozen: bool,
}

impl FreezerState {
    /// Makes the group's image say what the dump has found, not what it has made of it.
    fn note(self, folder: &OwnedFd, entry: &mut pb::CgroupDirEntry) -> Result<()> {
        let stat = fstat(folder).call("fstat")?;
        if (stat.st_dev, stat.st_ino) != (self.dev, self.ino) {
            return Ok(());
        }
        if let Some(state) = entry.properties.iter_mut().find(|p| p.name == "cgroup.freeze") {
            state.value = if self.frozen { b"1" } else { b"0" }.to_vec();
        } else if let Some(mut state) = properties::read(folder, "freezer.state")? {
            state.value = if self.frozen { &b"FROZEN"[..] } else { b"THAWED" }.to_vec();
            entry.properties.push(state);
        }
        Ok(())
    }
}

/// What is read from one hierarchy.
pub struct Reader<'a> {
    /// Its root folder.
    pub root: OwnedFd,
    /// `cpu,cpuacct`; empty for version 2.
    pub controllers: &'a str,
    /// What is kept of each group.
    pub known: &'a Known,
    /// The group that was frozen for the dump.
    pub freezer: Option<FreezerState>,
    /// Whether threads of one process may be in different groups, as far as seen.
    pub threaded: bool,
}

impl Reader<'_> {
    /// The group at `path` (from the hierarchy's root) and all below it. Of the root itself nothing is kept: it
    /// belongs to the host, and so does what else is below it.
    pub fn read(&mut self, path: &[u8]) -> Result<pb::CgroupDirEntry> {
        let name: Vec<u8> = path.strip_prefix(b"/").unwrap_or(path).to_vec();
        let at = if name.is_empty() { b"." } else { name.as_slice() };
        let folder =
            self.open(&self.root, at).during(|| format!("group {}", String::from_utf8_lossy(path)))?;
        if name.is_empty() {
            self.threaded |= !self.controllers.is_empty();
            return Ok(pb::CgroupDirEntry {
                dir_perms: Some(perms(&folder)?),
                ..pb::CgroupDirEntry::default()
            });
        }
        self.group(folder, name, 0).during(|| format!("group {}", String::from_utf8_lossy(path)))
    }

    fn open(&self, parent: &OwnedFd, name: &[u8]) -> Result<OwnedFd> {
        let name = std::ffi::OsStr::from_bytes(name);
        nix::fcntl::openat(parent.as_fd(), name, FOLDER, Mode::empty()).call("openat")
    }

    fn group(&mut self, folder: OwnedFd, name: Vec<u8>, depth: usize) -> Result<pb::CgroupDirEntry> {
        if depth > DEEPEST {
            return Err(Error::unsupported(format!("groups more than {DEEPEST} levels deep")));
        }
        let mut entry = pb::CgroupDirEntry {
            dir_name: name,
            dir_perms: Some(perms(&folder)?),
            attribute: attributes::read(folder.as_fd())?,
            ..pb::CgroupDirEntry::default()
        };
        for property in self.known.of(self.controllers) {
            let found = properties::read(&folder, property)?;
            if let Some(property) = found.filter(|property| !properties::is_usual(property)) {
                self.threaded |= property.name == "tasks"
                    || property.name == "cgroup.type" && property.value == b"threaded";
                entry.properties.push(property);
            }
        }
        if let Some(freezer) = self.freezer {
            freezer.note(&folder, &mut entry)?;
        }
        let list = self.open(&folder, b".")?;
        let mut children: Vec<Vec<u8>> = Vec::new();
        for child in Dir::from_fd(list).call("getdents64")?.iter() {
            let child = child.call("getdents64")?;
            let name = child.file_name().to_bytes();
            if child.file_type() == Some(Type::Directory) && name != b"." && name != b".." {
                children.push(name.to_vec());
            }
        }
        children.sort_unstable();
        for name in children {
            let child = match self.open(&folder, &name) {
                // Gone meanwhile: nobody of ours was in it.
                Err(e) if e.errno() == Some(Errno::ENOENT as i32) => continue,
                other => other?,
            };
            entry.children.push(self.group(child, name, depth + 1)?);
        }
        Ok(entry)
    }
}

fn perms(folder: &OwnedFd) -> Result<pb::CgroupPerms> {
    let stat = fstat(folder).call("fstat")?;
    Ok(pb::CgroupPerms { mode: stat.st_mode, uid: stat.st_uid, gid: stat.st_gid })
}
