//! BPF programs are attached to groups again.

use std::{
    ffi::OsStr,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
};

use nix::{
    fcntl::{OFlag, openat},
    sys::stat::Mode,
};
use rcriu_images::pb;

use super::{Groups, Hierarchy, Undo, roots::Moved, yard};
use crate::{
    error::{Context, Result, SysContext},
    options::CgroupOptions,
    sys::bpfprog,
};

impl Groups {
    /// Attaches `program` to a group of version 2, which may have come back elsewhere than the image says. To be called
    /// once everybody is in.
    ///
    /// # Errors
    /// A group that is not there, or has a program that lets no others be.
    pub fn attach(
        &mut self,
        program: BorrowedFd<'_>,
        group: &pb::RcriuBpfGroup,
        opts: &CgroupOptions,
    ) -> Result<()> {
        let path = moved(&self.moved, &group.path);
        let name = || format!("attaching it to group {}", String::from_utf8_lossy(&path).escape_debug());
        if !self.hierarchies.iter().any(|h| h.controllers.is_empty()) {
            // All are left as they are: the group is looked for where it was.
            let root = yard::hierarchy("", opts.yard.as_deref()).during(name)?;
            self.hierarchies.push(Hierarchy { controllers: String::new(), root, threaded: false });
        }
        let place = self.place("", &path)?;
        let folder = open(self.root(&place), &place.path).during(name)?;
        bpfprog::attach(folder.as_fd(), program, (group.event, group.flags)).during(name)?;
        self.undo.push(Undo::Attached(place, program.try_clone_to_owned().call("dup")?, group.event));
        Ok(())
    }
}

/// Takes a program back that [`Groups::attach`] has attached.
pub(super) fn detach(root: BorrowedFd<'_>, path: &[u8], program: &OwnedFd, event: u32) -> Result<()> {
    bpfprog::detach(open(root, path)?.as_fd(), program.as_fd(), event)
}

fn open(root: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    openat(root, OsStr::from_bytes(path), flags, Mode::empty()).call("openat").map_err(|e| match e.errno() {
        Some(libc::ENOENT) => e.remedy("--manage-cgroups=soft makes groups that are missing"),
        _ => e,
    })
}

/// Where the group of version 2 that was at `path` is now.
fn moved(list: &[Moved], path: &[u8]) -> Vec<u8> {
    let below = |moved: &&Moved| {
        let rest = path.strip_prefix(moved.from.as_slice());
        moved.controllers.is_empty() && rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'/')))
    };
    match list.iter().find(below) {
        Some(moved) => [&moved.to, path.get(moved.from.len()..).unwrap_or_default()].concat(),
        None => path.to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_found_below_the_new_root() {
        let to = |controllers: &str| Moved {
            controllers: controllers.into(),
            from: b"/box".into(),
            to: b"/box-1".into(),
        };
        let list = [to("cpu"), to("")];
        assert_eq!(moved(&list, b"/box/a"), b"/box-1/a");
        assert_eq!(moved(&list, b"/box"), b"/box-1");
        assert_eq!(moved(&list, b"/boxes/a"), b"/boxes/a");
        assert_eq!(moved(&list[..1], b"/box/a"), b"/box/a");
    }
}
