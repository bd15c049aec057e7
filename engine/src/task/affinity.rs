//! CPUs a thread is bound to.
//!
//! The kernel tells only which CPUs a thread may use, not whether somebody asked for that: a thread that may use
//! all that its control group allows counts as unbound, so that it can go to a machine or a group with other
//! CPUs.

use std::collections::HashMap;

use rcriu_images::pb;

use crate::{
    error::{Context, Error, Result},
    procfs::{ProcDir, cgroup, number, status::Status, trim},
    pstree::RealPid,
    sys::sched,
};

/// A set of CPUs: bit 0 of byte 0 is CPU 0. No zero bytes at the end.
pub type Mask = Vec<u8>;

/// What threads may use without having been bound.
#[derive(Debug)]
pub struct Allowed {
    possible: Mask,
    /// By path of the control group, as /proc/PID/cgroup has it.
    groups: HashMap<(String, Vec<u8>), Option<Mask>>,
}

impl Allowed {
    /// Asks the kernel for its CPUs.
    pub fn ask() -> Allowed {
        let path = "/sys/devices/system/cpu/possible";
        Allowed { possible: read_list(path).unwrap_or_default(), groups: HashMap::new() }
    }

    /// Whether `mask` is all that the thread may use whose folder `dir` opens.
    fn is_all(&mut self, mask: &[u8], dir: impl FnOnce() -> Result<ProcDir>) -> Result<bool> {
        if self.possible.is_empty() || mask == self.possible {
            return Ok(true);
        }
        for member in cgroup::read(&dir()?)? {
            let unified = member.controllers.is_empty();
            if !unified && !member.controllers.split(',').any(|c| c == "cpuset") {
                continue;
            }
            let found = self
                .groups
                .entry((member.controllers.clone(), member.path.clone()))
                .or_insert_with(|| group_cpus(&member.path, unified));
            if found.as_deref() == Some(mask) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// CPUs of a control group, or of the nearest one above that says any.
fn group_cpus(path: &[u8], unified: bool) -> Option<Mask> {
    let (roots, file): (&[&str], _) = match unified {
        true => (&["/sys/fs/cgroup", "/sys/fs/cgroup/unified"], "cpuset.cpus.effective"),
        false => (&["/sys/fs/cgroup/cpuset"], "cpuset.effective_cpus"),
    };
    let path = String::from_utf8_lossy(path);
    roots.iter().find_map(|root| {
        let mut at = path.trim_end_matches('/');
        loop {
            if let Some(mask) = read_list(&format!("{root}{at}/{file}")) {
                return Some(mask);
            }
            at = &at[..at.rfind('/')?];
        }
    })
}

fn read_list(path: &str) -> Option<Mask> {
    parse_list(&std::fs::read(path).ok()?)
}

/// `0-3,8`
fn parse_list(text: &[u8]) -> Option<Mask> {
    let mut mask = Mask::new();
    for part in trim(text).split(|c| *c == b',').filter(|p| !p.is_empty()) {
        let mut ends = part.splitn(2, |c| *c == b'-');
        let first: usize = number(ends.next()?)?;
        let last: usize = ends.next().map_or(Some(first), number)?;
        // No kernel has more.
        if last >= 1 << 16 {
            return None;
        }
        for cpu in first..=last {
            set(&mut mask, cpu);
        }
    }
    Some(mask)
}

fn set(mask: &mut Mask, cpu: usize) {
    if mask.len() <= cpu / 8 {
        mask.resize(cpu / 8 + 1, 0);
    }
    mask[cpu / 8] |= 1 << (cpu % 8);
}

/// `0-3,8`, for messages.
pub fn list(mask: &[u8]) -> String {
    let cpus = (0..mask.len() * 8).filter(|cpu| mask[cpu / 8] >> (cpu % 8) & 1 != 0);
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for cpu in cpus {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == cpu => *last = cpu,
            _ => ranges.push((cpu, cpu)),
        }
    }
    let texts: Vec<String> =
        ranges.iter().map(|(a, b)| if a == b { a.to_string() } else { format!("{a}-{b}") }).collect();
    texts.join(",")
}

/// The CPUs the thread is bound to whose folder `dir` opens; `None` for one that is not.
pub fn dump(
    dir: impl FnOnce() -> Result<ProcDir>,
    status: &Status,
    allowed: &mut Allowed,
) -> Result<Option<Mask>> {
    let unbound = status.cpus.is_empty() || allowed.is_all(&status.cpus, dir)?;
    Ok((!unbound).then(|| status.cpus.clone()))
}

/// Binds threads as they were bound.
#[derive(Debug)]
pub struct Binder {
    possible: Mask,
    own: Mask,
    /// The last set of which a part was missing: threads mostly have the same.
    told: Option<Mask>,
}

impl Binder {
    /// New threads may use what the calling thread may.
    pub fn new() -> Result<Binder> {
        let me = ProcDir::own()?;
        Ok(Binder { possible: Allowed::ask().possible, own: Status::read(&me)?.cpus, told: None })
    }

    /// Binds the thread to `cpus`, as many as there are here; `None` unbinds it.
    ///
    /// # Errors
    /// None of them is there.
    pub fn restore(&mut self, tid: RealPid, cpus: Option<&[u8]>) -> Result<()> {
        let Some(wanted) = cpus else {
            if self.own != self.possible {
                sched::set_affinity(tid, &vec![0xff; self.possible.len().max(self.own.len())])?;
            }
            return Ok(());
        };
        if wanted == self.own {
            return Ok(());
        }
        match sched::set_affinity(tid, wanted) {
            Err(e) if e.errno() == Some(libc::EINVAL) => return Err(nowhere(wanted)),
            other => other?,
        }
        let got = sched::affinity(tid)?;
        let missing =
            wanted.iter().enumerate().any(|(i, byte)| byte & !got.get(i).copied().unwrap_or(0) != 0);
        if missing && self.told.as_deref() != Some(wanted) {
            self.told = Some(wanted.to_vec());
            log::warn!(
                "Thread {tid} was bound to CPUs {}; those of them that it can use here are {}",
                list(wanted),
                list(&got)
            );
        }
        Ok(())
    }
}

fn nowhere(wanted: &[u8]) -> Error {
    Error::host(format!("it is bound to CPUs {}, of which it could use none here", list(wanted)))
        .remedy("restore where there is one of them, or bind it to others (taskset) before the dump")
}

/// CPUs that are there; all, where the kernel does not tell.
pub fn online() -> Mask {
    read_list("/sys/devices/system/cpu/online").unwrap_or_else(|| vec![0xff; 1 << 13])
}

/// What is known to fail before anything is created: threads bound to CPUs none of which is `online`.
pub fn check(entry: &pb::RcriuTaskEntry, online: &Mask) -> Result<()> {
    for thread in &entry.thread {
        if let Some(cpus) = &thread.cpus
            && !cpus.iter().zip(online).any(|(a, b)| a & b != 0)
        {
            return Err(nowhere(cpus)).during(|| format!("thread {}", thread.tid));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_go_both_ways() {
        for text in ["0", "0-3,8", "1,3,5-64"] {
            assert_eq!(list(&parse_list(text.as_bytes()).unwrap()), text);
        }
        assert_eq!(parse_list(b"\n"), Some(vec![]));
        assert_eq!((parse_list(b"x"), parse_list(b"3-99999999999")), (None, None));
    }

    #[test]
    fn who_may_use_all_cpus_is_not_bound() {
        let me = || ProcDir::open(RealPid(nix::unistd::gettid().as_raw()));
        let mut status = Status::read(&me().unwrap()).unwrap();
        let mut allowed = Allowed::ask();
        status.cpus = allowed.possible.clone();
        assert_eq!(dump(me, &status, &mut allowed).unwrap(), None);
        // A CPU that no group has alone, as far as there are several.
        status.cpus = vec![0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
        assert_eq!(dump(me, &status, &mut allowed).unwrap(), Some(status.cpus));
    }

    #[test]
    fn cpus_that_are_not_there_are_known_in_advance() {
        let bound = |cpus| pb::RcriuThreadEntry { tid: 7, cpus: Some(cpus), ..Default::default() };
        let entry = |cpus| pb::RcriuTaskEntry { thread: vec![bound(cpus)], ..Default::default() };
        assert!(check(&entry(vec![0xff]), &online()).is_ok());
        let mut far = vec![0; 512];
        far.push(1);
        let error = check(&entry(far), &online()).unwrap_err().to_string();
        assert!(error.contains("4096") && error.contains("thread 7"), "{error}");
    }
}
