//! A whole image set, read for looking at it: the tree of processes and what hangs on it.
//!
//! Reading is forgiving: an image that is missing or damaged leaves its place empty and a [`Finding`]
//! behind, so that a broken set can be shown as far as it goes. Restoring reads for itself, strictly.

mod census;
mod finding;
mod memory;
mod needs;
mod sockets;
mod task;
mod tree;

use std::collections::HashMap;

pub use self::{
    census::{Census, census},
    finding::{Finding, Severity},
    memory::{MemoryTotals, memory, task_memory},
    needs::{Need, needs},
    sockets::{SocketKind, SocketState, sockets},
    task::{Task, TaskState},
    tree::{MAX_BARS, Node as TreeNode, tree},
};
use crate::{
    catalog::ImageKind,
    compat,
    dir::ImageDir,
    error::{Error, Result},
    frame::Entry,
    pb,
};

/// What there is of a set.
#[derive(Debug)]
pub struct ImageSet {
    pub dir: ImageDir,
    pub inventory: Option<pb::InventoryEntry>,
    /// In the order of the process tree image: parents before children.
    pub tasks: Vec<Task>,
    /// Descriptor tables by their number; tasks may share them.
    pub fd_tables: HashMap<u32, Vec<pb::FdinfoEntry>>,
    /// Open files. Numbers are unique within a type; in older sets a fifo has the number of its path.
    pub files: HashMap<(pb::FdTypes, u32), pb::FileEntry>,
    pub remaps: Vec<pb::RemapFilePathEntry>,
    pub stats: Option<pb::DumpStatsEntry>,
    /// What could not be read.
    pub findings: Vec<Finding>,
}

/// How complete a set is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Everything is there.
    Complete,
    /// Memory only, to be the parent of a later dump.
    PreDump,
    /// Part of its memory is in this folder, which is there.
    WithParent(String),
    /// Part of its memory is in this folder, which is not there.
    NeedsParent(String),
    /// The dump did not finish; says what is missing.
    Truncated(String),
}

