//! Inside a task being rebuilt: what it does, in order, from its birth to the restorer.
//!
//! ```text
//! clocks        of the root, for all: its time namespace
//! memory        before its children are forked: they inherit what they share with it (copy on write)
//! children      those that belong to the session it was born in
//! setsid        if it leads a session; then its controlling terminal
//! children      all others
//! group         waits for whoever makes it
//! -- FORKING reached: everybody exists
//! rounds        tasks that were born deeper than they belong move up
//! end           helpers and zombies; their parents reap helpers
//! -- RESTORE opened: nobody will die any more
//! files, folders, restorer
//! ```

mod close;
mod zombie;

use std::convert::Infallible;
use std::os::fd::RawFd;
use std::sync::atomic::Ordering;

use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use restorer::Stage;

use crate::error::{Context, Error, Result, SysContext};
use crate::faults;
use crate::files::{FilesShared, FilesTask, OpenHow};
use crate::kernel::Kernel;
use crate::mm::{self, lazy::Giver, restore::Prepared};
use crate::options::RestoreOptions;
use crate::procfs;
use crate::pstree::{FileId, RealPid, VirtPid};
use crate::restore::plan::{self, Plan};
use crate::restore::read::{Snapshot, TaskImage, TaskIx};
use crate::restore::stages::Area;
use crate::restore::tree::{Group, Make, Node, Role};
use crate::restore::{
    fork,
    handoff::{self, Leftovers},
    home, rounds,
};
use crate::sys::clone3::Side;
use crate::task::{
    cgroup::{self, Groups},
    fs, keys, more,
};

/// What a task being rebuilt may touch. Everything was there before the fork and is the task's own copy, but
/// for the shared areas.
#[derive(Clone, Copy)]
pub struct TaskCx<'a> {
    /// What was asked for.
    pub opts: &'a RestoreOptions,
    /// What this kernel offers.
    pub kernel: &'a Kernel,
    /// What the images say.
    pub snapshot: &'a Snapshot,
    /// What will be done.
    pub plan: &'a Plan,
    /// Stages and first error.
    pub area: &'a Area,
    /// What tasks share to restore files.
    pub files: &'a FilesShared,
    /// Who serves memory that comes late.
    pub giver: Option<&'a Giver>,
    /// Control groups.
    pub groups: &'a Groups,
    /// What namespaces of the tree's own are made of, if it has any.
    pub home: Option<&'a home::Prepared>,
    /// A folder /proc that knows all tasks, if they need one to the end; under the same number in all of them.
    pub proc: Option<RawFd>,
    /// Which task this is.
    pub task: TaskIx,
}

impl<'a> TaskCx<'a> {
    /// The image of this task. A helper has none.
    pub fn image(&self) -> Result<&'a TaskImage> {
        plan::image(self.snapshot, self.task)
    }

    /// This process in the plan.
    pub fn node(&self) -> &'a Node {
        self.plan.node(self.task)
    }

    /// The files' side of it.
    pub fn files_task(&self) -> Result<FilesTask<'a>> {
        FilesTask::new(
            &self.plan.files,
            self.files,
            &self.snapshot.dir,
            self.opts,
            self.kernel,
            (self.node().pid, self.image().ok().and_then(|image| image.ids.net_ns_id)),
        )
    }

    /// Whether no other process of the tree is there that will fork before this one does: all that made this
    /// one have made nobody else.
    pub fn alone(&self) -> bool {
        let mut at = TaskIx::ROOT;
        while at != self.task {
            match self.plan.node(at).makes.as_slice() {
                [only] => at = only.task,
                _ => return false,
            }
        }
        true
    }

    /// Whether tasks have numbers of their own, in a pid namespace of theirs.
    pub fn apart(&self) -> bool {
        self.plan.home.is_away(CloneFlags::CLONE_NEWPID)
    }

    /// How messages call it.
    pub fn name(&self) -> String {
        self.plan.name(self.snapshot, self.task)
    }
}

/// What a task has got so far, passed on to the children it forks.
struct Begun {
    memory: Prepared,
    /// Its set of control groups.
    groups: u32,
    /// The session keyring it is in; `None` while that is the restoring process's.
    session: Option<u32>,
}

/// The whole life of a new process as far as engine code is concerned. It is born as `cx.task`; when it
/// forks, the child goes on here as another task; `groups` is the set of control groups it is born in. Never returns: it ends in the restorer, or by exit.
pub fn run(mut cx: TaskCx<'_>, memory: Prepared, groups: u32) -> ! {
    let _bomb = Bomb(cx.area);
    let mut inherited = Begun { memory, groups, session: None };
    loop {
        match live(&cx, inherited) {
            Ok((make, begun)) => {
                cx.task = make.task;
                inherited = begun;
            }
            Err(e) => {
                let e = e.during(cx.name());
                log::error!("{e}");
                cx.area.fail(cx.node().pid, &e);
                fork::leave(1)
            }
        }
    }
}

/// A panic must not unwind into what the parent was doing when it forked.
struct Bomb<'a>(&'a Area);

