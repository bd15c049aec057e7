//! The kernel's rules for processes: who is whose child, in which session and group, after any call.

use std::collections::BTreeMap;

/// One process, living or waiting to be reaped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Process {
    pub parent: i32,
    pub pgid: i32,
    pub sid: i32,
    pub alive: bool,
    /// PR_SET_CHILD_SUBREAPER.
    pub reaper: bool,
    /// Whether the kernel looks for a reaper above it when it ends: inherited by fork, and handed to all
    /// descendants by the prctl since Linux 4.12.
    pub below_reaper: bool,
}

/// All processes of a machine.
#[derive(Clone, Debug)]
pub(super) struct Kernel {
    pub processes: BTreeMap<i32, Process>,
    /// Before 4.12.
    pub old: bool,
}

/// The process that gets whom no other reaper takes.
pub(super) const INIT: i32 = 1;

type Call = Result<(), &'static str>;

impl Kernel {
    /// A machine with its first process.
    pub fn new(old: bool) -> Kernel {
        let init =
            Process { parent: 0, pgid: INIT, sid: INIT, alive: true, reaper: false, below_reaper: false };
        Kernel { processes: BTreeMap::from([(INIT, init)]), old }
    }

    pub fn at(&self, pid: i32) -> &Process {
        &self.processes[&pid]
    }

    fn change(&mut self, pid: i32) -> &mut Process {
        self.processes.get_mut(&pid).unwrap_or_else(|| panic!("no process {pid}"))
    }

    /// A number stays in use while it is that of a group or session of anybody.
    pub fn is_free(&self, pid: i32) -> bool {
        self.processes.iter().all(|(number, p)| ![*number, p.pgid, p.sid].contains(&pid))
    }

    pub fn fork(&mut self, maker: i32, pid: i32, sibling: bool) -> Call {
        let by = *self.at(maker);
        if !self.is_free(pid) {
            return Err("EEXIST");
        }
        if sibling && maker == INIT {
            return Err("EINVAL");
        }
        let parent = if sibling { by.parent } else { maker };
        let below_reaper = by.below_reaper || by.reaper;
        self.processes.insert(pid, Process { parent, reaper: false, below_reaper, ..by });
        Ok(())
    }

    pub fn setsid(&mut self, pid: i32) -> Call {
        if self.processes.values().any(|p| p.pgid == pid) {
            return Err("EPERM");
        }
        let process = self.change(pid);
        (process.pgid, process.sid) = (pid, pid);
        Ok(())
    }

    /// `caller` is `pid` or its parent.
    pub fn setpgid(&mut self, caller: i32, pid: i32, pgid: i32) -> Call {
        let (by, of) = (*self.at(caller), *self.at(pid));
        if caller != pid && of.parent != caller {
            return Err("ESRCH");
        }
        let exists = || self.processes.values().any(|p| p.pgid == pgid && p.sid == by.sid);
        if of.sid != by.sid || of.sid == pid || (pgid != pid && !exists()) {
            return Err("EPERM");
        }
        self.change(pid).pgid = pgid;
        Ok(())
    }

    pub fn set_reaper(&mut self, pid: i32, on: bool) {
        self.change(pid).reaper = on;
        if on && !self.old {
            let below: Vec<i32> =
                self.processes.keys().copied().filter(|p| *p != pid && self.is_below(*p, pid)).collect();
            below.into_iter().for_each(|p| self.change(p).below_reaper = true);
        }
    }

    pub fn is_below(&self, deep: i32, high: i32) -> bool {
        let mut at = deep;
        while at != 0 && at != high {
            at = self.at(at).parent;
        }
        at == high
    }

    pub fn exit(&mut self, pid: i32) {
        let ended = *self.at(pid);
        let mut to = INIT;
        if ended.below_reaper {
            let mut above = ended.parent;
            while above != 0 && !self.at(above).reaper {
                above = self.at(above).parent;
            }
            to = if above == 0 { INIT } else { above };
        }
        self.change(pid).alive = false;
        self.processes.values_mut().filter(|p| p.parent == pid).for_each(|p| p.parent = to);
        // It reaps whatever comes to it.
        self.processes.retain(|_, p| p.alive || p.parent != INIT);
    }

    pub fn wait(&mut self, parent: i32, child: i32) -> Call {
        match self.processes.get(&child) {
            Some(p) if p.parent != parent => Err("ECHILD"),
            Some(p) if p.alive => Err("nobody has ended"),
            Some(_) => {
                self.processes.remove(&child);
                Ok(())
            }
            None => Err("ECHILD"),
        }
    }
}
