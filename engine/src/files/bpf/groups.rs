//! Control groups that programs are attached to.

use std::{
    collections::{HashMap, HashSet},
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use nix::{
    dir::{Dir, Type},
    errno::Errno,
    fcntl::{OFlag, openat},
    sys::stat::Mode,
};
use rcriu_images::pb;

use crate::{
    error::{Error, Result, SysContext},
    sys::bpfprog,
    task::cgroup::hierarchy,
};

/// Kinds of events of the programs that are kept: packets that come in, that go out, devices (`BPF_CGROUP_*`).
const EVENTS: [u32; 3] = [0, 1, 6];

const FOLDER: OFlag = OFlag::O_DIRECTORY.union(OFlag::O_RDONLY).union(OFlag::O_CLOEXEC);

/// Groups by the programs attached to them, looked for once the first program is met.
#[derive(Debug, Default)]
pub(in crate::files) struct Attached {
    by_program: Option<HashMap<u32, Vec<pb::RcriuBpfGroup>>>,
    met: HashSet<u32>,
}

impl Attached {
    /// Groups that program `id` is attached to.
    ///
    /// # Errors
    /// A program that was met before: it was opened twice, and a restore would make two.
    pub(super) fn of(&mut self, id: u32, yard: Option<&Path>) -> Result<Vec<pb::RcriuBpfGroup>> {
        if !self.met.insert(id) {
            return Err(Error::unsupported("a BPF program that was opened more than once cannot be dumped")
                .remedy("close all descriptors of it but one and its duplicates"));
        }
        Ok(self.found(yard)?.remove(&id).unwrap_or_default())
    }

    fn found(&mut self, yard: Option<&Path>) -> Result<&mut HashMap<u32, Vec<pb::RcriuBpfGroup>>> {
        Ok(match &mut self.by_program {
            Some(found) => found,
            none => {
                let mut found = HashMap::new();
                match hierarchy("", yard) {
                    Ok(root) => look(root, &mut Vec::new(), &mut found)?,
                    // Without the hierarchy nothing is attached.
                    Err(e) => log::debug!("No groups of version 2: {e}"),
                }
                none.insert(found)
            }
        })
    }

    /// Programs that were not met, by number, with those groups they are attached to that are `top` or below it.
    pub(super) fn left(
        &mut self,
        top: &[u8],
        yard: Option<&Path>,
    ) -> Result<Vec<(u32, Vec<pb::RcriuBpfGroup>)>> {
        let is_below = |group: &pb::RcriuBpfGroup| {
            group.path.strip_prefix(top).is_some_and(|rest| matches!(rest.first(), None | Some(b'/')))
        };
        let mut left: Vec<_> = self
            .found(yard)?
            .drain()
            .map(|(id, groups)| (id, groups.into_iter().filter(is_below).collect::<Vec<_>>()))
            .filter(|(_, groups)| !groups.is_empty())
            .collect();
        left.sort_by_key(|(id, _)| *id);
        Ok(left)
    }
}

/// Looks at the group whose folder is given, and those below it.
fn look(folder: OwnedFd, path: &mut Vec<u8>, found: &mut HashMap<u32, Vec<pb::RcriuBpfGroup>>) -> Result<()> {
    for event in EVENTS {
        match bpfprog::attached(folder.as_fd(), event) {
            Ok((programs, flags)) => {
                for program in programs {
                    let path = if path.is_empty() { b"/".to_vec() } else { path.clone() };
                    found.entry(program).or_default().push(pb::RcriuBpfGroup { path, event, flags });
                }
            }
            // It was removed meanwhile, or the kernel does not have such events.
            Err(e) if matches!(e.errno(), Some(libc::ENODEV | libc::EINVAL)) => {}
            Err(e) => return Err(e),
        }
    }
    let list = openat(&folder, ".", FOLDER, Mode::empty()).call("openat")?;
    for child in Dir::from_fd(list).call("getdents64")?.iter() {
        let child = child.call("getdents64")?;
        let name = child.file_name().to_bytes();
        if child.file_type() != Some(Type::Directory) || matches!(name, b"." | b"..") {
            continue;
        }
        match openat(&folder, std::ffi::OsStr::from_bytes(name), FOLDER, Mode::empty()) {
            Err(Errno::ENOENT) => {}
            other => {
                let before = path.len();
                path.extend([b"/", name].concat());
                look(other.call("openat")?, path, found)?;
                path.truncate(before);
            }
        }
    }
    Ok(())
}
