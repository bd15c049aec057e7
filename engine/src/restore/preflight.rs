//! Everything that can be known to fail before anything is created: numbers taken, files gone or changed,
//! processor, kernel, limits. `restore --dry-run` prints it; a restore stops at the first problem.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sched::CloneFlags;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use serde::Serialize;

use crate::arch::Layout;
use crate::error::{Context, Error, Kind, Result, SysContext};
use crate::files;
use crate::kernel::Kernel;
use crate::mm::{hugetlb, keys, status, sysv};
use crate::options::{CpuCap, RestoreOptions};
use crate::procfs::ProcDir;
use crate::procfs::stat::Stat;
use crate::pstree::{FileId, RealPid, VirtPid};
use crate::restore::plan::Plan;
use crate::restore::read::Snapshot;
use crate::sys::attributes;
use crate::task::affinity;

/// How long a number may still be held by a process that has ended and is not yet reaped: a restore often
/// follows right after the tasks were killed.
const UNREAPED: Duration = Duration::from_secs(5);

/// Numbers end below what this file holds.
const PID_MAX: &str = "/proc/sys/kernel/pid_max";

/// What area a problem is from; stable names for scripts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Area {
    /// A pid or tid is taken.
    Pid,
    /// A file is missing or differs.
    File,
    /// The processor lacks something.
    Cpu,
    /// The kernel lacks something.
    Kernel,
    /// A limit is too low.
    Limit,
    /// Shared memory is in use.
    Memory,
    /// A security module, profile or label is not there.
    Security,
}

/// One reason why the restore would fail.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Problem {
    /// Where it comes from.
    pub area: Area,
    /// One line: what, why, what to do.
    pub text: String,
}

/// What a restore would do, and why it would fail.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Preflight {
    /// Processes that live afterwards.
    pub tasks: u32,
    /// Their threads.
    pub threads: u32,
    /// Processes that wait to be reaped.
    pub zombies: u32,
    /// Processes made for the time of the restore only.
    pub helpers: u32,
    /// Open files.
    pub files: u32,
    /// Why it would fail; empty if nothing is known to.
    pub problems: Vec<Problem>,
}

impl Preflight {
    /// Whether nothing is known that would make the restore fail.
    pub fn is_ok(&self) -> bool {
        self.problems.is_empty()
    }

    /// The first problem as an error.
    pub fn into_result(self) -> Result<()> {
        match self.problems.into_iter().next() {
            None => Ok(()),
            Some(problem) => Err(Error::host(problem.text)),
        }
    }

    fn add(&mut self, area: Area, result: Result<()>) {
        if let Err(e) = result {
            self.problems.push(Problem { area, text: e.to_string() });
        }
    }

    /// Looks at everything. Creates nothing.
    ///
    /// # Errors
    /// Only what keeps it from looking.
    pub fn check(
        snapshot: &Snapshot,
        plan: &Plan,
        opts: &RestoreOptions,
        kernel: &Kernel,
    ) -> Result<Preflight> {
        use crate::restore::tree::Role;
        let count = |role| plan.tree.nodes.iter().filter(|n| n.role == role).count() as u32;
        let mut found = Preflight {
            tasks: count(Role::Alive),
            zombies: count(Role::Zombie),
            helpers: count(Role::Helper),
            threads: snapshot.alive().map(|(_, t)| t.threads.len() as u32).sum(),
            files: snapshot.files.len() as u32,
            problems: Vec::new(),
        };
        let away = |kind| plan.home.is_away(kind);
        if !away(CloneFlags::CLONE_NEWPID) {
            check_pids(&mut found, snapshot, plan)?;
        }
        let cx = files::Preflight::new(&snapshot.dir, opts, away(CloneFlags::CLONE_NEWNS));
        let problems = plan.files.preflight(&cx, by_path(snapshot));
        found
            .problems
            .extend(problems.into_iter().map(|e| Problem { area: Area::File, text: e.to_string() }));
        check_cpu(&mut found, snapshot);
        if opts.common.cpu_cap.contains(CpuCap::IMAGE) {
            found.add(Area::Cpu, crate::cpuinfo::check(&snapshot.dir, opts.common.cpu_cap));
        }
        check_more(&mut found, snapshot);
        check_kernel(&mut found, plan, kernel);
        check_limits(&mut found, snapshot, plan)?;
        found.add(Area::Limit, hugetlb::check(snapshot));
        found.add(Area::Security, plan.policies.check(plan.labels.host()));
        found.add(Area::Security, plan.labels.check(snapshot, &plan.policies));
        // In one that is joined it is found out when it is made there.
        if !away(CloneFlags::CLONE_NEWIPC) {
            found.add(Area::Memory, sysv::check(snapshot));
        }
        Ok(found)
    }
}

