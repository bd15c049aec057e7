//! A plan carried out under the kernel's rules, by tasks that run in any order: each does what
//! `restore::task` does, one call at a time.

use std::collections::{BTreeMap, VecDeque};

use super::history::Random;
use super::kernel::{INIT, Kernel, Process};
use crate::pstree::VirtPid;
use crate::restore::read::TaskIx;
use crate::restore::tree::{Group, Make, Outside, Role, Tree};

/// The engine's own process.
pub(super) const ENGINE: i32 = 60;
/// The shell it was started from.
const SHELL: i32 = 50;

pub(super) const OUTSIDE: Outside = Outside { sid: VirtPid(SHELL), pgid: VirtPid(ENGINE), shell_job: false };

enum Step {
    Reaper(bool),
    Fork(Make),
    Setsid,
    Check,
    /// Waits until a node has made the group of its number.
    WaitGroup(TaskIx),
    Join(VirtPid),
    Made,
    Joined(TaskIx),
    WaitJoined(u32),
    Reap(TaskIx),
    End,
}

#[derive(Default)]
struct Progress {
    steps: VecDeque<Step>,
    made: bool,
    joined: u32,
}

/// What comes of the plan. `reapers` are those that are subreapers in the end.
///
/// # Errors
/// Whichever call fails, or who would wait for ever.
pub(super) fn act(
    tree: &Tree,
    old: bool,
    reapers: &[VirtPid],
    random: &mut Random,
) -> Result<BTreeMap<i32, Process>, String> {
    let mut kernel = Kernel::new(old);
    for (maker, pid) in [(INIT, SHELL), (SHELL, ENGINE)] {
        kernel.fork(maker, pid, false)?;
    }
    kernel.setsid(SHELL)?;
    kernel.processes.get_mut(&ENGINE).ok_or("no engine")?.sid = SHELL;
    kernel.setpgid(ENGINE, ENGINE, ENGINE)?;
    kernel.set_reaper(ENGINE, true);
    let pid = |ix: TaskIx| tree.node(ix).pid.0;
    kernel.fork(ENGINE, pid(TaskIx::ROOT), false)?;

    let mut all: Vec<Progress> = tree.nodes.iter().map(|_| Progress::default()).collect();
    all[0].steps = until_forked(tree, TaskIx::ROOT, reapers);
    run(tree, &mut kernel, &mut all, reapers, random)?;
    for (i, node) in tree.nodes.iter().enumerate() {
        match kernel.processes.get(&node.pid.0) {
            Some(p) if p.alive => {}
            _ => return Err(format!("node {i} ({}) was not made", node.pid)),
        }
    }
    for round in &tree.rounds {
        kernel.set_reaper(pid(round.reaper), true);
        kernel.exit(pid(round.helper));
        kernel.wait(pid(round.parent), pid(round.helper))?;
        kernel.set_reaper(pid(round.reaper), false);
    }
    let passed: Vec<TaskIx> = tree.rounds.iter().map(|r| r.helper).collect();
    for (i, progress) in all.iter_mut().enumerate().filter(|(i, _)| !passed.contains(&TaskIx(*i as u32))) {
        let node = &tree.nodes[i];
        progress.steps.extend(node.helpers.iter().map(|h| Step::Reap(*h)));
        if node.role != Role::Alive {
            progress.steps.push_back(Step::End);
        }
    }
    run(tree, &mut kernel, &mut all, reapers, random)?;
    if let Some((pid, _)) = kernel.processes.iter().find(|(pid, p)| p.reaper && **pid != ENGINE) {
        return Err(format!("{pid} is still a reaper"));
    }
    reapers.iter().for_each(|pid| kernel.set_reaper(pid.0, true));
    for pid in [INIT, SHELL, ENGINE] {
        kernel.processes.remove(&pid);
    }
    Ok(kernel.processes)
}