impl Drop for Bomb<'_> {
    fn drop(&mut self) {
        self.0.fail(VirtPid(std::process::id() as i32), &Error::bug("a task panicked, see the log"));
        fork::leave(1)
    }
}

/// Lives `cx.task`. Returns only in a child that was forked, with what it is to become and what it inherits,
/// or with the error that ends this task.
fn live(cx: &TaskCx<'_>, inherited: Begun) -> Result<(Make, Begun)> {
    let node = cx.node();
    be_born(cx)?;
    let mut begun = match node.role {
        Role::Alive => {
            // Before it takes memory: that is charged to the group it is in.
            let groups = enter_groups(cx, inherited.groups)?;
            let more = cx.image()?.more.as_deref();
            let session =
                keys::session::enter(more.and_then(|more| more.session.as_ref()), inherited.session)?;
            Begun { memory: prepare_memory(cx, inherited.memory)?, groups, session }
        }
        // Passes on what it has got: the children it forks may share it with their parent.
        Role::Zombie | Role::Helper => inherited,
    };
    let adopts = node.reaper || adopts_in_the_end(cx)?;
    if adopts {
        adopt_orphans(true)?;
    }
    for make in node.makes.iter().filter(|m| m.before_setsid) {
        begun = match fork_child(cx, make, begun)? {
            Went::Parent(begun) => begun,
            Went::Child(begun) => return Ok((*make, begun)),
        };
    }
    if node.leads_session() {
        log::info!("Restoring {} to {} sid", node.pid, node.sid);
        nix::unistd::setsid().call("setsid")?;
        if node.role == Role::Alive {
            // Children inherit the terminal that controls their parent.
            cx.files_task()?.adopt_terminal()?;
        }
    }
    for make in node.makes.iter().filter(|m| !m.before_setsid) {
        begun = match fork_child(cx, make, begun)? {
            Went::Parent(begun) => begun,
            Went::Child(begun) => return Ok((*make, begun)),
        };
    }
    check_session(node)?;
    join_group(cx)?;
    if adopts {
        // Again in its rounds only, and in the end by the restorer.
        adopt_orphans(false)?;
    }
    cx.area.reach(Stage::Forking);
    cx.area.wait_end()?;
    rounds::take_turns(cx)?;
    reap_helpers(cx)?;
    match node.role {
        Role::Helper => fork::leave(0),
        Role::Zombie => {
            if let Some(giver) = cx.giver {
                giver.ended(cx.area, node.pid)?;
            }
            return Err(zombie::end(cx.image()?));
        }
        Role::Alive => {}
    }
    cx.area.wait_open(Stage::Restore)?;
    // The last one that may come has been dropped unseen; from now on it would disturb.
    fork::block_all_signals()?;
    match finish(cx, begun)? {}
}

/// Whether the task is a subreaper once it runs. Kernels before 4.12 look for one only above processes that were
/// forked below one.
fn adopts_in_the_end(cx: &TaskCx<'_>) -> Result<bool> {
    Ok(cx.node().role == Role::Alive && cx.image()?.tc.child_subreaper.unwrap_or(false))
}

/// Makes this process a subreaper, or none.
pub(super) fn adopt_orphans(on: bool) -> Result<()> {
    nix::sys::prctl::set_child_subreaper(on).call("prctl(PR_SET_CHILD_SUBREAPER)")
}

fn be_born(cx: &TaskCx<'_>) -> Result<()> {
    let node = cx.node();
    // The parent writes it too; but it may be gone before it can, and whoever kills us must know us.
    let me = if cx.apart() { procfs::own_pid()? } else { RealPid(std::process::id().cast_signed()) };
    cx.area.slot(cx.task)?.pid.store(me.0, Ordering::Release);
    if cx.area.failed() {
        return Err(Error::host("another task failed"));
    }
    if node.role == Role::Alive {
        faults::point("restore-task-born")?;
    }
    if let Some(home) = cx.home.filter(|_| cx.task == TaskIx::ROOT) {
        cx.plan.home.settle(cx, home)?;
    }
    // The root is in its own.
    if node.role == Role::Alive && cx.task != TaskIx::ROOT {
        cx.files.spaces().enter(&cx.image()?.ids)?;
    }
    // Before anything is set by a clock, and before there are children: they inherit it.
    let joined = cx.plan.home.entered().has(CloneFlags::from_bits_retain(libc::CLONE_NEWTIME));
    if let Some(clocks) = cx.snapshot.clocks.filter(|_| cx.task == TaskIx::ROOT && !joined) {
        clocks.apply().during(|| "time namespace".into())?;
    }
    Ok(())
}