impl ImageSet {
    /// Reads a set.
    ///
    /// # Errors
    /// Only if the folder itself cannot be read.
    pub fn load(dir: &ImageDir) -> Result<Self> {
        let mut set = Self {
            dir: dir.clone(),
            inventory: None,
            tasks: Vec::new(),
            fd_tables: HashMap::new(),
            files: HashMap::new(),
            remaps: Vec::new(),
            stats: None,
            findings: Vec::new(),
        };
        let images = dir.images()?;
        let has = |kind| images.iter().any(|(k, _)| *k == kind);
        if has(ImageKind::Inventory) {
            set.inventory = set.note(compat::inventory(dir));
        }
        if has(ImageKind::StatsDump) {
            let stats = set.note(dir.read_one::<pb::StatsEntry>(ImageKind::StatsDump, 0));
            set.stats = stats.and_then(|s| s.dump);
        }
        let mut files = HashMap::new();
        let read = compat::each_file(dir, |file| {
            let key = (file.r#type(), file.id);
            if files.insert(key, file).is_some() {
                let text = format!("{} file {:#x} is there twice", key.0.as_str_name(), key.1);
                set.findings.push(Finding::error(ImageKind::Files.file_name(0), text));
            }
            Ok(())
        });
        set.note(read);
        set.files = files;
        set.remaps = set.note(compat::remaps(dir)).unwrap_or_default();
        set.load_tasks();
        Ok(set)
    }

    fn load_tasks(&mut self) {
        let dir = self.dir.clone();
        for entry in self.partial_list::<pb::PstreeEntry>(ImageKind::Pstree) {
            let task = Task::load(&dir, entry, &mut self.findings);
            if let Some(files_id) = task.files_id()
                && !self.fd_tables.contains_key(&files_id)
            {
                let table = self.note(dir.read_all(ImageKind::Fdinfo, files_id.into()));
                self.fd_tables.insert(files_id, table.unwrap_or_default());
            }
            self.tasks.push(task);
        }
    }

    /// The entries of an image up to the first that is damaged.
    fn partial_list<M: Entry>(&mut self, kind: ImageKind) -> Vec<M> {
        let mut entries = Vec::new();
        let Some(Some(mut reader)) = self.note(self.dir.reader(kind, 0)) else { return entries };
        while let Some(Some(entry)) = self.note(reader.next()) {
            entries.push(entry);
        }
        entries
    }

    /// Keeps the error of what could not be read.
    fn note<T>(&mut self, read: Result<T>) -> Option<T> {
        read.map_err(|e| self.findings.push(Finding::from(e))).ok()
    }

    /// The task with this number. Walks over all: for many look-ups make an index.
    pub fn task(&self, pid: u32) -> Option<&Task> {
        self.tasks.iter().find(|t| t.pid == pid)
    }

    /// The first task: the root of the tree.
    pub fn root(&self) -> Option<&Task> {
        self.tasks.iter().find(|t| t.ppid == 0)
    }

    /// Descriptors of a task.
    pub fn fds(&self, task: &Task) -> &[pb::FdinfoEntry] {
        task.files_id().and_then(|id| self.fd_tables.get(&id)).map_or(&[], Vec::as_slice)
    }

    /// The open file a descriptor refers to.
    pub fn file(&self, fd: &pb::FdinfoEntry) -> Option<&pb::FileEntry> {
        self.files.get(&(file_type(fd), fd.id))
    }

    /// A regular file.
    pub fn reg(&self, id: u32) -> Option<&pb::RegFileEntry> {
        self.files.get(&(pb::FdTypes::Reg, id))?.reg.as_ref()
    }

    /// Path of a regular file.
    pub fn path(&self, id: u32) -> Option<&[u8]> {
        self.reg(id).map(|reg| &reg.name[..])
    }

    /// All open files in the order of their numbers.
    pub fn sorted_files(&self) -> Vec<&pb::FileEntry> {
        let mut files: Vec<_> = self.files.values().collect();
        files.sort_by_key(|f| (f.id, f.r#type));
        files
    }

    /// How complete the set is, as far as that can be told without looking into every image.
    pub fn verdict(&self) -> Verdict {
        let parent = self.dir.parent_target().ok().flatten().map(|p| p.display().to_string());
        if self.tasks.is_empty() {
            let images = self.dir.images().unwrap_or_default();
            let has = |kind| images.iter().any(|(k, _)| *k == kind);
            let memory_only = has(ImageKind::Pagemap) && !has(ImageKind::Core) && self.findings.is_empty();
            return if memory_only {
                Verdict::PreDump
            } else {
                Verdict::Truncated("there is no process tree (pstree.img)".into())
            };
        }
        if self.inventory.is_none() {
            return Verdict::Truncated("there is no inventory (inventory.img), which is written last".into());
        }
        if let Some(finding) = self.findings.iter().find(|f| f.severity == Severity::Error) {
            return Verdict::Truncated(finding.to_string());
        }
        match parent {
            None => Verdict::Complete,
            Some(name) if self.dir.parent().is_ok_and(|p| p.is_some()) => Verdict::WithParent(name),
            Some(name) => Verdict::NeedsParent(name),
        }
    }
}

/// The type of the file behind a descriptor. Terminals and autofs pipes may say so in a way of their own.
pub fn file_type(fd: &pb::FdinfoEntry) -> pb::FdTypes {
    match fd.r#type() {
        pb::FdTypes::CtlTty => pb::FdTypes::Tty,
        pb::FdTypes::AutofsPipe => pb::FdTypes::Pipe,
        other => other,
    }
}

impl From<Error> for Finding {
    fn from(e: Error) -> Self {
        let text = e.to_string();
        let text = text
            .strip_prefix(e.image())
            .map_or(text.clone(), |t| t.trim_start_matches([',', ':', ' ']).into());
        Finding { severity: Severity::Error, image: e.image().into(), text }
    }
}

#[cfg(test)]
mod tests;
