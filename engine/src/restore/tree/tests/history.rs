//! Random histories of a process tree, and what a dump would tell of it in the end.

use super::kernel::{INIT, Kernel};
use crate::pstree::VirtPid;
use crate::restore::read::TaskIx;
use crate::restore::tree::Member;

/// The same numbers for the same seed (splitmix64).
pub(super) struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

/// What happens how often.
#[derive(Clone, Copy, Debug)]
pub(super) struct Weights {
    pub fork: usize,
    pub sibling: usize,
    pub setsid: usize,
    pub setpgid: usize,
    pub exit: usize,
    pub wait: usize,
    pub reaper: usize,
    /// Of 10 choices, how many fall on the tasks made last.
    pub late: usize,
}

/// The shell that the tree was started from.
const SHELL: i32 = 30;
/// The first one made.
const ROOT: i32 = 1000;

/// A tree that lived.
pub(super) struct Lived {
    pub kernel: Kernel,
    /// Its root: of some histories one that was made in them.
    pub root: i32,
}

/// Lives through `steps` random events.
pub(super) fn live(random: &mut Random, weights: Weights, steps: usize, old: bool) -> Lived {
    let mut kernel = Kernel::new(old);
    kernel.fork(INIT, SHELL, false).unwrap();
    kernel.setsid(SHELL).unwrap();
    kernel.fork(SHELL, ROOT, false).unwrap();
    if random.below(4) > 0 {
        kernel.setsid(ROOT).unwrap();
    }
    if random.below(3) > 0 {
        kernel.set_reaper(ROOT, true);
    }
    let mut next = ROOT + 1;
    let mut made = vec![ROOT];
    let w = weights;
    let kinds = [w.fork, w.sibling, w.setsid, w.setpgid, w.exit, w.wait, w.reaper];
    for _ in 0..steps {
        let mut at = random.below(kinds.iter().sum());
        let what = kinds
            .iter()
            .position(|k| {
                at < *k || {
                    at -= *k;
                    false
                }
            })
            .unwrap_or(0);
        let living: Vec<i32> =
            made.iter().copied().filter(|p| kernel.processes.get(p).is_some_and(|p| p.alive)).collect();
        let recent = living.len().div_ceil(4);
        let pid = match random.below(10) < w.late {
            true => living[living.len() - 1 - random.below(recent)],
            false => living[random.below(living.len())],
        };
        // Refused calls are part of life, too.
        let _ = match what {
            0 | 1 => {
                let sibling = what == 1 && pid != ROOT;
                made.push(next);
                next += 1;
                kernel.fork(pid, next - 1, sibling)
            }
            2 => kernel.setsid(pid),
            3 => {
                let children: Vec<i32> =
                    living.iter().copied().filter(|p| kernel.at(*p).parent == pid).collect();
                let of = match random.below(4) {
                    0 if !children.is_empty() => children[random.below(children.len())],
                    _ => pid,
                };
                let into = match random.below(2) {
                    0 => of,
                    _ => kernel.at(living[random.below(living.len())]).pgid,
                };
                kernel.setpgid(pid, of, into)
            }
            4 if pid != ROOT => {
                kernel.exit(pid);
                Ok(())
            }
            5 => {
                let dead: Vec<i32> =
                    kernel.processes.iter().filter(|(_, p)| !p.alive).map(|(pid, _)| *pid).collect();
                match dead.is_empty() {
                    true => Ok(()),
                    false => {
                        let child = dead[random.below(dead.len())];
                        kernel.wait(kernel.at(child).parent, child)
                    }
                }
            }
            6 => {
                kernel.set_reaper(pid, random.below(2) == 0);
                Ok(())
            }
            _ => Ok(()),
        };
    }
    made.retain(|p| kernel.processes.get(p).is_some_and(|p| p.alive));
    let root = match random.below(4) {
        0 => made[random.below(made.len().min(8))],
        _ => ROOT,
    };
    Lived { kernel, root }
}

impl Lived {
    /// What images tell: parents before children.
    pub fn members(&self) -> Vec<Member> {
        let mut order = vec![(self.root, None)];
        let mut at = 0;
        while at < order.len() {
            let (parent, _) = order[at];
            let children = self.kernel.processes.iter().filter(|(_, p)| p.parent == parent);
            order.extend(children.map(|(pid, _)| (*pid, Some(TaskIx(at as u32)))));
            at += 1;
        }
        let member = |(i, (pid, parent)): (usize, &(i32, Option<TaskIx>))| {
            let process = self.kernel.at(*pid);
            Member {
                pid: VirtPid(*pid),
                parent: *parent,
                pgid: VirtPid(process.pgid),
                sid: VirtPid(process.sid),
                other_tids: Vec::new(),
                alive: process.alive,
                files: i as u32 + 1,
                fs: i as u32 + 1,
                vm: i as u32 + 1,
            }
        };
        order.iter().enumerate().map(member).collect()
    }
}