/// Files that tasks use by path: executables, mappings, folders.
fn by_path(snapshot: &Snapshot) -> impl Iterator<Item = FileId> {
    snapshot.alive().flat_map(|(_, task)| {
        let mapped = task.mm.iter().flat_map(|mm| {
            let files =
                mm.vmas.iter().filter(|v| v.status & (status::FILE_PRIVATE | status::FILE_SHARED) != 0);
            files.map(|v| v.shmid as u32).chain([mm.exe_file_id])
        });
        let folders = task.fs.iter().flat_map(|fs| [fs.cwd_id, fs.root_id]);
        mapped.chain(folders).map(FileId)
    })
}

fn check_pids(found: &mut Preflight, snapshot: &Snapshot, plan: &Plan) -> Result<()> {
    let deadline = Instant::now() + UNREAPED;
    let leaders = plan.tree.nodes.iter().map(|n| n.pid);
    let others = snapshot.alive().flat_map(|(_, t)| t.threads[1..].iter().copied());
    for pid in leaders.chain(others).chain(plan.dead()) {
        while !is_free(pid) {
            crate::interrupt::check()?;
            let ended = matches!(death(RealPid(pid.0)), Ok(Some(_)));
            if !ended || Instant::now() >= deadline {
                found.add(Area::Pid, Err(taken(pid)));
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    Ok(())
}

/// Extended states that any thread has in use must be known to this processor and kernel.
fn check_cpu(found: &mut Preflight, snapshot: &Snapshot) {
    let host = Layout::host();
    for (_, task) in snapshot.alive() {
        let missing = task.in_use() & !host.features();
        if missing != 0 {
            let e = Error::host(format!(
                "{} uses processor state (XSAVE components {missing:#x}) that this processor lacks",
                task.name()
            ))
            .remedy("restore on a machine with the processor features of the one it was dumped on");
            return found.add(Area::Cpu, Err(e));
        }
    }
}

/// What only images of ours tell.
fn check_more(found: &mut Preflight, snapshot: &Snapshot) {
    let online = affinity::online();
    let mut seals = false;
    let mut keyed = None;
    for (_, task) in snapshot.alive() {
        let Some(more) = &task.more else { continue };
        if keyed.is_none() && keys::needed(Some(more), &task.execute_only) {
            keyed = Some(task.name());
        }
        found.add(Area::Cpu, affinity::check(more, &online).during(|| task.name()));
        seals |= more.has_seals();
    }
    if let Some(name) = keyed
        && !attributes::has_protection_keys()
    {
        let why = format!("{name} uses memory protection keys (pkey_alloc), which processor or kernel lack");
        found.add(Area::Cpu, Err(Error::host(why).remedy("restore on a machine with pku in /proc/cpuinfo")));
    }
    if seals && !attributes::can_seal() {
        found.add(
            Area::Kernel,
            Err(Error::host("memory is sealed (mseal), for which this kernel is too old")),
        );
    }
}

fn check_kernel(found: &mut Preflight, plan: &Plan, kernel: &Kernel) {
    let joins_users = plan.home.entered().has(CloneFlags::CLONE_NEWUSER);
    let others = found.threads > 1 || plan.tree.len() > 1;
    if joins_users && others && !plan.home.kinds().has(CloneFlags::CLONE_NEWPID) {
        let e =
            Error::unsupported("more than one thread in a user namespace that is joined (--join-ns user)")
                .remedy(
                    "its tasks may choose no pid outside of it: dump the tree in a pid namespace of its own",
                );
        found.add(Area::Kernel, Err(e));
    }
    if plan.home.entered().has(CloneFlags::CLONE_NEWPID) && !kernel.clone3_set_tid {
        let e = Error::unsupported("entering a pid namespace needs clone3 with set_tid, of Linux 5.5");
        found.add(Area::Kernel, Err(e));
    } else if !kernel.clone3_set_tid && !std::path::Path::new(crate::restore::fork::LAST_PID).exists() {
        let e =
            Error::host("this kernel lets nobody choose a pid: neither clone3 with set_tid nor ns_last_pid");
        found.add(Area::Kernel, Err(e));
    }
}

/// Raises the bound of pids if the tree has higher ones. A failure is found by [`Preflight::check`].
pub fn raise_pid_max(snapshot: &Snapshot, plan: &Plan) -> Result<()> {
    let highest = highest(snapshot, plan);
    if i64::from(highest) >= number(PID_MAX)? && std::fs::write(PID_MAX, (highest + 1).to_string()).is_ok() {
        log::info!("kernel pid_max pushed to {}", highest + 1);
    }
    Ok(())
}

fn highest(snapshot: &Snapshot, plan: &Plan) -> i32 {
    let tids = snapshot.alive().flat_map(|(_, t)| t.threads.iter().map(|t| t.0));
    plan.tree.nodes.iter().map(|n| n.pid.0).chain(tids).max().unwrap_or(0)
}

fn check_limits(found: &mut Preflight, snapshot: &Snapshot, plan: &Plan) -> Result<()> {
    let highest = highest(snapshot, plan);
    let pid_max = number(PID_MAX)?;
    if i64::from(highest) >= pid_max {
        let e = Error::host(format!("the dump has pid {highest}, here numbers end below {pid_max}"))
            .remedy(format!("sysctl kernel.pid_max={}", highest + 1));
        found.add(Area::Limit, Err(e));
    }
    let threads_max = number("/proc/sys/kernel/threads-max")?;
    if i64::from(found.threads) >= threads_max {
        let e =
            Error::host(format!("the dump has {} threads, here there can be {threads_max}", found.threads))
                .remedy("raise the sysctl kernel.threads-max");
        found.add(Area::Limit, Err(e));
    }
    let maps_max = number("/proc/sys/vm/max_map_count")?;
    for (_, task) in snapshot.alive() {
        let maps = task.mm.as_ref().map_or(0, |mm| mm.vmas.len());
        if maps as i64 > maps_max {
            let e = Error::host(format!("{} has {maps} mappings, here there can be {maps_max}", task.name()))
                .remedy(format!("sysctl vm.max_map_count={}", maps + 64));
            found.add(Area::Limit, Err(e));
        }
    }
    Ok(())
}

fn number(path: &str) -> Result<i64> {
    let text = std::fs::read_to_string(path).call(format!("open({path})"))?;
    text.trim().parse().map_err(|_| Error::host(format!("{path} holds no number: {text}")))
}

/// Whether nobody on this host has this number, as a pid or tid or as that of a process group.
pub fn is_free(pid: VirtPid) -> bool {
    [pid.0, -pid.0].iter().all(|id| kill(Pid::from_raw(*id), None) == Err(Errno::ESRCH))
}

/// The error for a number that is taken: it says by whom.
pub fn taken(pid: VirtPid) -> Error {
    let e = match owner(RealPid(pid.0)) {
        Some(who) => Error::host(format!("pid {pid} is in use by {who}")),
        None => Error::host(format!("pid {pid} is in use as that of the {}", group_of(pid))),
    };
    e.remedy("end that process, or restore into a new pid namespace")
}

/// `process group of sleep (pid 12)`: who lives in a group or session of this number.
fn group_of(pid: VirtPid) -> String {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = processes.filter_map(|e| e.file_name().to_str()?.parse().ok());
    for number in numbers.map(RealPid) {
        let Ok(stat) = ProcDir::open(number).and_then(|dir| Stat::read(&dir)) else { continue };
        let what = match (stat.pgid == pid.0, stat.sid == pid.0) {
            (true, _) => "process group",
            (_, true) => "session",
            _ => continue,
        };
        return format!("{what} of {} (pid {number})", String::from_utf8_lossy(&stat.comm).escape_debug());
    }
    "process group or session of somebody unknown".to_owned()
}

/// `thread 12 of sleep (pid 11)`, `sleep`, `a zombie of ...`.
fn owner(pid: RealPid) -> Option<String> {
    let dir = ProcDir::open(pid).ok()?;
    let stat = Stat::read(&dir).ok()?;
    let comm = String::from_utf8_lossy(&stat.comm).escape_debug().to_string();
    let leader = crate::procfs::status::Status::read(&dir).ok().map(|s| s.tgid).filter(|t| *t != pid.0);
    Some(match (leader, stat.state) {
        (Some(leader), _) => format!("a thread of {comm} (pid {leader})"),
        (None, b'Z' | b'X') => {
            format!("{comm}, which has ended but was not reaped by its parent {}", stat.ppid)
        }
        (None, _) => comm,
    })
}

/// Whether the process has ended: `Some(Some(status))` for one that waits to be reaped, `Some(None)` for one
/// that is gone.
pub fn death(pid: RealPid) -> Result<Option<Option<i32>>> {
    let stat = ProcDir::open(pid).and_then(|dir| Stat::read(&dir));
    match stat {
        Ok(stat) if matches!(stat.state, b'Z' | b'X') => Ok(Some(Some(stat.exit_code))),
        Ok(_) => Ok(None),
        Err(e) if matches!(e.kind(), Kind::TaskDied(_)) => Ok(Some(None)),
        Err(e) => Err(e),
    }
}
