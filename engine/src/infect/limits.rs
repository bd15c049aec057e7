//! Limits that could keep a process from mapping the parasite: raised for the moment it takes.

use crate::{
    error::{Error, Result},
    pstree::RealPid,
    sys::rlimit::{self, INFINITY, Rlimit},
};

/// What mmap(2) and mprotect(2) are checked against: data, locked memory, address space.
const RESOURCES: [(u32, &str); 3] = [(2, "RLIMIT_DATA"), (8, "RLIMIT_MEMLOCK"), (9, "RLIMIT_AS")];

/// Soft limits of a process as high as they go; put back on drop.
#[derive(Debug)]
pub(super) struct Raised {
    pid: RealPid,
    before: Vec<(u32, Rlimit)>,
}

impl Raised {
    /// Raises them: to no limit where we may, to the hard limit otherwise.
    pub(super) fn new(pid: RealPid) -> Result<Self> {
        let mut raised = Raised { pid, before: Vec::new() };
        for (resource, _) in RESOURCES {
            let old = rlimit::get(pid, resource)?;
            if old.soft == INFINITY {
                continue;
            }
            let none = Rlimit { soft: INFINITY, hard: INFINITY };
            let done = match rlimit::set(pid, resource, none) {
                Err(e) if e.errno() == Some(libc::EPERM) && old.soft < old.hard => {
                    rlimit::set(pid, resource, Rlimit { soft: old.hard, ..old })
                }
                other => other,
            };
            match done {
                Ok(_) => raised.before.push((resource, old)),
                // At its hard limit already, and we lack CAP_SYS_RESOURCE.
                Err(e) if e.errno() == Some(libc::EPERM) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(raised)
    }

    /// What to tell when mapping failed all the same.
    pub(super) fn explain(pid: RealPid, e: Error) -> Error {
        // What locks all its memory fails with EAGAIN.
        let locked = e.errno() == Some(libc::EAGAIN);
        let tight: Vec<_> = RESOURCES
            .iter()
            .filter(|(_, name)| locked == (*name == "RLIMIT_MEMLOCK"))
            .filter(|(r, _)| rlimit::get(pid, *r).is_ok_and(|l| l.hard != INFINITY))
            .map(|(_, name)| *name)
            .collect();
        if tight.is_empty() {
            e.remedy("raise vm.max_map_count, or vm.overcommit_ratio under strict accounting")
        } else {
            e.remedy(format!("raise the hard {} of the process with prlimit(1)", tight.join(", ")))
        }
    }
}

impl Drop for Raised {
    fn drop(&mut self) {
        for (resource, old) in self.before.drain(..) {
            if let Err(e) = rlimit::set(self.pid, resource, old) {
                log::error!("limit {resource} of task {} can't be put back: {e}", self.pid);
            }
        }
    }
}
