//! Trees with a history: processes fork, fork siblings, lead sessions and groups, become reapers, end and are waited
//! for, one step after the other, as the first process says. `history between` and its like live through steps
//! written down here, `history SEED STEPS` through random ones.
//!
//! # Safety
//!
//! clone(2) is called while the process has one thread, without shared memory. The slots are in shared memory that is
//! never unmapped and hold nothing but atomics. Members end by _exit(2).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::prctl::{get_child_subreaper, set_child_subreaper};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, setpgid, setsid};

use crate::kit::{Check, mem, number, rest, same, sys};

/// Members there can be in a history.
const SLOTS: usize = 96;

/// What one member does; others are named by the order of their births, the first process is 0.
#[derive(Clone, Copy, Debug)]
enum Step {
    Fork,
    /// CLONE_PARENT.
    ForkSibling,
    Setsid,
    /// Joins the group of that number, or makes its own.
    Setpgid(i32),
    Reap(bool),
    /// Waits for a child that has ended.
    Wait(i32),
    End,
}

/// Written by the first process, then by the member, in turn.
#[repr(C)]
struct Slot {
    /// 1 while there is something to do. A futex word.
    asked: AtomicU32,
    step: AtomicU32,
    argument: AtomicU32,
    /// What came of it: a pid, 0, or an error below 0.
    answer: AtomicU32,
    /// One more than the number of answers. A futex word.
    answered: AtomicU32,
    pid: AtomicU32,
}

#[derive(Clone, Copy)]
struct Slots(mem::Mapping);

/// Waits until `word` is not `value`.
fn wait_change(word: &AtomicU32, value: u32) {
    while word.load(Ordering::Acquire) == value {
        // SAFETY: a word that stays mapped, and no timeout.
        unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, value, 0, 0, 0) };
    }
}

fn wake(word: &AtomicU32) {
    // SAFETY: a word that stays mapped.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX, 0, 0, 0) };
}

impl Slots {
    fn at(&self, id: usize) -> &Slot {
        assert!(id < SLOTS);
        // SAFETY: inside the mapping, which holds this many, zeroed, and lives as long as the process.
        unsafe { &*(self.0.at as *const Slot).add(id) }
    }

    /// Life of a member: it does what it is asked.
    fn live(self, mut id: usize) -> ! {
        loop {
            let slot = self.at(id);
            wait_change(&slot.asked, 0);
            slot.asked.store(0, Ordering::Release);
            let argument = slot.argument.load(Ordering::Relaxed);
            let answer = match slot.step.load(Ordering::Relaxed) {
                step @ (0 | 1) => match fork(step == 1) {
                    Ok(0) => {
                        id = argument as usize;
                        continue;
                    }
                    Ok(pid) => pid,
                    Err(e) => -(e as i32),
                },
                2 => setsid().map_or_else(|e| -(e as i32), |_| 0),
                3 => setpgid(Pid::from_raw(0), Pid::from_raw(argument.cast_signed()))
                    .map_or_else(|e| -(e as i32), |()| 0),
                4 => set_child_subreaper(argument == 1).map_or_else(|e| -(e as i32), |()| 0),
                5 => reap(argument.cast_signed()).map_or_else(|e| -(e as i32), |()| 0),
                // SAFETY: ends the process. Whoever asked sees it by its state.
                6 => unsafe { libc::_exit(id as i32) },
                _ => get_child_subreaper().map_or_else(|e| -(e as i32), i32::from),
            };
            slot.answer.store(answer.cast_unsigned(), Ordering::Relaxed);
            slot.answered.fetch_add(1, Ordering::Release);
            wake(&slot.answered);
        }
    }
}

fn fork(sibling: bool) -> nix::Result<i32> {
    let flags = libc::SIGCHLD | if sibling { libc::CLONE_PARENT } else { 0 };
    // SAFETY: one thread; without CLONE_VM a null stack means a copy of ours.
    Errno::result(unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) }).map(|pid| pid as i32)
}

fn reap(pid: i32) -> nix::Result<()> {
    nix::sys::wait::waitpid(Pid::from_raw(pid), None).map(drop)
}

/// What /proc says of a process: state, parent, group, session.
fn seen(pid: i32) -> Result<(char, i32, i32, i32)> {
    let text =
        std::fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("member {pid}"))?;
    let fields: Vec<&str> = text.rsplit_once(") ").context("stat")?.1.split(' ').collect();
    let number = |at: usize| fields[at].parse::<i32>().context("stat");
    let state = if fields[0].starts_with('Z') { 'Z' } else { 'L' };
    Ok((state, number(1)?, number(2)?, number(3)?))
}

/// State, parent, group and session of a process, and whether it is a reaper.
type Seen = ((char, i32, i32, i32), bool);

