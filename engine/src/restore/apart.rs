//! Namespaces of the kinds of which tasks of one tree may have several, but those of mounts, which the builder makes.
//!
//! ```text
//! root task          is in the first of each kind, makes the others, fills all of them, goes back
//! all other tasks    enter theirs right after their birth: memory is attached and sockets are made there
//! engine             has descriptors of all, for what only it may do
//! ```

use std::os::fd::OwnedFd;

use nix::{
    fcntl::OFlag,
    sched::{CloneFlags, setns, unshare},
};

use crate::{
    error::{Context, Error, Result, SysContext},
    files::{FilesShared, Space, spaces},
    procfs::ProcDir,
};

/// What all namespaces of one kind are to be, by their numbers in images: that of the root task first. Empty where the
/// tree gets none.
#[derive(Debug)]
pub(super) struct Several<T>(Vec<(u32, T)>);

impl<T> Default for Several<T> {
    fn default() -> Self {
        Several(Vec::new())
    }
}

impl<T> Several<T> {
    /// Reads what is to be in each of the namespaces `ids`.
    pub(super) fn read(ids: Vec<u32>, read: impl Fn(u32) -> Result<T>) -> Result<Several<T>> {
        Ok(Several(ids.into_iter().map(|id| Ok((id, read(id)?))).collect::<Result<_>>()?))
    }

    /// All of them.
    pub(super) fn each(&self) -> impl Iterator<Item = (u32, &T)> {
        self.0.iter().map(|(id, of)| (*id, of))
    }

    /// How many descriptors they take.
    pub(super) fn descriptors(&self) -> usize {
        if self.0.len() > 1 { self.0.len() } else { 0 }
    }

    /// Makes all but the first, in which this process is, also on return, and those that are `given` from outside. Adds
    /// descriptors of all to `made` if there are several.
    ///
    /// World: Task, the root of the tree.
    pub(super) fn make(
        &self,
        kind: CloneFlags,
        files: &FilesShared,
        made: &mut Vec<Space>,
        given: impl Fn(u32) -> Result<Option<OwnedFd>>,
    ) -> Result<()> {
        if self.0.len() < 2 {
            return Ok(());
        }
        let ((file, name), begin) = (named(kind), made.len());
        let me = ProcDir::own()?;
        for (at, (id, _)) in self.0.iter().enumerate() {
            if at > 0
                && let Some(file) = given(*id)?
            {
                made.push(Space { kind, id: *id, file: files.keep(file)? });
                continue;
            }
            if at > 0 {
                unshare(kind).call("unshare").during(|| format!("{name} namespace {id}"))?;
            }
            made.push(Space { kind, id: *id, file: files.keep(me.file(file, OFlag::O_RDONLY)?)? });
        }
        let first = made.get(begin).ok_or_else(|| Error::bug("no first namespace"))?;
        setns(&first.file, kind).call("setns").during(|| format!("back into the first {name} namespace"))
    }

    /// Does `act` in each of them, and goes back into the first.
    ///
    /// Precondition: they are made, and this process is in the first.
    pub(super) fn fill(
        &self,
        kind: CloneFlags,
        made: &[Space],
        mut act: impl FnMut(&T) -> Result<()>,
    ) -> Result<()> {
        let file = |id: u32| made.iter().find(|space| space.kind == kind && space.id == id);
        let enter = |id: u32| match file(id) {
            Some(space) => {
                setns(&space.file, kind).call("setns").during(|| format!("{} namespace {id}", named(kind).1))
            }
            // The only one.
            None => Ok(()),
        };
        for (id, of) in self.each() {
            enter(id)?;
            act(of)?;
        }
        self.0.first().map_or(Ok(()), |(id, _)| enter(*id))
    }
}

/// The file of a kind, and how messages call it.
fn named(kind: CloneFlags) -> (&'static str, &'static str) {
    let known = spaces::KINDS.iter().find(|(flag, ..)| *flag == kind);
    known.map_or(("ns/uts", "other"), |(_, file, name)| (*file, *name))
}
