//! Tables that tasks share since their fork: descriptors (CLONE_FILES) and working folder (CLONE_FS).
//!
//! A table can only be shared at the fork, so its users must be parent and child, or siblings of which one
//! forks the other with CLONE_PARENT.

use std::collections::HashMap;

use super::{Build, Member};
use crate::error::{Error, Result};
use crate::restore::read::TaskIx;

#[derive(Clone, Copy)]
enum Table {
    Files,
    Fs,
}

impl Build<'_> {
    /// Sets the flags of forks between tasks that share; moves forks to siblings where needed.
    pub(super) fn share(&mut self, members: &[Member]) -> Result<()> {
        let alive = || members.iter().enumerate().filter(|(_, m)| m.alive);
        let mut memory: HashMap<u32, TaskIx> = HashMap::new();
        for (i, m) in alive().filter(|(_, m)| m.vm != 0) {
            if let Some(first) = memory.insert(m.vm, TaskIx(i as u32)) {
                return Err(Error::unsupported(format!(
                    "tasks {} and {} share their memory (CLONE_VM without CLONE_THREAD)",
                    self.node(first).pid,
                    m.pid
                )));
            }
        }
        for table in [Table::Files, Table::Fs] {
            let id = |m: &Member| match table {
                Table::Files => m.files,
                Table::Fs => m.fs,
            };
            // First user of each table, and the last one below each parent.
            let mut first: HashMap<u32, TaskIx> = HashMap::new();
            let mut siblings: HashMap<(u32, TaskIx), TaskIx> = HashMap::new();
            for (i, m) in alive().filter(|(_, m)| id(m) != 0) {
                let ix = TaskIx(i as u32);
                let known = *first.entry(id(m)).or_insert(ix);
                let Some(parent) = m.parent else { continue };
                let with_parent = members[parent.at()].alive && id(&members[parent.at()]) == id(m);
                let sibling = siblings.insert((id(m), parent), ix);
                match (with_parent, sibling) {
                    _ if known == ix => {}
                    (true, _) => self.share_with(table, ix, parent, false)?,
                    (false, Some(sibling)) => self.share_with(table, ix, sibling, true)?,
                    (false, None) => return Err(self.cannot_share(table, ix, known)),
                }
            }
        }
        Ok(())
    }

    fn share_with(&mut self, table: Table, task: TaskIx, with: TaskIx, sibling: bool) -> Result<()> {
        let make = &mut self.made[task.at()];
        if sibling && self.makers[task.at()] != with {
            // The sibling must be in the task's session when it forks, and nobody else must be the maker.
            let plain = !make.sibling
                && !make.before_setsid
                && Some(self.makers[task.at()]) == self.nodes[task.at()].parent;
            let session = self.born[task.at()];
            if !plain || session.is_some_and(|s| s != self.nodes[with.at()].sid) {
                return Err(self.cannot_share(table, task, with));
            }
            make.sibling = true;
            self.makers[task.at()] = with;
        } else if self.makers[task.at()] != with {
            return Err(self.cannot_share(table, task, with));
        }
        let make = &mut self.made[task.at()];
        match table {
            Table::Files => make.share_files = true,
            Table::Fs => make.share_fs = true,
        }
        Ok(())
    }

    fn cannot_share(&self, table: Table, a: TaskIx, b: TaskIx) -> Error {
        let what = match table {
            Table::Files => "descriptor table (CLONE_FILES)",
            Table::Fs => "working folder (CLONE_FS)",
        };
        Error::unsupported(format!(
            "tasks {} and {} share their {what}, and neither can be forked by the other",
            self.node(a).pid,
            self.node(b).pid
        ))
    }
}