/// The first process, which knows all others.
struct Crew {
    slots: Slots,
    born: usize,
    /// Those that live, and those that wait to be reaped, with their pids.
    living: BTreeMap<usize, i32>,
    dead: BTreeMap<usize, i32>,
}

impl Crew {
    fn new() -> Result<Crew> {
        set_child_subreaper(true).context("PR_SET_CHILD_SUBREAPER")?;
        let slots = Slots(mem::shared((SLOTS * size_of::<Slot>()).next_multiple_of(mem::PAGE))?);
        Ok(Crew {
            slots,
            born: 1,
            living: BTreeMap::from([(0, Pid::this().as_raw())]),
            dead: BTreeMap::new(),
        })
    }

    /// Has a member do a step, and waits until it has.
    fn ask(&self, id: usize, step: u32, argument: i32) -> i32 {
        let slot = self.slots.at(id);
        let before = slot.answered.load(Ordering::Acquire);
        slot.step.store(step, Ordering::Relaxed);
        slot.argument.store(argument.cast_unsigned(), Ordering::Relaxed);
        slot.asked.store(1, Ordering::Release);
        wake(&slot.asked);
        if step != 6 {
            wait_change(&slot.answered, before);
        }
        slot.answer.load(Ordering::Relaxed).cast_signed()
    }

    /// Gives what came of it: 0 or more, or an error below 0.
    fn step(&mut self, id: usize, step: Step) -> Result<i32> {
        let answer = match step {
            Step::Fork | Step::ForkSibling => {
                let born = self.born;
                let pid = match id {
                    0 => match fork(false).context("fork")? {
                        0 => self.slots.live(born),
                        pid => pid,
                    },
                    _ => self.ask(id, u32::from(matches!(step, Step::ForkSibling)), born as i32),
                };
                if pid > 0 {
                    self.living.insert(born, pid);
                    self.born += 1;
                }
                pid
            }
            Step::Setsid => self.ask(id, 2, 0),
            Step::Setpgid(to) => self.ask(id, 3, to),
            Step::Reap(on) => self.ask(id, 4, i32::from(on)),
            Step::Wait(pid) => {
                let answer = match id {
                    0 => reap(pid).map_or_else(|e| -(e as i32), |()| 0),
                    _ => self.ask(id, 5, pid),
                };
                self.dead.retain(|_, dead| answer != 0 || *dead != pid);
                answer
            }
            Step::End => {
                let pid = self.living.remove(&id).context("it has ended")?;
                self.ask(id, 6, 0);
                while seen(pid)?.0 != 'Z' {
                    std::thread::yield_now();
                }
                self.dead.insert(id, pid);
                0
            }
        };
        Ok(answer)
    }

    /// What is to stay: for each its state, parent, group, session, and whether it is a reaper.
    fn all(&self) -> Result<BTreeMap<usize, Seen>> {
        let reaps = |id: usize| id > 0 && self.living.contains_key(&id) && self.ask(id, 7, 0) == 1;
        self.living
            .iter()
            .chain(&self.dead)
            .filter(|(id, _)| **id > 0)
            .map(|(id, pid)| Ok((*id, (seen(*pid)?, reaps(*id)))))
            .collect()
    }

    /// Rests, finds everything as it was, and ends all.
    fn hold(mut self) -> Check {
        let before = self.all()?;
        rest()?;
        let after = self.all()?;
        for (id, before) in &before {
            let what = format!("(state, parent, group, session) and reaper of member {id}");
            same(&what, after.get(id), Some(before))?;
        }
        // Those below before those above would take a walk; who is orphaned by this comes to us in the end.
        for pid in std::mem::take(&mut self.living).into_values().skip(1) {
            kill(Pid::from_raw(pid), Signal::SIGKILL).context("kill")?;
        }
        loop {
            match nix::sys::wait::wait() {
                Err(Errno::ECHILD) => return Ok(()),
                Err(Errno::EINTR) | Ok(_) => {}
                Err(e) => return Err(e).context("wait"),
            }
        }
    }
}

/// The same numbers for the same seed.
fn random(seed: &mut u64) -> usize {
    *seed += 1;
    (mem::word(*seed, 0) >> 16) as usize
}

