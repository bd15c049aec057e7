//! One process of a set.

use super::Finding;
use crate::{catalog::ImageKind, compat, dir::ImageDir, error::Result, pagemap::PageReader, pb};

/// Longest command line that is read, in bytes.
const MAX_CMDLINE: u64 = 1 << 20;

/// A process with the images that belong to it alone.
#[derive(Debug)]
pub struct Task {
    pub pid: u32,
    /// 0 for the root.
    pub ppid: u32,
    pub pgid: u32,
    pub sid: u32,
    /// All threads, the leader included. None for a zombie.
    pub threads: Vec<u32>,
    pub core: Option<pb::CoreEntry>,
    /// None for a zombie.
    pub ids: Option<pb::TaskKobjIdsEntry>,
    /// None for a zombie.
    pub mm: Option<pb::MmEntry>,
    /// None for a zombie.
    pub fs: Option<pb::FsEntry>,
}

/// `task_core_entry.task_state`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TaskState {
    Alive,
    /// Ended, waiting to be reaped: what sets say of zombies.
    Dead,
    Stopped,
    /// The same as [`TaskState::Dead`], as the kernel tells it.
    Zombie,
    Other(u32),
}

impl TaskState {
    /// By the number in the image.
    pub fn of(number: u32) -> Self {
        match number {
            1 => Self::Alive,
            2 => Self::Dead,
            3 => Self::Stopped,
            6 => Self::Zombie,
            other => Self::Other(other),
        }
    }

    /// In one word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Alive => "alive",
            Self::Dead | Self::Zombie => "zombie",
            Self::Stopped => "stopped",
            Self::Other(_) => "unknown",
        }
    }

    /// Whether such a task has memory, files and so on.
    pub fn has_body(self) -> bool {
        matches!(self, Self::Alive | Self::Stopped)
    }
}

impl Task {
    pub(super) fn load(dir: &ImageDir, entry: pb::PstreeEntry, findings: &mut Vec<Finding>) -> Self {
        let pid = entry.pid;
        fn keep<T>(read: Result<T>, findings: &mut Vec<Finding>) -> Option<T> {
            read.map_err(|e| findings.push(e.into())).ok()
        }
        let core = keep(compat::core(dir, pid), findings);
        let ids = keep(compat::ids(dir, pid), findings).flatten();
        let mm = keep(compat::mm(dir, pid), findings).flatten();
        let fs = keep(dir.read_opt(ImageKind::Fs, pid.into()), findings).flatten();
        let mut task = Self {
            pid,
            ppid: entry.ppid,
            pgid: entry.pgid,
            sid: entry.sid,
            threads: entry.threads,
            core,
            ids,
            mm,
            fs,
        };
        if matches!(task.state(), TaskState::Dead | TaskState::Zombie) {
            task.threads.clear();
        }
        task
    }

    pub fn state(&self) -> TaskState {
        TaskState::of(self.core.as_ref().and_then(|c| c.tc.as_ref()).map_or(0, |tc| tc.task_state))
    }

    /// The name `ps` shows; empty if the core cannot be read.
    pub fn comm(&self) -> String {
        let comm = self.core.as_ref().and_then(|c| c.tc.as_ref()).map_or(&[][..], |tc| &tc.comm);
        String::from_utf8_lossy(comm).into_owned()
    }

    /// Number of its descriptor table.
    pub fn files_id(&self) -> Option<u32> {
        self.ids.as_ref().map(|ids| ids.files_id)
    }

    /// Its pages, through all parents. `None` if it has none.
    pub fn pages(&self, dir: &ImageDir) -> Result<Option<PageReader>> {
        PageReader::open(dir, ImageKind::Pagemap, self.pid.into())
    }

    /// The arguments it was started with, out of the dumped pages; `None` if they are not among those.
    pub fn cmdline(&self, dir: &ImageDir) -> Result<Option<Vec<String>>> {
        let Some(mm) = &self.mm else { return Ok(None) };
        let len = mm.mm_arg_end.saturating_sub(mm.mm_arg_start).min(MAX_CMDLINE);
        if len == 0 {
            return Ok(None);
        }
        let Some(pages) = self.pages(dir)? else { return Ok(None) };
        let Some(bytes) = pages.read(mm.mm_arg_start, len)? else { return Ok(None) };
        let bytes = bytes.strip_suffix(b"\0").unwrap_or(&bytes);
        let mut args: Vec<_> =
            bytes.split(|&b| b == 0).map(|a| String::from_utf8_lossy(a).into_owned()).collect();
        // A program that writes its title over its arguments leaves zero bytes behind.
        while args.len() > 1 && args.last().is_some_and(String::is_empty) {
            args.pop();
        }
        Ok(Some(args))
    }
}