fn enter_groups(cx: &TaskCx<'_>, born: u32) -> Result<u32> {
    let set = cgroup::set_of(&cx.image()?.core).unwrap_or(born);
    // Who is root in a user namespace only has no right to that: the engine does it.
    let home = &cx.plan.home;
    match (home.is_away(CloneFlags::CLONE_NEWUSER), home.kinds().has(CloneFlags::CLONE_NEWCGROUP)) {
        (true, _) => {}
        (false, true) if cx.task == TaskIx::ROOT => {
            cx.groups.put_at_top(RealPid(0), set)?;
            unshare(CloneFlags::CLONE_NEWCGROUP).call("unshare(CLONE_NEWCGROUP)")?;
            cx.groups.put_from_top(RealPid(0), set)?;
        }
        (false, _) => cx.groups.enter(born, set)?,
    }
    Ok(set)
}

fn prepare_memory(cx: &TaskCx<'_>, inherited: Prepared) -> Result<Prepared> {
    if cx.giver.is_some() {
        // A huge page would bring neighbours along that are to come late.
        nix::sys::prctl::set_thp_disable(true).call("prctl(PR_SET_THP_DISABLE)")?;
    }
    // Before memory is taken: pages are to come from where they were.
    more::enter(cx.snapshot, cx.image()?)?;
    let mut files = cx.files_task()?;
    let mut open = |id: FileId, flags: i32| files.open_path(id, OpenHow { flags });
    // Pages that come late are still to be read.
    let free = cx.opts.common.auto_dedup && cx.giver.is_none();
    let memory =
        mm::restore::prepare(cx.snapshot, cx.image()?, inherited, cx.giver, &mut open, free, cx.alone())?;
    let pages = memory.pages;
    cx.area.count_pages([pages.compared, pages.shared, pages.restored]);
    Ok(memory)
}

enum Went {
    Parent(Begun),
    Child(Begun),
}

fn fork_child(cx: &TaskCx<'_>, make: &Make, begun: Begun) -> Result<Went> {
    if cx.area.failed() {
        return Err(Error::host("another task failed"));
    }
    Ok(match fork::fork_node(make, cx.plan.node(make.task), cx.area, cx.kernel, (0, cx.apart()))? {
        Side::Parent(_) => Went::Parent(begun),
        Side::Child => Went::Child(begun),
    })
}

fn check_session(node: &Node) -> Result<()> {
    let sid = nix::unistd::getsid(None).call("getsid")?;
    if sid.as_raw() != node.sid.0 {
        return Err(Error::bug(format!("it came into session {sid} instead of {}", node.sid)));
    }
    Ok(())
}

fn join_group(cx: &TaskCx<'_>) -> Result<()> {
    let node = cx.node();
    let me = Pid::from_raw(0);
    let join = |pgid: VirtPid| {
        if nix::unistd::getpgrp().as_raw() == pgid.0 {
            return Ok(());
        }
        log::info!("Restoring {} to {pgid} pgid", node.pid);
        nix::unistd::setpgid(me, Pid::from_raw(pgid.0))
            .call("setpgid")
            .during(|| format!("process group {pgid}"))
    };
    let join_that_of = |leader: TaskIx| {
        cx.area.wait_group(leader)?;
        join(cx.plan.node(leader).pid)?;
        cx.area.group_joined(leader)
    };
    match node.group {
        Group::Born if node.pgid == node.pid => cx.area.group_made(cx.task),
        Group::Born => Ok(()),
        Group::Own => {
            join(node.pid)?;
            cx.area.group_made(cx.task)
        }
        Group::Of(leader) => join_that_of(leader),
        Group::Outside => join(node.pgid),
        Group::Leave { joiners, to } => {
            join(node.pid)?;
            cx.area.group_made(cx.task)?;
            cx.area.wait_joined(cx.task, joiners)?;
            to.map_or_else(|| join(node.pgid), join_that_of)
        }
    }
}

fn reap_helpers(cx: &TaskCx<'_>) -> Result<()> {
    for helper in &cx.node().helpers {
        let pid = cx.plan.node(*helper).pid;
        waitpid(Pid::from_raw(pid.0), Some(WaitPidFlag::__WALL))
            .call("waitpid")
            .during(|| format!("helper {pid}"))?;
    }
    cx.area.strays(cx.task).try_for_each(|pid| fork::reap(pid).during(|| format!("process {pid}")))
}

/// Everything that is the task's own, then the jump.
fn finish(cx: &TaskCx<'_>, begun: Begun) -> Result<Infallible> {
    let mut files = cx.files_task()?;
    files.restore()?;
    faults::point("restore-task-files")?;
    let mm = cx.image()?.mm.as_ref().ok_or_else(|| Error::bug("a living task without memory"))?;
    let exe = files
        .open_path(FileId(mm.exe_file_id), OpenHow { flags: libc::O_RDONLY })
        .during(|| "executable".into())?;
    let folders = fs::open(cx, &mut files)?;
    let late = files.into_late();
    let close = close::not_of_the_task(cx)?;
    let uffd = cx.giver.map(|giver| giver.give(cx.area, cx.node().pid)).transpose()?;
    let mounts = cx.image()?.ids.mnt_ns_id;
    let enter = || {
        cx.home.map_or(Ok(()), |home| home.enter_mounts(mounts))?;
        folders.enter()
    };
    handoff::jump(cx, begun.memory, Leftovers { exe, uffd, close, late }, enter)
}