fn lived(seed: usize, steps: usize) -> Result<Crew> {
    let mut crew = Crew::new()?;
    let mut seed = (seed as u64) << 32;
    crew.step(0, Step::Fork)?;
    for _ in 0..steps {
        let living: Vec<usize> = crew.living.keys().copied().collect();
        let recent = living.len().div_ceil(4);
        let id = match random(&mut seed) % 10 {
            0..=6 => living[living.len() - 1 - random(&mut seed) % recent],
            _ => living[random(&mut seed) % living.len()],
        };
        let what = random(&mut seed) % 34;
        let step = match what {
            0..=9 if crew.born < SLOTS => match what < 4 && id != 0 {
                true => Step::ForkSibling,
                false => Step::Fork,
            },
            10..=16 => Step::Setsid,
            17 => Step::Setpgid(0),
            18 => {
                let of = living[random(&mut seed) % living.len()];
                Step::Setpgid(seen(crew.living[&of])?.2)
            }
            19..=22 => Step::End,
            23..=25 => match crew.dead.values().copied().nth(random(&mut seed) % 8) {
                Some(pid) => {
                    let parent = seen(pid)?.1;
                    let Some(id) = crew.living.iter().find(|(_, pid)| **pid == parent).map(|(id, _)| *id)
                    else {
                        bail!("{pid} has come to {parent}, who is none of us");
                    };
                    crew.step(id, Step::Wait(pid))?;
                    continue;
                }
                None => continue,
            },
            _ => Step::Reap(what.is_multiple_of(2)),
        };
        let first_may = matches!(step, Step::Fork);
        if id != 0 || first_may {
            // That the kernel refuses some is part of life.
            crew.step(id, step)?;
        }
    }
    Ok(crew)
}

/// A leader has a child in the session of another leader, which has one in the first session, while the first of them
/// is a child of none of them: each was born in the session of its child.
fn between(crew: &mut Crew) -> Check {
    use Step::{End, Fork, Reap, Setsid, Wait};
    let steps = [
        (0, Fork), // 1, parent of 6 in the end
        (1, Fork), // 2
        (2, Fork), // 3, which leads a session
        (3, Fork), // 4, in the first session
        (3, Setsid),
        (3, Fork), // 5
        (5, Fork), // 6, which leads one, too
        (6, Fork), // 7, in the session of 3
        (6, Setsid),
        (1, Reap(true)),
        (5, End),
        (1, Reap(false)),
        (2, End),
    ];
    play(crew, &steps)?;
    let dead: Vec<(usize, i32)> = crew.dead.iter().map(|(id, pid)| (*id, *pid)).collect();
    for ((_, pid), parent) in dead.into_iter().zip([1, 3]) {
        play(crew, &[(parent, Wait(pid))])?;
    }
    let pid = |id: usize| crew.living[&id];
    let place = |id: usize| seen(pid(id)).map(|(_, parent, _, session)| (parent, session));
    let first = sys("getsid", nix::unistd::getsid(None)?.as_raw())?;
    for (id, parent, session) in
        [(3, pid(0), pid(3)), (4, pid(3), first), (6, pid(1), pid(6)), (7, pid(6), pid(3))]
    {
        same(&format!("(parent, session) of {id}"), place(id)?, (parent, session))?;
    }
    Ok(())
}

/// Two that have left the groups of their own numbers for each other's, and one that has left its for ours.
fn swapped(crew: &mut Crew) -> Check {
    use Step::{End, Fork, Setpgid};
    let ours = nix::unistd::getpgrp().as_raw();
    play(crew, &[(0, Fork), (0, Fork), (0, Fork), (1, Setpgid(0)), (2, Setpgid(0))])?;
    let (one, two) = (crew.living[&1], crew.living[&2]);
    play(crew, &[(3, Setpgid(one)), (1, Setpgid(two)), (2, Setpgid(one)), (3, End)])?;
    let dead = crew.dead[&3];
    play(crew, &[(0, Step::Wait(dead)), (0, Fork), (4, Setpgid(0)), (4, Fork), (4, Setpgid(ours))])?;
    let group = |id: usize| seen(crew.living[&id]).map(|(_, _, group, _)| group);
    same("groups", (group(1)?, group(2)?, group(4)?), (two, one, ours))?;
    same("group of 5", group(5)?, crew.living[&4])
}

/// A leader with a child in the session of its parent.
fn above(crew: &mut Crew) -> Check {
    play(crew, &[(0, Step::Fork), (1, Step::Fork), (1, Step::Setsid)])
}

/// Lives through steps none of which may be refused.
fn play(crew: &mut Crew, steps: &[(usize, Step)]) -> Check {
    for (id, step) in steps {
        let answer = crew.step(*id, *step)?;
        if answer < 0 {
            bail!("{step:?} of member {id}: {}", Errno::from_raw(-answer));
        }
    }
    Ok(())
}

/// See the module.
pub fn run(args: &[String]) -> Check {
    let written = match args.first().map(String::as_str) {
        Some("between") => between,
        Some("swapped") => swapped,
        Some("above") => above,
        _ => return lived(number(args, 0, 1)?, number(args, 1, 150)?)?.hold(),
    };
    let mut crew = Crew::new()?;
    written(&mut crew)?;
    crew.hold()
}
