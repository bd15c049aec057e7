//! The overview as data: gathered once, printed as text or as JSON.
//!
//! The JSON form is stable: keys are never renamed or removed, and a change of meaning would change
//! [`FORMAT`]. Sizes are bytes, times microseconds unless the name says otherwise.

use std::{
    collections::{BTreeMap, HashSet},
    os::fd::AsFd,
};

use anyhow::Result;
use rcriu_images::{
    ImageDir, ImageKind, pb,
    set::{self, Finding, ImageSet, MemoryTotals, Severity, Verdict},
};
use serde::Serialize;

use super::style;

/// Version of the JSON form.
pub const FORMAT: u32 = 1;

#[derive(Debug, Serialize)]
pub struct Report {
    pub format: u32,
    pub dir: String,
    pub verdict: VerdictReport,
    pub image_version: Option<u32>,
    /// When the inventory was written, in seconds since 1970.
    pub dumped_at: Option<i64>,
    pub times: Option<Times>,
    /// Host name of the dumped uts namespace.
    pub hostname: Option<String>,
    pub architecture: Option<String>,
    /// Model of the CPU, if the set describes it.
    pub cpu: Option<String>,
    /// Depth first.
    pub tasks: Vec<TaskReport>,
    pub thread_count: usize,
    pub memory: MemoryReport,
    /// Open descriptors by type, and the open files behind them.
    pub descriptors: BTreeMap<String, usize>,
    pub open_files: usize,
    pub sockets: Vec<SocketReport>,
    /// Kinds of namespaces that the set brings along.
    pub namespaces: Vec<&'static str>,
    pub needs: Vec<NeedReport>,
    pub restore: String,
    pub findings: Vec<FindingReport>,
}

#[derive(Debug, Serialize)]
pub struct VerdictReport {
    /// `complete`, `pre-dump`, `with-parent`, `needs-parent` or `truncated`.
    pub state: &'static str,
    pub parent: Option<String>,
    pub reason: Option<String>,
}

#[derive(Debug, Serialize)]
pub struct Times {
    pub freezing: u64,
    pub frozen: u64,
    pub memory_dump: u64,
    pub memory_write: u64,
}

#[derive(Debug, Serialize)]
pub struct TaskReport {
    pub pid: u32,
    pub ppid: u32,
    pub pgid: u32,
    pub sid: u32,
    pub state: &'static str,
    pub comm: String,
    pub cmdline: Option<Vec<String>>,
    pub exe: Option<String>,
    pub cwd: Option<String>,
    pub uid: Option<u32>,
    pub threads: Vec<u32>,
    pub descriptors: usize,
    pub memory: MemoryReport,
    #[serde(skip)]
    pub depth: usize,
    #[serde(skip)]
    pub bars: Vec<bool>,
    #[serde(skip)]
    pub last: bool,
}

#[derive(Debug, Default, Serialize)]
pub struct MemoryReport {
    pub mapped: u64,
    pub rss: u64,
    pub shared: u64,
    pub stored: u64,
    pub in_parent: u64,
    pub lazy: u64,
    pub missing: u64,
    /// Of the stored pages, if they were counted: all, different ones, zero ones.
    pub pages: Option<u64>,
    pub unique_pages: Option<u64>,
    pub zero_pages: Option<u64>,
}

#[derive(Debug, Serialize)]
pub struct SocketReport {
    pub kind: &'static str,
    pub state: &'static str,
    pub count: usize,
}

#[derive(Debug, Serialize)]
pub struct NeedReport {
    pub option: String,
    pub why: String,
}

#[derive(Debug, Serialize)]
pub struct FindingReport {
    pub severity: &'static str,
    pub image: String,
    pub text: String,
}

impl Report {
    /// Looks at a set. Pages are counted if there are no more than `census_limit` bytes of them.
    ///
    /// # Errors
    /// Only if the folder itself cannot be read: damage ends up among the findings.
    pub fn gather(dir: &ImageDir, census_limit: u64) -> Result<Self> {
        let mut set = ImageSet::load(dir)?;
        let mut late: Vec<Finding> = Vec::new();
        let mut keep = |e: rcriu_images::Error| late.push(e.into());

        let mut memory = set::memory(&set).map(MemoryReport::from).map_err(&mut keep).unwrap_or_default();
        if let Some(census) = set::census(&set, census_limit).map_err(&mut keep).unwrap_or_default() {
            memory.pages = Some(census.pages);
            memory.unique_pages = Some(census.unique);
            memory.zero_pages = Some(census.zero);
        }
        let needs: Vec<_> = set::needs(&set).map_err(&mut keep).unwrap_or_default();
        let tasks: Vec<TaskReport> =
            set::tree(&set).into_iter().map(|node| TaskReport::of(&set, node, &mut keep)).collect();
        let hostname = hostname(&set).map_err(&mut keep).unwrap_or_default();
        let cpu =
            dir.read_opt::<pb::CpuinfoEntry>(ImageKind::Cpuinfo, 0).map_err(&mut keep).unwrap_or_default();
        let known: HashSet<Finding> = set.findings.iter().cloned().collect();
        set.findings.extend(late.into_iter().filter(|finding| !known.contains(finding)));

        let mut descriptors = BTreeMap::new();
        for fd in set.tasks.iter().flat_map(|task| set.fds(task)) {
            *descriptors.entry(set::file_type(fd).as_str_name().to_lowercase()).or_insert(0) += 1;
        }
        let mut restore =
            vec!["rcriu".into(), "restore".into(), "-D".into(), dir.path().display().to_string()];
        restore.extend(needs.iter().flat_map(|need| need.option.splitn(2, ' ').map(str::to_owned)));
        Ok(Self {
            format: FORMAT,
            dir: dir.path().display().to_string(),
            verdict: VerdictReport::from(set.verdict()),
            image_version: set.inventory.as_ref().map(|i| i.img_version),
            dumped_at: written_at(dir),
            times: set.stats.as_ref().map(|s| Times {
                freezing: s.freezing_time.into(),
                frozen: s.frozen_time.into(),
                memory_dump: s.memdump_time.into(),
                memory_write: s.memwrite_time.into(),
            }),
            hostname,
            architecture: architecture(&set),
            cpu: cpu.and_then(|c| c.x86_entry.into_iter().find_map(|e| e.model_id)),
            thread_count: tasks.iter().map(|t| t.threads.len()).sum(),
            tasks,
            memory,
            descriptors,
            open_files: set.files.len(),
            sockets: set::sockets(&set)
                .into_iter()
                .map(|((kind, state), count)| SocketReport { kind: kind.name(), state: state.name(), count })
                .collect(),
            namespaces: namespaces(dir)?,
            restore: style::words(&restore),
            needs: needs.into_iter().map(|n| NeedReport { option: n.option, why: n.why }).collect(),
            findings: set.findings.iter().map(FindingReport::from).collect(),
        })
    }
}