fn until_forked(tree: &Tree, ix: TaskIx, reapers: &[VirtPid]) -> VecDeque<Step> {
    let node = tree.node(ix);
    let adopts = node.reaper || reapers.contains(&node.pid);
    let forks =
        |before: bool| node.makes.iter().filter(move |m| m.before_setsid == before).map(|m| Step::Fork(*m));
    let mut steps = VecDeque::new();
    steps.extend(adopts.then_some(Step::Reaper(true)));
    steps.extend(forks(true));
    steps.extend(node.leads_session().then_some(Step::Setsid));
    steps.extend(forks(false));
    steps.push_back(Step::Check);
    let join = |leader| [Step::WaitGroup(leader), Step::Join(tree.node(leader).pid), Step::Joined(leader)];
    match node.group {
        Group::Born if node.pgid == node.pid => steps.push_back(Step::Made),
        Group::Born => {}
        Group::Own => steps.extend([Step::Join(node.pid), Step::Made]),
        Group::Of(leader) => steps.extend(join(leader)),
        Group::Outside => steps.push_back(Step::Join(node.pgid)),
        Group::Leave { joiners, to } => {
            steps.extend([Step::Join(node.pid), Step::Made, Step::WaitJoined(joiners)]);
            match to {
                Some(to) => steps.extend(join(to)),
                None => steps.push_back(Step::Join(node.pgid)),
            }
        }
    }
    steps.extend(adopts.then_some(Step::Reaper(false)));
    steps
}

/// Lets tasks do their steps in random order until none has one left.
fn run(
    tree: &Tree,
    kernel: &mut Kernel,
    all: &mut [Progress],
    reapers: &[VirtPid],
    random: &mut Random,
) -> Result<(), String> {
    let mut open: Vec<usize> = (0..all.len()).filter(|i| !all[*i].steps.is_empty()).collect();
    let mut idle = 0;
    while !open.is_empty() {
        let pick = random.below(open.len());
        let at = open[pick];
        if ready(tree, kernel, all, at) {
            idle = 0;
        } else {
            idle += 1;
            if idle > 64 && !open.iter().any(|i| ready(tree, kernel, all, *i)) {
                let who: Vec<_> = open.iter().map(|i| tree.nodes[*i].pid).collect();
                return Err(format!("{who:?} wait for ever"));
            }
            continue;
        }
        let node = &tree.nodes[at];
        let me = node.pid.0;
        let named = |call: &str, e: &str| format!("{call} of {me}: {e}");
        match all[at].steps.pop_front() {
            Some(Step::Reaper(on)) => kernel.set_reaper(me, on),
            Some(Step::Fork(make)) => {
                kernel
                    .fork(me, tree.node(make.task).pid.0, make.sibling)
                    .map_err(|e| format!("{} {:?}", named("fork", e), make))?;
                let child = make.task.at();
                all[child].steps = until_forked(tree, make.task, reapers);
                if !all[child].steps.is_empty() {
                    open.push(child);
                }
            }
            Some(Step::Setsid) => kernel.setsid(me).map_err(|e| named("setsid", e))?,
            Some(Step::Check) if kernel.at(me).sid != node.sid.0 => {
                return Err(format!("{me} is in session {} instead of {}", kernel.at(me).sid, node.sid));
            }
            Some(Step::Join(pgid)) if kernel.at(me).pgid != pgid.0 => {
                kernel.setpgid(me, me, pgid.0).map_err(|e| named("setpgid", e))?;
            }
            Some(Step::Made) => all[at].made = true,
            Some(Step::Joined(leader)) => all[leader.at()].joined += 1,
            Some(Step::Reap(helper)) => {
                kernel.wait(me, tree.node(helper).pid.0).map_err(|e| named("wait", e))?;
            }
            Some(Step::End) => kernel.exit(me),
            _ => {}
        }
        if all[at].steps.is_empty() {
            open.retain(|i| *i != at);
        }
    }
    Ok(())
}

fn ready(tree: &Tree, kernel: &Kernel, all: &[Progress], at: usize) -> bool {
    match all[at].steps.front() {
        Some(Step::WaitGroup(leader)) => all[leader.at()].made,
        Some(Step::WaitJoined(joiners)) => all[at].joined >= *joiners,
        Some(Step::Reap(helper)) => {
            // One that is not there at all is an error to find, not to wait for.
            kernel.processes.get(&tree.node(*helper).pid.0).is_none_or(|p| !p.alive)
        }
        _ => true,
    }
}