impl TaskReport {
    fn of(set: &ImageSet, node: set::TreeNode<'_>, keep: &mut impl FnMut(rcriu_images::Error)) -> Self {
        let task = node.task;
        let path = |id: u32| set.path(id).map(|p| String::from_utf8_lossy(p).into_owned());
        let creds = task.core.as_ref().and_then(|c| c.thread_core.as_ref()?.creds.as_ref());
        Self {
            pid: task.pid,
            ppid: task.ppid,
            pgid: task.pgid,
            sid: task.sid,
            state: task.state().name(),
            comm: task.comm(),
            cmdline: task.cmdline(&set.dir).map_err(&mut *keep).unwrap_or_default(),
            exe: task.mm.as_ref().and_then(|mm| path(mm.exe_file_id)),
            cwd: task.fs.as_ref().and_then(|fs| path(fs.cwd_id)),
            uid: creds.map(|c| c.uid),
            threads: task.threads.clone(),
            descriptors: set.fds(task).len(),
            memory: set::task_memory(set, task).map(MemoryReport::from).map_err(keep).unwrap_or_default(),
            depth: node.depth,
            bars: node.bars,
            last: node.last,
        }
    }
}

impl From<MemoryTotals> for MemoryReport {
    fn from(totals: MemoryTotals) -> Self {
        Self {
            mapped: totals.mapped,
            rss: totals.rss(),
            shared: totals.shared,
            stored: totals.stored,
            in_parent: totals.in_parent,
            lazy: totals.lazy,
            missing: totals.missing,
            ..Default::default()
        }
    }
}

impl From<Verdict> for VerdictReport {
    fn from(verdict: Verdict) -> Self {
        let (state, parent, reason) = match verdict {
            Verdict::Complete => ("complete", None, None),
            Verdict::PreDump => ("pre-dump", None, None),
            Verdict::WithParent(parent) => ("with-parent", Some(parent), None),
            Verdict::NeedsParent(parent) => ("needs-parent", Some(parent), None),
            Verdict::Truncated(reason) => ("truncated", None, Some(reason)),
        };
        Self { state, parent, reason }
    }
}

impl From<&Finding> for FindingReport {
    fn from(finding: &Finding) -> Self {
        let severity = match finding.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        Self { severity, image: finding.image.clone(), text: finding.text.clone() }
    }
}

/// When the last image of a dump was written.
fn written_at(dir: &ImageDir) -> Option<i64> {
    let name = ImageKind::Inventory.file_name(0);
    let stat = nix::sys::stat::fstatat(dir.as_fd(), name.as_str(), nix::fcntl::AtFlags::empty()).ok()?;
    Some(stat.st_mtime)
}

fn hostname(set: &ImageSet) -> rcriu_images::Result<Option<String>> {
    let Some((kind, id)) = set.dir.images()?.into_iter().find(|(kind, _)| *kind == ImageKind::Utsns) else {
        return Ok(None);
    };
    let uts: Option<pb::UtsnsEntry> = set.dir.read_opt(kind, id)?;
    Ok(uts.map(|uts| String::from_utf8_lossy(&uts.nodename).into_owned()))
}

fn architecture(set: &ImageSet) -> Option<String> {
    let core = set.root()?.core.as_ref()?;
    Some(core.mtype().as_str_name().to_lowercase())
}

fn namespaces(dir: &ImageDir) -> Result<Vec<&'static str>> {
    let images = dir.images()?;
    let kinds = [
        (ImageKind::Userns, "user"),
        (ImageKind::Pidns, "pid"),
        (ImageKind::Mnts, "mnt"),
        (ImageKind::Netns, "net"),
        (ImageKind::Utsns, "uts"),
        (ImageKind::IpcVar, "ipc"),
    ];
    Ok(kinds
        .into_iter()
        .filter(|(kind, _)| images.iter().any(|(k, _)| k == kind))
        .map(|(_, name)| name)
        .collect())
}
